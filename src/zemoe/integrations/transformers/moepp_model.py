"""MoE++'s published model (Jin et al., arXiv 2410.07348) on transformers' Llama, its MoE layers computed by zemoe.

Attention, norms, rotary positions, head, caches and `generate` are Llama's; ours are the MoE block and the loop over
layers, in which a layer's router logits reach the next layer's router as a value, kept on no module. The rules were
read from the published code (github.com/SkyworkAI/MoE-plus-plus, a5425c5), which was not run.

T tokens, H hidden size, I expert width, E FFN experts, A = E + 4 slots, in id order: FFN, 2 constant, copy, zero.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...affine import AffineParams
from ...backends import Backend, backend_of
from ...casts import StaysFloat32
from ...config import MoEConfig
from ...experts import unflatten, weighted_experts
from ...routing import Routing, Selector, router_logits
from .cache import CACHE, refuse_unknown

# Fixed in the published code, whatever the config.
TOP_K = 2
CONSTANT_EXPERTS = 2
ZERO_EXPERT_KINDS = (("constant", CONSTANT_EXPERTS), ("identity", 1), ("zero", 1))
ZERO_EXPERTS = 4
_GATE_FACTOR = 8  # width of a two-layer gate, in slots


class MoEPlusPlusConfig(LlamaConfig):
    """Llama's config and MoE++'s own entries, under their published names.

    num_experts: a list, of which the first number counts: A. moe_use_mixtral_gating: weights are a softmax over the
    two chosen. moe_2layer_gate: linear, tanh, linear. moe_use_logits_norm: choose by logits of standard deviation
    moe_gate_norm_std. moe_feature_no_mul_topk: experts see x and not 2x, as with moe_use_mixtral_gating.
    """

    model_type = "MoE++"
    base_model_tp_plan = None  # Llama's would divide an MLP that isn't there
    base_model_pp_plan = None

    num_experts: list[int] | tuple[int, ...] = (32,)
    moe_use_mixtral_gating: bool = False
    moe_2layer_gate: bool = True
    moe_use_logits_norm: bool = False
    moe_gate_norm_std: float = 1.0
    moe_feature_no_mul_topk: bool = False


def block_rules(config: MoEPlusPlusConfig) -> MoEConfig:
    """The MoEConfig of every MoE block of the model.

    Mixtral's gating is a softmax over the two chosen logits: that over all slots, normalised over the two. The other
    gives the zero expert no weight and normalises the rest.
    """
    return MoEConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts[0] - ZERO_EXPERTS,
        top_k=TOP_K,
        zero_expert_kinds=ZERO_EXPERT_KINDS,
        renormalize="all" if config.moe_use_mixtral_gating else "nonnull",
    )


class Float32Linear(StaysFloat32, nn.Linear):
    """A product in float32, also under autocast, whose weight stays float32 when the model is cast."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """[T, columns] of any float dtype; [T, rows] in float32."""
        return router_logits(input, self.weight)


class MoEPlusPlusGate(nn.Module):
    """The router's logits: one or two layers, and W_g times the logits of the layer before.

    All in float32. The published code computes the last product in the dtype of the model, from logits rounded to it;
    in a float32 model that is the same.
    """

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super().__init__()
        A, H = config.num_experts[0], config.hidden_size
        if config.moe_2layer_gate:
            width = _GATE_FACTOR * A
            self.wg = nn.Sequential(Float32Linear(H, width), nn.Tanh(), Float32Linear(width, A))
        else:
            self.wg = Float32Linear(H, A)
        self.gate_map = Float32Linear(A, A)  # the first layer's is in the checkpoints, and unused

    def forward(self, x_TH: Tensor, prev_logits_TA: Tensor | None) -> Tensor:
        """[T, A] float32; prev_logits_TA: of the layer before, None in the first."""
        logits_TA = self.wg(x_TH)
        return logits_TA if prev_logits_TA is None else logits_TA + self.gate_map(prev_logits_TA)


class MoEPlusPlusExperts(nn.Module):
    """All experts' weights: `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I], of constant experts `constant` [2, H]
    and `constant_wg` [2, 2, H]."""

    def __init__(self, rules: MoEConfig) -> None:
        super().__init__()
        self.rules = rules
        E, H, I = rules.num_experts, rules.hidden_size, rules.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))
        self.constant = nn.Parameter(torch.empty(CONSTANT_EXPERTS, H))
        self.constant_wg = nn.Parameter(torch.empty(CONSTANT_EXPERTS, 2, H))

    def forward(self, x_TH: Tensor, routing: Routing, backend: Backend | None = None) -> Tensor:
        """[T, H]: the weighted sums of the experts that `routing` chose."""
        constants = AffineParams(self.constant_wg, self.constant)
        w13, w2 = self.gate_up_proj, self.down_proj
        return weighted_experts(x_TH, routing, w13, w2, self.rules, constants, backend=backend)


class MoEPlusPlusBlock(nn.Module):
    """Gate, choice and experts. `zemoe.observe` sees the Routing under the block's name.

    The Routing has the logits that were chosen by, normalised if the config asks for that; what goes to the next layer
    is not normalised.
    """

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super().__init__()
        self.rules = block_rules(config)
        self.logits_std = config.moe_gate_norm_std if config.moe_use_logits_norm else None
        self.input_factor = 1 if config.moe_use_mixtral_gating or config.moe_feature_no_mul_topk else TOP_K
        self.gate = MoEPlusPlusGate(config)
        self.experts = MoEPlusPlusExperts(self.rules)
        self.selector = Selector()

    def route(self, logits_TA: Tensor, backend: Backend | None = None) -> Routing:
        """The Routing of the gate's logits."""
        if self.logits_std is not None:
            std_T1 = logits_TA.std(dim=-1, keepdim=True)
            # Equal logits stay equal, where the published code divides by 0.
            logits_TA = logits_TA * (self.logits_std / torch.where(std_T1 == 0, 1.0, std_T1))
        return self.selector(logits_TA, self.rules, backend=backend)

    def forward(self, hidden_states: Tensor, prev_logits_TA: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H] to (the same shape and dtype, logits [T, A] float32 for the next layer)."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TA = self.gate(x_TH, prev_logits_TA)
        # Twice x is exact in every dtype, and what experts make of it isn't twice what they make of x.
        backend = backend_of(x_TH, self.rules.num_experts)
        y_TH = self.experts(x_TH * self.input_factor, self.route(logits_TA, backend), backend)
        return unflatten(y_TH, hidden_states.shape), logits_TA


