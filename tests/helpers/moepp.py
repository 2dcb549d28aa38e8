"""Small MoE++ checkpoints, and what the model computes, restated from the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zemoe.checkpoints.files import INDEX_NAME

V, H, I, E, LAYERS, HEADS, KV_HEADS, D = 48, 32, 24, 5, 3, 4, 2, 8


A = E + 4


CONFIG = {
    "model_type": "MoE++",
    "architectures": ["MoeForCausalLM"],
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "num_experts": [A],
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": True,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
}


UNUSED = "model.layers.0.mlp.gate.gate_map.weight"  # no layer comes before


def published_shapes(two_layers: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    shapes["lm_head.weight"] = (V, H)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        attention = {"q_proj": (HEADS * D, H), "k_proj": (KV_HEADS * D, H), "v_proj": (KV_HEADS * D, H)}
        attention["o_proj"] = (H, HEADS * D)
        shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.{norm}_layernorm.weight": (H,) for norm in ("input", "post_attention")}
        moe = f"{layer}.mlp.moe"
        gate = {"wg.0": (8 * A, H), "wg.2": (A, 8 * A)} if two_layers else {"wg": (A, H)}
        shapes |= {f"{moe}.gate.{name}.weight": shape for name, shape in {**gate, "gate_map": (A, A)}.items()}
        for e in range(E):
            shapes[f"{moe}.experts.experts.{e}.up_proj.weight"] = (2 * I, H)
            shapes[f"{moe}.experts.experts.{e}.down_proj.weight"] = (H, I)
        for e in (E, E + 1):
            shapes[f"{moe}.experts.experts.{e}.constant"] = (H,)
            shapes[f"{moe}.experts.experts.{e}.wg.weight"] = (2, H)
    return shapes


def written(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **changes: Any) -> dict[str, Tensor]:
    """A random checkpoint in `folder`, with `changes` in its config.json, and its tensors."""
    config = CONFIG | changes
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes(config["moe_2layer_gate"]).items():
        scale = 1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
        tensors[name] = (torch.randn(shape, generator=generator) * scale * (2.0 if ".gate." in name else 1.0)).to(dtype)
    (folder / "config.json").write_text(json.dumps(config))
    store(folder, tensors, shards)
    return tensors


def store(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    names = list(tensors)
    files = {f"model-{part}.safetensors": names[part::shards] for part in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, held in files.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / file, metadata={"format": "pt"})


def restated_token(get: Any, config: dict[str, Any], x_H: Tensor, prev_A: Tensor | None) -> tuple[Tensor, Tensor, list]:
    """(y, logits for the next layer, ids best first) of one token; `get` gives a tensor of the block."""
    if config["moe_2layer_gate"]:
        logits_A = get("gate.wg.2.weight") @ (get("gate.wg.0.weight") @ x_H).tanh()
    else:
        logits_A = get("gate.wg.weight") @ x_H
    if prev_A is not None:
        logits_A = logits_A + get("gate.gate_map.weight") @ prev_A
    chosen_by_A = logits_A
    if config["moe_use_logits_norm"]:
        mean = logits_A.sum() / A
        deviation = (((logits_A - mean) ** 2).sum() / (A - 1)) ** 0.5
        chosen_by_A = logits_A / deviation * config["moe_gate_norm_std"]
    ids = sorted(range(A), key=lambda slot: -chosen_by_A[slot].item())[:2]
    exps = [chosen_by_A[slot].exp() for slot in ids]  # their common factor goes when they are normalised
    if not config["moe_use_mixtral_gating"]:
        exps = [value * (slot != A - 1) for slot, value in zip(ids, exps, strict=True)]
    if not config["moe_use_mixtral_gating"] and not config["moe_feature_no_mul_topk"]:
        x_H = x_H + x_H
    y_H = torch.zeros_like(x_H)
    for slot, value in zip(ids, exps, strict=True):
        if slot < E:
            gate_up = get(f"experts.experts.{slot}.up_proj.weight") @ x_H
            gate, up = gate_up[:I], gate_up[I:]
            out_H = get(f"experts.experts.{slot}.down_proj.weight") @ (gate * torch.sigmoid(gate) * up)
        elif slot < E + 2:
            first, second = (get(f"experts.experts.{slot}.wg.weight") @ x_H).exp()
            mix = first / (first + second)
            out_H = mix * x_H + (1 - mix) * get(f"experts.experts.{slot}.constant")
        else:
            out_H = x_H if slot == E + 2 else 0 * x_H
        y_H = y_H + value / sum(exps) * out_H
    return y_H, logits_A, ids


def restated_block(
    tensors: dict[str, Tensor], layer: int, config: dict[str, Any], x_TH: Tensor, prev_TA: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    def get(name: str) -> Tensor:
        return tensors[f"model.layers.{layer}.mlp.moe.{name}"]

    rows = [restated_token(get, config, x_TH[t], None if prev_TA is None else prev_TA[t]) for t in range(x_TH.shape[0])]
    return (
        torch.stack([row[0] for row in rows]),
        torch.stack([row[1] for row in rows]),
        torch.tensor([r[2] for r in rows]),
    )


def turned(x_LD: Tensor, config: dict[str, Any]) -> Tensor:
    """Rotary positions; element i of a head's first half and of its second half are a pair."""
    length, scaling, base = x_LD.shape[0], config["rope_scaling"] or {"type": None, "factor": 1.0}, config["rope_theta"]
    kind, factor, longest = scaling["type"], scaling["factor"], config["max_position_embeddings"]
    if kind == "ntk":
        base = base * factor
    if kind == "dynamic" and length > longest:
        base = base * (factor * length / longest - (factor - 1)) ** (D / (D - 2))
    positions_L = torch.arange(length).double() / (factor if kind == "linear" else 1)
    angles = positions_L[:, None] * float(base) ** (-2 * torch.arange(D // 2).double() / D)
    first, second = x_LD[:, : D // 2], x_LD[:, D // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )


@torch.no_grad()
def restated_model(tensors: dict[str, Tensor], config: dict[str, Any], ids_L: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [L, V], ids chosen in each layer [LAYERS, L, 2]) of one row of tokens."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x_LH: Tensor, name: str) -> Tensor:
        return x_LH / (x_LH.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    h_LH, prev_LA, chosen = tensors["model.embed_tokens.weight"][ids_L], None, []
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        x_LH = norm(h_LH, f"{layer}.input_layernorm")
        q, k, v = (x_LH @ tensors[f"{layer}.self_attn.{name}_proj.weight"].T for name in ("q", "k", "v"))
        heads = []
        for head in range(HEADS):
            mine, shared = slice(head * D, (head + 1) * D), head // (HEADS // KV_HEADS)
            theirs = slice(shared * D, (shared + 1) * D)
            scores = turned(q[:, mine], config) @ turned(k[:, theirs], config).T / D**0.5
            later = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, theirs])
        h_LH = h_LH + torch.cat(heads, -1) @ tensors[f"{layer}.self_attn.o_proj.weight"].T
        x_LH = norm(h_LH, f"{layer}.post_attention_layernorm")
        y_LH, prev_LA, ids = restated_block(tensors, number, config, x_LH, prev_LA)
        h_LH = h_LH + y_LH
        chosen.append(ids)
    head = tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(h_LH, "model.norm") @ head.T, torch.stack(chosen)
