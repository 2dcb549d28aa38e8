"""What benchmarks/gpu/generation.py times: the model, and what a user of plain transformers can make of its layers.

transformers' fast experts (`grouped_mm`, `batched_mm`) don't know zero experts, and LongCat-Flash refuses them. But
they know choices that are another rank's, under expert parallelism: ids past the rank's own experts, with weights of
zero. So a zero choice is given to them as such a choice, and the identity term is added behind.

T tokens, H hidden size, E FFN experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM
from transformers.integrations.moe import use_experts_implementation

# LongCat-Flash-Lite without its n-gram embedding, which transformers' LongCat-Flash doesn't have. 14 layers are all.
LITE = {
    "vocab_size": 131072, "hidden_size": 3072, "num_layers": 14, "num_attention_heads": 32, "ffn_hidden_size": 6144,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "expert_ffn_hidden_size": 1024, "n_routed_experts": 256, "zero_expert_num": 128, "moe_topk": 12,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 96,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8, "expert_ffn_hidden_size": 32, "n_routed_experts": 16, "zero_expert_num": 8, "moe_topk": 4,
}  # fmt: skip
SPARE_BYTES = 9 * 2**30  # for caches, activations and CUDA graphs, and one layer's live rows while `patch_` copies them


def config_of(sizes: dict[str, int]) -> LongcatFlashConfig:
    return LongcatFlashConfig(**sizes, routed_scaling_factor=6.0, bos_token_id=None, eos_token_id=None)


def unmaterialised(sizes: dict[str, int], dtype: torch.dtype) -> LongcatFlashForCausalLM:
    with torch.device("meta"):
        return LongcatFlashForCausalLM(config_of(sizes)).to(dtype)


def fitting_layers(sizes: dict[str, int], dtype: torch.dtype) -> int:
    """Stock layers that fit into the GPU's free memory; the model has no more than `sizes` says."""
    model = unmaterialised(sizes | {"num_layers": 1}, dtype)
    layer = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - layer
    layers = (torch.cuda.mem_get_info()[0] - SPARE_BYTES - rest) // layer
    if layers < 1:
        raise SystemExit(f"not even one layer of {layer / 1e9:.1f} GB fits beside {rest / 1e9:.1f} GB")
    return min(layers, sizes["num_layers"])


def build(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> LongcatFlashForCausalLM:
    """A stock model with random weights; embeddings of size 1, so that the tokens of a prompt stay different."""
    model = unmaterialised(sizes, dtype).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffer was never computed
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 0.02)
        for layer in model.model.layers:
            layer.mlp.router.e_score_correction_bias.zero_()
    return model.eval()


@use_experts_implementation
class FFNExperts(nn.Module):
    """Stock's E FFN experts, as other families of transformers have theirs; a view leaves out the dead rows."""

    def __init__(self, config: Any, stock: Any) -> None:
        super().__init__()
        self.num_experts = stock.num_routed_experts
        self.act_fn = stock.act_fn
        self.gate_up_proj = nn.Parameter(stock.gate_up_proj.data[: self.num_experts])
        self.down_proj = nn.Parameter(stock.down_proj.data)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError("config names the function that computes instead")


class MaskedExperts(nn.Module):
    """In place of stock's experts, over the very same weights. implementation: "grouped_mm" or "batched_mm".

    `grouped_mm` sorts the rows of all choices and multiplies those before the masked ones; `batched_mm` copies a whole
    expert for each choice, masked ones included, and multiplies by it.
    """

    def __init__(self, stock: Any, implementation: str) -> None:
        super().__init__()
        self.ffn: Any = FFNExperts(SimpleNamespace(_experts_implementation=implementation), stock)
        self.ffn._is_expert_parallel = True  # newer versions look for choices of other ranks only then

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [T, H]; top_k_index, top_k_weights: [T, K], zero experts from E on. Weighted sums, [T, H]."""
        zero_TK = top_k_index >= self.ffn.num_experts
        y_TH = self.ffn(hidden_states, top_k_index, top_k_weights.masked_fill(zero_TK, 0))
        alpha_T1 = top_k_weights.masked_fill(~zero_TK, 0).sum(-1, keepdim=True)
        return (y_TH + alpha_T1 * hidden_states).to(hidden_states.dtype)


@contextmanager
def masked(model: Any, implementation: str) -> Iterator[None]:
    """A stock LongcatFlashForCausalLM with MaskedExperts for the duration of a `with` block."""
    layers = [layer.mlp for layer in model.model.layers]
    stock = [layer.experts for layer in layers]
    for layer, experts in zip(layers, stock, strict=True):
        layer.experts = MaskedExperts(experts, implementation)
    try:
        yield
    finally:
        for layer, experts in zip(layers, stock, strict=True):
            layer.experts = experts
