"""The embedded model: its shape, its start weights, its data, its score, and its files while it is being trained.

T tokens, R rows of L tokens (L is the context), E FFN experts, Z zero experts, A = E + Z slots, K choices a token.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from corpus import END_OF_TEXT, STYLES, Document, build
from zemoe.checkpoints.longcat import original_layout
from zemoe.integrations.transformers import applied
from zemoe.routing import Observed

IGNORE = -100  # a target that is not scored
END, STYLE_IDS = 0, range(1, 1 + len(STYLES))  # ids of corpus.SPECIAL_TOKENS
MAX_SHARD_BYTES = 14_000_000


class Design(NamedTuple):
    """Sizes of the model and of a batch. The MLA sizes are those that engines' attention kernels are written for."""

    hidden: int = 256
    layers: int = 4
    heads: int = 2
    dense_ffn: int = 128
    expert_ffn: int = 128
    q_rank: int = 128
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    experts: int = 16  # E
    zero_experts: int = 8  # Z
    top_k: int = 6  # K
    ffn_target: int = 4  # K_e: FFN experts a token, on average
    context: int = 1024
    batch_rows: int = 32


TINY = Design()
# For the CPU, in seconds: it shows that the script works, and nothing about the model.
SMOKE = Design(32, 2, 2, 32, 16, 16, 16, 8, 8, 8, 8, 4, 3, 2, context=64, batch_rows=8)


