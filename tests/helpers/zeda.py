"""Small ZEDA checkpoints, and what their blocks compute, restated from the published code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Glm4MoeLiteConfig, Qwen3MoeConfig

E, Z, H, I, K = 6, 3, 32, 16, 3


CONFIGS = {
    "qwen3_moe_plus_plus": Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=40,
        moe_intermediate_size=I,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "glm4_moe_lite_plus_plus": Glm4MoeLiteConfig(
        vocab_size=64,
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=40,
        moe_intermediate_size=I,
        n_routed_experts=E,
        n_shared_experts=1,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        mlp_layer_types=["dense", "sparse"],
        num_nextn_predict_layers=0,
    ),
}


BLOCK = "model.layers.1.mlp"


def attention_of(family: str) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer's attention, on disk."""
    if family.startswith("qwen3"):
        shapes = {"q_proj": (32, H), "k_proj": (16, H), "v_proj": (16, H), "o_proj": (H, 32), "q_norm": (16,)}
        return shapes | {"k_norm": (16,)}
    shapes = {"q_a_proj": (16, H), "q_a_layernorm": (16,), "q_b_proj": (32, 16), "kv_a_proj_with_mqa": (24, H)}
    return shapes | {"kv_a_layernorm": (16,), "kv_b_proj": (32, 16), "o_proj": (H, 16)}


def written(family: str, folder: Path, kind: str = "zero", **config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (64, H), "norm": (H,)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.self_attn.{name}": shape for name, shape in attention_of(family).items()}
        shapes |= {f"layers.{layer}.{norm}_layernorm": (H,) for norm in ("input", "post_attention")}
    mlps = {"layers.0.mlp": 40} | {f"layers.1.mlp.experts.{e}": I for e in range(E)}
    if family.startswith("glm4"):
        mlps["layers.1.mlp.shared_experts"] = I
    for mlp, width in mlps.items():
        shapes |= {f"{mlp}.{which}_proj": (width, H) for which in ("gate", "up")} | {f"{mlp}.down_proj": (H, width)}
    shapes["layers.1.mlp.gate"] = (E + Z, H)
    tensors = {f"model.{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    tensors["lm_head.weight"] = torch.randn(64, H, generator=generator)
    if family.startswith("glm4"):
        tensors[f"{BLOCK}.gate.e_score_correction_bias"] = torch.randn(E + Z, generator=generator) * 0.3
        tensors["model.layers.2.eh_proj.weight"] = torch.randn(H, 2 * H, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    architecture = {"qwen3": "Qwen3MoePlusPlusForCausalLM", "glm4_": "Glm4MoeLitePlusPlusForCausalLM"}[family[:5]]
    config = {"model_type": family, "architectures": [architecture], "use_zce_mask": False} | config
    zeros = {"zce_nums": [1, 2], "zce_types": [kind, kind]}
    (folder / "config.json").write_text(json.dumps(CONFIGS[family].to_dict() | zeros | config))
    return tensors


def restated(family: str, tensors: dict[str, torch.Tensor], x_TH: torch.Tensor, kind: str) -> torch.Tensor:
    """ZEDA's block for each token, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def ffn(prefix: str, x_H: torch.Tensor) -> torch.Tensor:
        gate, up, down = (tensors[f"{prefix}.{which}_proj.weight"] for which in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H))

    rows = []
    for x_H in x_TH.double():
        logits = tensors[f"{BLOCK}.gate.weight"] @ x_H
        if family.startswith("qwen3"):
            scores, choice, scale = logits.softmax(-1), logits, 1.0
        else:
            scores, scale = logits.sigmoid(), 1.8
            choice = scores + tensors[f"{BLOCK}.gate.e_score_correction_bias"]
        ids = sorted(range(E + Z), key=lambda slot: -float(choice[slot]))[:K]
        total = sum(float(scores[slot]) for slot in ids)
        y_H = torch.zeros(H, dtype=torch.float64)
        for slot in ids:
            value = ffn(f"{BLOCK}.experts.{slot}", x_H) if slot < E else x_H * (kind == "copy")
            y_H += scale * scores[slot] / total * value
        rows.append(y_H if family.startswith("qwen3") else y_H + ffn(f"{BLOCK}.shared_experts", x_H))
    return torch.stack(rows)
