"""`zemoe train --dry-run`: what a run would be, from a look at the text and a model without numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import LongcatFlashConfig

from . import data
from .model import check_fits, count_parameters, new_config, read_start, start_folder, wanted_ffn_experts
from .settings import Settings, SettingsError
from .view import millions

_SAMPLE = 200_000  # characters of each text, of which the tokens are counted
# A parameter in bytes: float32 of itself, of its gradient and of AdamW's two means; a state has no gradient.
_IN_MEMORY, _IN_A_STATE = 16, 12
_EXPORTED = {"float32": 4, "bfloat16": 2}


def plan(settings: Settings) -> dict[str, Any]:
    """Work out sizes, counts and needs of the run that `settings` ask for. Writes nothing, makes no model.

    refused_here: what this machine has too little memory for, or None; another may have more.

    Raises:
        SettingsError: as the run itself, but for what the whole text would show.
    """
    texts = data.read_texts(data.text_files(settings.data.paths))
    samples = [text[:_SAMPLE] for text in texts]
    start = start_folder(settings.model.start) if settings.model.start else None
    named = start / "tokenizer.json" if start is not None else settings.model.tokenizer
    tokenizer = data.load_tokenizer(Path(named)) if named else data.train_tokenizer(samples, settings.model.vocab_size)
    config = new_config(settings.model, tokenizer, settings.data.context) if start is None else read_start(start)
    k_e = wanted_ffn_experts(config, settings.train.ffn_experts)
    parameters = count_parameters(config, k_e)

    tokens_a_byte = sum(len(tokenizer.encode(sample).ids) for sample in samples) / data.count_bytes(samples)
    tokens = tokens_a_byte * data.count_bytes(texts)
    train, heldout = settings.train, settings.data.heldout
    a_step = train.rows * settings.data.context
    return {
        "settings": settings.as_dict(),
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "layers": config.num_layers,
        "choices": config.moe_topk,
        "ffn_slots": config.n_routed_experts,
        "zero_slots": config.zero_expert_num or 0,
        "k_e": k_e,
        "texts": len(texts),
        "text_bytes": data.count_bytes(texts),
        "train_tokens": round(tokens * (1 - heldout)),
        "heldout_tokens": round(tokens * heldout),
        "tokens_per_step": a_step,
        "tokens": a_step * train.steps,
        "epochs": a_step * train.steps / max(tokens * (1 - heldout), 1),
        "memory_bytes": parameters.total * _IN_MEMORY,
        "logits_bytes": a_step // train.accumulate * config.vocab_size * 4,
        "disk_bytes": parameters.total
        * (_IN_A_STATE * (settings.run.keep + 1) + 2 * _EXPORTED[settings.run.export_dtype]),
        "refused_here": _refused_here(config),
    }


def _refused_here(config: LongcatFlashConfig) -> str | None:
    try:
        check_fits(config)
    except SettingsError as error:
        return str(error)
    return None


def show(planned: dict[str, Any], out: Console) -> None:
    """Show the settings as a TOML file, which `--config` takes, with everything else as comments."""
    for section, table in planned["settings"].items():
        out.print(f"[{section}]", markup=False)
        for key, value in table.items():
            value = json.dumps(value, ensure_ascii=False)  # TOML writes it the same way
            out.print(f"{key} = {value}", markup=False, soft_wrap=True)
        out.print()
    p = planned
    rows = {
        "model": f"{millions(p['parameters'])} parameters, {millions(p['active_parameters'])} used by a token; "
        f"{p['layers']} layers, {p['choices']} of {p['ffn_slots']} FFN and {p['zero_slots']} zero experts, "
        f"K_e {p['k_e']:g}",
        "text": f"{p['text_bytes']:,} bytes in {p['texts']} file{'s' * (p['texts'] > 1)}, about "
        f"{p['train_tokens']:,} tokens to train on, {p['heldout_tokens']:,} held out",
        "steps": f"{p['tokens_per_step']:,} tokens each, {p['tokens']:,} in all, {p['epochs']:.1f} times the text",
        "memory": f"{_size(p['memory_bytes'])} for weights, gradients and AdamW over all shards, and activations: "
        f"{_size(p['logits_bytes'])} for one copy of a micro-batch's logits over all devices",
        "disk": f"at most {_size(p['disk_bytes'])} for states and export",
    }
    if p["refused_here"] is not None:
        rows["this machine can't train it"] = p["refused_here"]
    for name, text in rows.items():
        out.print(f"# {name}: {text}", markup=False, soft_wrap=True)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