class MoEPlusPlusDecoderLayer(GradientCheckpointingLayer):
    """Llama's decoder layer with the block as its MLP."""

    def __init__(self, config: MoEPlusPlusConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = MoEPlusPlusBlock(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, prev_logits_TA: Tensor | None, **attention: Any) -> tuple[Tensor, Tensor]:
        """(hidden states, router logits [T, A]). Both inputs by position, where gradient checkpointing looks."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention)[0]
        y, logits_TA = self.mlp(self.post_attention_layernorm(hidden_states), prev_logits_TA)
        return hidden_states + y, logits_TA


class MoEPlusPlusPreTrainedModel(LlamaPreTrainedModel):
    """What transformers has to know of the model."""

    config_class = MoEPlusPlusConfig
    _no_split_modules: ClassVar = ["MoEPlusPlusDecoderLayer"]
    _can_record_outputs: ClassVar = {"hidden_states": MoEPlusPlusDecoderLayer, "attentions": LlamaAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEPlusPlusExperts):
            std = self.config.initializer_range
            for weight in (module.gate_up_proj, module.down_proj, module.constant_wg):
                initialization.normal_(weight, mean=0.0, std=std)
            initialization.normal_(module.constant, mean=0.0, std=1.0)


class MoEPlusPlusModel(MoEPlusPlusPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MoEPlusPlusDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and result are LlamaModel's; its cache goes by the name that this transformers gives it.

        Raises ValueError unless exactly one of input_ids and inputs_embeds is given, TypeError for keywords that
        nothing reads.
        """
        cache = kwargs.pop(CACHE, None)
        refuse_unknown("MoEPlusPlusModel", kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen)[None]
        past: dict[str, Any] = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **past,
        )
        attention = {
            "attention_mask": mask,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "position_ids": position_ids,
            "use_cache": use_cache,
            **past,
        }
        logits_TA = None
        for layer in self.layers:
            hidden_states, logits_TA = layer(hidden_states, logits_TA, **attention, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **past)


class MoEPlusPlusForCausalLM(MoEPlusPlusPreTrainedModel, LlamaForCausalLM):
    """The model with its head; forward and `generate` are LlamaForCausalLM's.

    `save_pretrained` and `from_pretrained` of this class keep the experts packed as they are here;
    `moepp.py` reads and writes the published layout.
    """

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # Llama's own would allocate a Llama
        self.model = MoEPlusPlusModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
