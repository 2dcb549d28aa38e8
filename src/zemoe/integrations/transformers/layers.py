"""LongCat-Flash's MoE layer for transformers, computed by zemoe: what `apply` and `patch_` put in stock's place.

Module, parameter and attribute names are stock's, and each class is a subclass of stock's, so that output recorders,
weight initialisation, parallel plans and checkpoints find what they look for.

H hidden size, I expert width, E FFN experts, A slots (E and the zero experts), K choices, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

try:
    from transformers.activations import ACT2FN
    from transformers.models.longcat_flash import modeling_longcat_flash as modeling
except ImportError as error:
    raise ImportError(
        f"zemoe.integrations.transformers needs transformers >= 5.17 with LongCat-Flash ({error})"
    ) from None

from ...backends import backend_of
from ...casts import StaysFloat32
from ...checkpoints.longcat import check_config
from ...config import MoEConfig, RoutingRules
from ...experts import fused_experts, unflatten
from ...routing import Routing, RoutingModule, router_logits, select
from ...separate_experts import LoadsSeparateExperts
from ...versions import warn_if_untested
from ..engines.zero_choices import without_zero_choices
from .private import MarkedForExpertParallelism, is_expert_parallel

warn_if_untested("transformers", transformers.__version__)

StockExperts = modeling.LongcatFlashExperts
StockMoE = modeling.LongcatFlashMoE
StockRouter = modeling.LongcatFlashTopkRouter
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def layer_config(config: Any) -> MoEConfig:
    """The MoEConfig of a LongcatFlashConfig's MoE layers.

    Raises ValueError naming the entry for what the layers can't compute: quantized weights, another zero_expert_type,
    an unknown hidden_act, counts that make no sense.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(config).__name__}: quantization_config is set, and these layers take no quantized weights. FP8 "
            "checkpoints load with zemoe.integrations.transformers.load_model, which dequantizes them; from_pretrained "
            "loads what zemoe.checkpoints.save_dequantized makes of them"
        )
    check_config(dict(vars(config), model_type=config.model_type), type(config).__name__)
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {sorted(_ACTIVATIONS)}, got {config.hidden_act!r}")
    return MoEConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_ffn_hidden_size,
        num_experts=config.n_routed_experts,
        top_k=config.moe_topk,
        zero_expert_kinds=(("identity", config.zero_expert_num),),
        routed_scaling_factor=float(config.routed_scaling_factor),
        activation=_ACTIVATIONS[config.hidden_act],
    )


class ZeroExpertLongcatClassifier(nn.Linear):
    """The router's product, in float32. A module of its own, so that what wraps it (offloading, LoRA) takes part."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[T, H] of any float dtype; logits [T, A] in float32, also under autocast."""
        return router_logits(input, self.weight, self.backend)


class ZeroExpertLongcatRouter(StaysFloat32, RoutingModule, StockRouter):
    """The router: float32 whatever the dtype of the model, its Routing visible to `zemoe.observe`.

    Parameter and buffer names are stock's. They stay float32 when the model is cast (zemoe.casts).
    """

    backend: str | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adopt()

    def adopt(self) -> None:
        """Make a stock router ours, in place; the very same Parameter, now float32."""
        if type(self.classifier) is nn.Linear:
            self.classifier.__class__ = ZeroExpertLongcatClassifier
        self.classifier.weight.data = self.classifier.weight.data.float()
        if self.classifier.weight.grad is not None:
            self.classifier.weight.grad = self.classifier.weight.grad.float()
        self.e_score_correction_bias = self.e_score_correction_bias.float()

    def release(self) -> None:
        """Undo what `adopt` did but for the dtype."""
        classifier: Any = self.classifier
        vars(self).pop("backend", None)
        if classifier.__class__ is ZeroExpertLongcatClassifier:
            vars(classifier).pop("backend", None)
            classifier.__class__ = nn.Linear

    def use(self, backend: str | None) -> None:
        """Choose by this backend, which a name in zemoe.backends.BACKENDS or None stands for, and multiply by it."""
        self.backend = backend
        if isinstance(self.classifier, ZeroExpertLongcatClassifier):
            self.classifier.backend = backend

    def forward(self, hidden_states: Tensor) -> Routing:
        """hidden_states: [..., H] of any float dtype. Logits first, where transformers' recorder looks for them."""
        logits_TA = self.classifier(hidden_states.reshape(-1, self.hidden_dim))
        rules = RoutingRules(
            num_experts=self.num_experts, top_k=self.top_k, routed_scaling_factor=self.routed_scaling_factor
        )
        backend = backend_of(hidden_states, self.num_experts, self.backend)
        return Routing(logits_TA, *select(logits_TA, rules, self.e_score_correction_bias, backend))


