"""`zemoe generate`: from what was asked for to text on the terminal, a table below it, and a result for programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from .._version import __version__
from ..backends import resolve_backend
from ..checkpoints.fp8 import read_config
from ..checkpoints.tokenizer import guarded, read_tokenizer
from ..compile_loops import compile_loops
from ..machine import usable_devices
from ..regular_files import kind_of
from ..terminal import CommandError
from .decoding import Generation, Sampling, TextStream, Token, generate
from .painter import Painter, Scale, summary

EMBEDDED = Path(__file__).parent.parent / "models" / "tiny"
DEFAULT_STYLE = "austen"
# What is written on from where no prompt is given: ours for the styles of the embedded model and for any other model.
OPENINGS = {
    "austen": "It was a fine morning, and",
    "shakespeare": "KING HENRY\nWhat news,",
    "bible": "1 And it came to pass",
    "sotu": "My fellow Americans,",
}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_STOPPED_BY = {
    "end": "the model, its text was complete",
    "length": "--max-new-tokens",
    "context": "the end of the model's context",
    "interrupted": "Ctrl-C",
}
# Parameters below which one thread decodes as fast as two: each step is too short to be shared. With more, threads wait
# for each other, and where other programs use the processors too, that made it three times slower.
_SMALL = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for. model: a checkpoint folder. backend, prompt, style: None for the default."""

    sampling: Sampling
    prompt: str | None = None
    style: str | None = None
    max_new_tokens: int = 200
    model: Path = EMBEDDED
    backend: str | None = None
    device: str = "cpu"
    dtype: str = "auto"


class Loaded(NamedTuple):
    """A model and what is to be continued. prompt: without the style token, which is the first of prompt_ids."""

    model: Any
    tokenizer: Any
    prompt: str
    style: str | None
    prompt_ids: list[int]
    backend: str
    backend_reason: str

    def decode(self, ids: list[int]) -> str:
        with guarded("tokenizer.json of the model"):
            return self.tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _failing_with(code: int, prefix: str = "") -> Iterator[None]:
    """Turn what libraries raise for a bad value, a bad file or too little memory into a CommandError."""
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(f"{prefix}{str(error) or type(error).__name__}", code) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's CPU allocator has no exception of its own
            raise
        raise CommandError(f"{prefix}{error}", code) from error


def _check(request: Request) -> None:
    """Raise CommandError for what can be seen to be wrong before any file is opened."""
    if request.prompt is not None:
        if not request.prompt.strip():
            raise CommandError("--prompt is empty; give some text, or leave it out")
        with _failing_with(2, "--prompt must be valid UTF-8: "):
            request.prompt.encode()
    if request.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be at least 1, got {request.max_new_tokens}")
    if request.dtype not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    if _full_name(request.device) not in usable_devices():
        usable = ", ".join(usable_devices())
        raise CommandError(f"--device must be one that torch can use here ({usable}), got {request.device!r}")
    if (found := kind_of(request.model)) != "a folder":
        if request.model == EMBEDDED:
            raise CommandError(f"{EMBEDDED}: the embedded model is missing; reinstall zemoe or give --model", 1)
        raise CommandError(f"--model must be a LongCat-Flash checkpoint folder, found {found} at {request.model}")


def _full_name(device: str) -> str:
    return device if device == "cpu" or ":" in device else f"{device}:0"


def _torch_dtype(name: str, stored: Any) -> torch.dtype | str:
    """Return the dtype called `name`; for "auto" the one that config.json says, or "auto" again if it says none."""
    if name == "auto" and isinstance(stored, torch.dtype):
        return stored
    return name if name == "auto" else getattr(torch, name)


def styles_of(tokenizer: Any, config: Any) -> dict[str, int]:
    """Return {style: id} of special tokens such as <|austen|>, without the model's begin, end and padding tokens."""
    marks: set[int | None] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        marks |= set(value) if isinstance(value, list) else {value}
    found = {}
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        match = re.fullmatch(r"<\|(\w+)\|>", token.content)
        if match and token_id not in marks:
            found[match[1]] = token_id
    return found


def _prompt_ids(request: Request, tokenizer: Any, config: Any) -> tuple[str, str | None, list[int]]:
    """Return the text of the prompt, the style, and the ids of both."""
    styles = styles_of(tokenizer, config)
    if request.style is None:
        style = DEFAULT_STYLE if DEFAULT_STYLE in styles else None
    else:
        style = request.style.removeprefix("<|").removesuffix("|>")
        if style not in styles:
            known = f"must be one of {', '.join(styles)}" if styles else "must be left out (this model has none)"
            raise CommandError(f"--style {known}, got {request.style!r}")
    prompt = request.prompt
    if prompt is None:
        prompt = OPENINGS.get(style or DEFAULT_STYLE, "")  # a style that we don't know begins with its token alone
    path = request.model / "tokenizer.json"
    with _failing_with(1), guarded(path):
        if style is None:
            ids = tokenizer.encode(prompt).ids
        else:
            ids = [styles[style], *tokenizer.encode(prompt, add_special_tokens=False).ids]
        tokenizer.decode(ids)  # what can't be read back is better known now than after the first token
    if len(ids) >= config.max_position_embeddings:
        limit = f"the model's context of {config.max_position_embeddings} tokens"
        raise CommandError(f"--prompt must be shorter than {limit}, got {len(ids)}")
    if max(ids) >= config.vocab_size:
        raise CommandError(f"{path}: does not belong to this model, its ids go too far", 1)
    return prompt, style, ids