def model_config(design: Design, vocab_size: int, zero_experts: bool) -> LongcatFlashConfig:
    """The transformers config. Without zero experts: plain top-K_e of the same E experts, all else the same.

    The scaling factor keeps the weights' sum at the start the same in both: 6 K / A of 24 slots, 6 K_e / E of 16.
    """
    return LongcatFlashConfig(
        architectures=["LongcatFlashForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=design.hidden,
        num_layers=design.layers,
        num_attention_heads=design.heads,
        ffn_hidden_size=design.dense_ffn,
        expert_ffn_hidden_size=design.expert_ffn,
        q_lora_rank=design.q_rank,
        kv_lora_rank=design.kv_rank,
        qk_nope_head_dim=design.nope,
        qk_rope_head_dim=design.rope,
        head_dim=design.rope,
        v_head_dim=design.value,
        n_routed_experts=design.experts,
        zero_expert_num=design.zero_experts if zero_experts else 0,
        zero_expert_type="identity",
        moe_topk=design.top_k if zero_experts else design.ffn_target,
        routed_scaling_factor=6.0,
        router_dtype="float32",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        max_position_embeddings=design.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        tie_word_embeddings=True,
        attention_dropout=0.0,
    )


def build_model(design: Design, config: LongcatFlashConfig, seed: int, dtype: torch.dtype) -> LongcatFlashForCausalLM:
    """The model with zemoe's MoE layers. A parameter's start depends on the seed and its name only.

    So both runs start from the same shared weights: the plain one's classifier is the first E rows of the other one's.
    """
    with applied():
        model = LongcatFlashForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # norms stay at one
        shape = list(parameter.shape)
        if name.endswith("classifier.weight"):
            shape[0] = design.experts + design.zero_experts
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        start = torch.randn(shape, generator=generator) * config.initializer_range
        parameter.data.copy_(start[: parameter.shape[0]])
    return model.to(dtype)  # all but the router


def add_dropout(model: LongcatFlashForCausalLM, probability: float) -> None:
    """Dropout on the embedding and on what attention, dense and MoE halves add to the residual stream.

    The stock model can only drop attention probabilities, so these are forward hooks, active in training mode.
    """

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):  # attention: (output, probabilities)
            return F.dropout(output[0], probability, module.training), *output[1:]
        return F.dropout(output, probability, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [*layer.self_attn, *layer.mlps, layer.mlp]
    for module in modules:
        module.register_forward_hook(hook)


# ---- data -----------------------------------------------------------------------------------------------------------


class Corpus:
    """The token bins of `corpus.py` on one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SystemExit(
                f"{folder}: no corpus here; run `python examples/corpus.py --out {folder}` first"
            ) from None
        expected = {END_OF_TEXT: END, **{f"<|{style}|>": i for style, i in zip(STYLES, STYLE_IDS, strict=True)}}
        if self.manifest["special_tokens"] != expected:
            raise SystemExit(f"{folder}: special tokens {self.manifest['special_tokens']}, expected {expected}")
        self.tokens: dict[str, Tensor] = {}
        for split, entry in self.manifest["splits"].items():
            data = (folder / f"{split}.bin").read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise SystemExit(f"{folder}/{split}.bin doesn't match manifest.json; rebuild the corpus")
            self.tokens[split] = torch.frombuffer(bytearray(data), dtype=torch.uint16).to(device, torch.int64)

    def bytes_of(self, split: str) -> int:
        return self.manifest["splits"][split]["bytes"]

    def train_rows(self, context: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """One epoch: documents in a new order, cut at a new place, rows in a new order; whole rows only."""
        tokens = self.tokens["train"]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        starts = is_style(tokens)
        order = torch.randperm(int(starts.sum()), generator=generator).to(tokens.device)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        tokens = tokens[rank[starts.cumsum(0) - 1].argsort(stable=True)]
        cut = int(torch.randint(context, (1,), generator=generator))
        size = (len(tokens) - context) // context * context
        inputs, targets = to_rows(tokens, context, cut, size)
        shuffle = torch.randperm(len(inputs), generator=generator).to(tokens.device)
        return inputs[shuffle], targets[shuffle]

    def rows_an_epoch(self, context: int) -> int:
        return (len(self.tokens["train"]) - context) // context

    def fixed_rows(self, split: str, context: int) -> tuple[Tensor, Tensor]:
        """Non-overlapping windows over a whole split in its order; the end of the last row is padding, not scored."""
        tokens = self.tokens[split]
        size = math.ceil(len(tokens) / context) * context
        inputs, targets = to_rows(F.pad(tokens, (0, size - len(tokens)), value=END), context, 0, size)
        targets.view(-1)[len(tokens) :] = IGNORE
        return inputs, targets


def is_style(tokens: Tensor) -> Tensor:
    return (tokens >= STYLE_IDS.start) & (tokens < STYLE_IDS.stop)


def to_rows(tokens: Tensor, context: int, begin: int, size: int) -> tuple[Tensor, Tensor]:
    """Inputs [R, L] and targets [R, L] of `tokens[begin:begin+size]`: every token is a target exactly once.

    A row starts with the style token of the document that its first target belongs to, so the style is always known;
    style tokens themselves are not scored.
    """
    starts = is_style(tokens)
    style = tokens[starts][starts.cumsum(0) - 1]
    targets = tokens[begin : begin + size].view(-1, context)
    style = style[begin : begin + size].view(-1, context)
    inputs = torch.cat([style[:, :1], targets[:, :-1]], dim=1)
    return inputs, targets.masked_fill(is_style(targets), IGNORE)


def smoke_corpus(folder: Path) -> Path:
    """A made-up language with an easy grammar, in four styles: learnable in seconds, and in no package."""
    words = {style: [f"{style[:2]}{part}" for part in ("ba", "do", "ki", "lu", "me", "no")] for style in STYLES}
    documents = []
    for style in STYLES:
        for number in range(150):
            count = 30 + number % 7
            text = " ".join(words[style][(number + i * i) % len(words[style])] for i in range(count)) + "."
            documents.append(Document(style, f"{number}", f"{number} {text}"))
    manifest = build(documents, folder, vocab_size=384)
    manifest["archives"] = {}
    write_json(folder / "manifest.json", manifest)
    return folder


# ---- score ----------------------------------------------------------------------------------------------------------


def ffn_use(seen: Observed, num_experts: int, scored_T: Tensor | None = None) -> dict[str, Tensor]:
    """{layer: mean FFN experts a token}, over the scored tokens."""
    use = {}
    for (layer, _), routing in seen.items():
        chosen_T = (routing.topk_ids_TK < num_experts).sum(-1).float()
        use[layer] = chosen_T.mean() if scored_T is None else chosen_T[scored_T].mean()
    return use


@torch.no_grad()
def evaluate(model: nn.Module, seen: Observed, rows: tuple[Tensor, Tensor], batch_rows: int) -> dict[str, Any]:
    """Total nats, nats by style, and FFN experts a token by layer, over all rows; deterministic."""
    model.eval()
    inputs_RL, targets_RL = rows
    nats = torch.zeros(STYLE_IDS.stop, dtype=torch.float64, device=inputs_RL.device)
    scored, use = 0, {}
    for x_BL, y_BL in zip(inputs_RL.split(batch_rows), targets_RL.split(batch_rows), strict=True):
        seen.clear()
        logits = model(input_ids=x_BL, use_cache=False).logits.float()
        loss_T = F.cross_entropy(logits.flatten(0, 1), y_BL.flatten(), ignore_index=IGNORE, reduction="none")
        # The style of a target: that of the last style token before it in its row.
        starts = is_style(x_BL)
        position = torch.arange(x_BL.shape[1], device=x_BL.device)
        last = torch.where(starts, position, 0).cummax(-1).values
        nats.index_add_(0, x_BL.gather(1, last).flatten(), loss_T.double())
        scored_T = y_BL.flatten() != IGNORE
        count = int(scored_T.sum())
        for layer, mean in ffn_use(seen, model.config.n_routed_experts, scored_T).items():
            use[layer] = use.get(layer, 0.0) + float(mean) * count
        scored += count
    seen.clear()
    model.train()
    return {
        "nats": float(nats.sum()),
        "nats_by_style": {style: float(nats[i]) for style, i in zip(STYLES, STYLE_IDS, strict=True)},
        "ffn_by_layer": [total / scored for total in use.values()],
        "tokens": scored,
    }


# ---- files ----------------------------------------------------------------------------------------------------------


def save_atomically(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    """A safetensors file that is either the old one or the new one, whatever kills the process."""
    part = path.with_suffix(".part")
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(own, part, {"about": json.dumps(about)})
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


def write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model once, in the original layout (the tied head is the embedding)."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return dict(original_layout(state.items(), model.config.n_routed_experts))


def save_shards(tensors: Mapping[str, Tensor], folder: Path, about: Mapping[str, Any]) -> None:
    """`weights-1.safetensors` ... of at most 14 MB each: small enough to be carried by anything."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if shards[-1] and size > MAX_SHARD_BYTES:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    for number, shard in enumerate(shards, 1):
        save_atomically(shard, folder / f"weights-{number}.safetensors", {**about, "shards": len(shards)})


def load_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of all shards, which must belong together."""
    tensors: dict[str, Tensor] = {}
    loaded = [load_tensors(path) for path in sorted(folder.glob("weights-*.safetensors"))]
    abouts = [about for _, about in loaded]
    if not loaded or len(loaded) != abouts[0]["shards"] or any(about != abouts[0] for about in abouts):
        raise SystemExit(f"{folder}: weights-*.safetensors must be one complete set, got {abouts}")
    for part, _ in loaded:
        tensors |= part
    return tensors, abouts[0]


def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of the original layout into a model that has them all (values; dtypes are the model's)."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        raise SystemExit(f"weights don't fit the model: {sorted(own.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, tensor in own.items():  # views of the parameters
            tensor.copy_(tensors[name])


def parameter_counts(model: nn.Module, ffn_target: int) -> dict[str, int]:
    config = model.config
    expert = 3 * config.hidden_size * config.expert_ffn_hidden_size
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = config.num_layers * (config.n_routed_experts - ffn_target) * expert
    return {"total": total, "used_by_a_token": total - idle}


def bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / math.log(2) / num_bytes


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