def expert_rank(mesh: DeviceMesh) -> int:
    """Which part of the experts this rank holds. In a mesh of several dimensions theirs is called "ep"."""
    return mesh.get_local_rank(None if mesh.ndim == 1 else "ep")


class ZeroExpertLongcatExperts(LoadsSeparateExperts, MarkedForExpertParallelism, StockExperts):
    """The experts: `gate_up_proj` [E, 2I, H] without rows for zero experts, `down_proj` [E, H, I], one fused op.

    The identity experts' weights go through `identity_expert`, where a tensor-parallel plan divides by the number of
    ranks, so that the sum over ranks holds the identity term once.
    """

    backend: str | None
    activation: str
    num_experts: int  # of this rank; transformers sets it where its plan divides the experts

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)  # stock's would allocate rows for the zero experts
        layer = layer_config(config)
        self.intermediate_size = layer.intermediate_size
        self.hidden_size = layer.hidden_size
        self.num_routed_experts = layer.num_experts
        self.zero_expert_num = layer.num_zero_experts
        self.total_experts = layer.num_slots
        self.act_fn = ACT2FN[config.hidden_act]
        self.identity_expert = nn.Identity()
        self.gate_up_proj = nn.Parameter(torch.empty(layer.num_experts, 2 * layer.intermediate_size, layer.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(layer.num_experts, layer.hidden_size, layer.intermediate_size))
        self.adopt(config)

    @property
    def experts_on_disk(self) -> int:
        return self.total_experts

    def adopt(self, config: Any) -> None:
        """Make stock experts ours, in place; their dead rows stay (`patch_` frees them)."""
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.backend = None
        self.num_experts = self.num_routed_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [T, H]; top_k_index, top_k_weights: [T, K]. The weighted sums, [T, H].

        Under expert parallelism those of this rank's experts: an id past them is another rank's, and zero experts were
        taken out before.
        """
        if is_expert_parallel(self):
            skipped = top_k_index >= self.num_experts
            if not top_k_weights.requires_grad:
                skipped = skipped | (top_k_weights == 0)
            return self._fused(hidden_states, top_k_index.masked_fill(skipped, -1), top_k_weights, self.num_experts)
        identity_weights = self.identity_expert(top_k_weights)
        if identity_weights is not top_k_weights:
            top_k_weights = torch.where(top_k_index < self.num_routed_experts, top_k_weights, identity_weights)
        return self._fused(hidden_states, top_k_index, top_k_weights, self.num_routed_experts)

    def _fused(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
        return fused_experts(
            x_TH,
            self.gate_up_proj,
            self.down_proj,
            weights_TK,
            ids_TK,
            num_experts=num_experts,
            zero_expert_kinds=(("identity", self.zero_expert_num),),
            activation=self.activation,
            backend=self.backend,
        )


class ZeroExpertLongcatMoE(StockMoE):
    """A LongCat-Flash MoE layer: routed once, computed by `zemoe.fused_experts`."""

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        self.intermediate_size = config.expert_ffn_hidden_size
        self.config = config
        self.experts = ZeroExpertLongcatExperts(config)
        self.router = ZeroExpertLongcatRouter(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., H]; the same shape and dtype out."""
        _, topk_weights, topk_ids = self.router(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if is_expert_parallel(self._own_experts()):
            return unflatten(self._across_ranks(x_TH, topk_ids, topk_weights), hidden_states.shape)
        return unflatten(self.experts(x_TH, topk_ids, topk_weights), hidden_states.shape)

    def _own_experts(self) -> Any:
        """The experts themselves: PEFT may have wrapped them in a module without their attributes."""
        experts: Any = self.experts
        return experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts

    def _across_ranks(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute zero experts on this rank, FFN experts where transformers' expert parallelism has put them.

        It sends every choice to an expert; with weight 0, one of this rank is in the place of a zero expert.
        """
        experts = self._own_experts()
        home = expert_rank(experts.gate_up_proj.device_mesh) * experts.num_experts
        weights_TK, ids_TK, alpha_T1 = without_zero_choices(weights_TK, ids_TK, experts.num_routed_experts, home)
        y_TH = self.experts(x_TH, ids_TK, weights_TK)
        return (y_TH + alpha_T1 * x_TH).to(x_TH.dtype)