def load(request: Request) -> Loaded:
    """Load everything that generation needs, cheap checks first. Raises CommandError."""
    _check(request)
    with _failing_with(1):
        read_config(request.model)
        tokenizer = read_tokenizer(request.model / "tokenizer.json")

    from transformers.utils import logging

    from ..integrations.transformers import load_config, load_model, patch_

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _failing_with(1):
        config = load_config(request.model)
    prompt, style, ids = _prompt_ids(request, tokenizer, config)
    device, dtype = torch.device(_full_name(request.device)), _torch_dtype(request.dtype, config.dtype)
    with _failing_with(2, "--"):
        resolve_backend(device, dtype if isinstance(dtype, torch.dtype) else torch.float32, request.backend)

    with _failing_with(1):
        model = load_model(request.model, device, dtype, request.backend)
        report = patch_(model, request.backend)  # already patched: this tells the backend, and why that one
    if report.backend == "cpu":
        with _threads_for(model):  # as in `run`: other numbers of threads take other loops
            compile_loops(device, model.dtype)
    return Loaded(model, tokenizer, prompt, style, ids, report.backend, report.backend_reason)


def run(request: Request, out: Console, status: Console) -> tuple[int, dict[str, Any]]:
    """Show a generation on `out`, and a spinner on `status` before it; return the exit code and a result for programs.

    Ctrl-C ends the text, the table still comes. Raises CommandError.
    """
    with status.status("loading the model") if status.is_terminal else nullcontext():
        loaded = load(request)
    config = loaded.model.config
    scale = Scale.of_chance(config.n_routed_experts, config.zero_expert_num, config.moe_topk, config.num_layers)
    out.print(_headline(request, loaded), style="dim", markup=False)
    if out.color_system is not None:
        out.print(scale.legend())
    out.print()

    made, stream, painter = Generation(), TextStream(loaded.decode), Painter(out, scale)
    painter.prompt(loaded.prompt)
    unshown: list[int] = []  # of the tokens whose text isn't complete yet; the text gets their mean
    try:
        with _failing_with(1, f"{request.model}: "), _threads_for(loaded.model):
            for token in generate(loaded.model, loaded.prompt_ids, request.sampling, request.max_new_tokens, made):
                unshown.append(token.ffn_experts)
                if text := stream.push(token.id):
                    painter.token(text, sum(unshown) / len(unshown))
                    unshown.clear()
    except KeyboardInterrupt:
        made.finish = "interrupted"
    finally:
        if unshown:
            painter.token(stream.rest(), sum(unshown) / len(unshown))
        painter.close()
    out.print()
    rows = {
        "backend": f"{loaded.backend}: {loaded.backend_reason}",
        "stopped by": _STOPPED_BY[made.finish or "interrupted"],
        "seed": f"{request.sampling.seed}",
    }
    out.print(summary(made, config.moe_topk, rows, out.options.ascii_only))
    return 130 if made.finish == "interrupted" else 0, _result(request, loaded, made)


@contextmanager
def _threads_for(model: Any) -> Iterator[None]:
    """Run on one thread inside, if this is a small model on the CPU."""
    before = torch.get_num_threads()
    if model.device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _headline(request: Request, loaded: Loaded) -> str:
    model, config = loaded.model, loaded.model.config
    name = "embedded model" if request.model == EMBEDDED else str(request.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    if head is not embedding and torch.equal(head, embedding):
        parameters -= head.numel()  # tied, only stored twice
    return (
        f"{name}: {parameters / 1e6:,.1f} M parameters, {config.num_layers} layers, {config.moe_topk} of "
        f"{config.n_routed_experts} FFN and {config.zero_expert_num} zero experts a token"
        + (f"; style {loaded.style}" if loaded.style else "")
    )


def _result(request: Request, loaded: Loaded, made: Generation) -> dict[str, Any]:
    """Return what --json prints; docs/cli.md says what is in it."""
    config, top_k = loaded.model.config, loaded.model.config.moe_topk
    stream = TextStream(loaded.decode)
    pieces = [stream.push(token.id) for token in made.tokens]
    if pieces:
        pieces[-1] += stream.rest()
    means = made.mean_ffn_by_layer

    def entry(token: Token) -> dict[str, Any]:
        return {"id": token.id, "ffn_experts": token.ffn_experts, "ffn_experts_by_layer": token.ffn_by_layer}

    def timing(tokens: int, seconds: float) -> dict[str, Any]:
        return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None}

    return {
        "zemoe": __version__,
        "model": str(request.model),
        "num_layers": config.num_layers,
        "num_experts": config.n_routed_experts,
        "num_zero_experts": config.zero_expert_num,
        "top_k": top_k,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "backend": {"name": loaded.backend, "reason": loaded.backend_reason},
        "sampling": asdict(request.sampling),
        "style": loaded.style,
        "prompt": loaded.prompt,
        "text": "".join(pieces),
        "finish": made.finish,
        "prompt_tokens": [entry(token) for token in made.prompt],
        "tokens": [{"text": text, **entry(token)} for text, token in zip(pieces, made.tokens, strict=True)],
        "mean_ffn_experts": sum(means) if means else None,
        "layers": [{"layer": i, "mean_ffn_experts": m, "zero_share": 1 - m / top_k} for i, m in enumerate(means)],
        "timing": {
            "prompt": timing(len(made.prompt), made.prompt_seconds),
            "decode": timing(len(made.tokens), made.decode_seconds),
        },
    }
