"""A tiny LongCat-Flash for the tests of checkpoints and of the transformers bridge."""

from __future__ import annotations

import torch
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

# E = 5 FFN and Z = 3 zero experts: odd, so that a mix-up of E, Z and A shows; two layers, so that one may be wrong.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "ffn_hidden_size": 40,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 8,
    "moe_topk": 4,
    "n_routed_experts": 5,
    "zero_expert_num": 3,
    "expert_ffn_hidden_size": 24,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,  # wide, so that experts matter and near-ties are rare
}


def tiny_config(**changes) -> LongcatFlashConfig:
    return LongcatFlashConfig(**(SIZES | changes))


def tiny_model(dtype: torch.dtype = torch.float32, **changes) -> LongcatFlashForCausalLM:
    """Random weights, and a selection bias that changes who is chosen; with whatever layers transformers has now."""
    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(tiny_config(**changes))
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        router = layer.mlp.router
        weight, bias = router.classifier.weight.data, router.e_score_correction_bias
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.05)
    return model.to(dtype).eval()


def tiny_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(2))
