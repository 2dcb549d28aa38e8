"""Small models of families without zero experts."""

from __future__ import annotations

from transformers import (
    DeepseekV3Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
}


FAMILIES = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, intermediate_size=40, moe_intermediate_size=24, num_experts=5),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=5, hidden_act="gelu_pytorch_tanh"),
    "deepseek_v3": DeepseekV3Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"},
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=5,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}
