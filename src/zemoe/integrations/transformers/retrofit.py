"""`retrofit_`: zero experts for trained models of transformers with routers of Qwen3-MoE, Mixtral or DeepSeek-V3.

Blocks change their class, they aren't replaced: hooks, names and Parameters stay (dev/transformers.md says why).

E FFN experts, Z zero experts, A = E + Z slots, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm4
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from ..._compat import remove_load_hooks
from ...config import MoEConfig, check_count, expand_kinds, warn_of_weights_without_gradient
from ...retrofit import ZeroExpertBlock, ZeroExpertExperts, ZeroExpertGate, new_router_rows
from .by_name import ACTIVATIONS, activation_of

_KINDS = ("identity", "zero")


class ZeroExpertQwen3MoeRouter(ZeroExpertGate, qwen3.Qwen3MoeTopKRouter):
    """Qwen3-MoE's router, for all slots."""


class ZeroExpertQwen3MoeExperts(ZeroExpertExperts, qwen3.Qwen3MoeExperts):
    """Qwen3-MoE's experts, for all slots."""


class ZeroExpertQwen3MoeBlock(ZeroExpertBlock, qwen3.Qwen3MoeSparseMoeBlock):
    """Qwen3-MoE's block with zero experts."""


class ZeroExpertMixtralRouter(ZeroExpertGate, mixtral.MixtralTopKRouter):
    """Mixtral's router, for all slots."""


class ZeroExpertMixtralExperts(ZeroExpertExperts, mixtral.MixtralExperts):
    """Mixtral's experts, for all slots."""


class ZeroExpertMixtralBlock(ZeroExpertBlock, mixtral.MixtralSparseMoeBlock):
    """Mixtral's block with zero experts."""


class _GateHasBias(ZeroExpertBlock):
    """A block with the selection bias [E] that its gate has; a published one may have `zero_bias` [Z] too."""

    @property
    def e_score_correction_bias(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The gate's own buffer [E], or [A] where zero experts have a bias."""
        gate = next(
            part for part in self.gate.modules() if isinstance(part, ZeroExpertGate)
        )  # PEFT may have wrapped it
        return self._bias(gate.get_buffer("e_score_correction_bias"))


class ZeroExpertDeepseekV3Router(ZeroExpertGate, deepseek.DeepseekV3TopkRouter):
    """DeepSeek-V3's router, for all slots."""


class ZeroExpertDeepseekV3Experts(ZeroExpertExperts, deepseek.DeepseekV3Experts):
    """DeepSeek-V3's experts, for all slots."""


class ZeroExpertDeepseekV3Block(_GateHasBias, deepseek.DeepseekV3MoE):
    """DeepSeek-V3's block with zero experts."""


class ZeroExpertGlm4MoeLiteRouter(ZeroExpertGate, glm4.Glm4MoeLiteTopkRouter):
    """GLM-4.7-Flash's router, for all slots; it is DeepSeek-V3's."""


class ZeroExpertGlm4MoeLiteExperts(ZeroExpertExperts, glm4.Glm4MoeLiteExperts):
    """GLM-4.7-Flash's experts, for all slots."""


class ZeroExpertGlm4MoeLiteBlock(_GateHasBias, glm4.Glm4MoeLiteMoE):
    """GLM-4.7-Flash's block with zero experts."""


def _qwen3_rules(block: Any) -> dict[str, Any]:
    return {"renormalize": bool(block.gate.norm_topk_prob)}


def _mixtral_rules(block: Any) -> dict[str, Any]:
    if block.jitter_noise:
        raise ValueError(
            f"router_jitter_noise must be 0, got {block.jitter_noise}: our routers add no noise, set it to 0 first"
        )
    return {"renormalize": True}


def _deepseek_rules(block: Any) -> dict[str, Any]:
    gate = block.gate
    if gate.num_group != 1:
        raise ValueError(
            f"n_group must be 1, got {gate.num_group}: the groups are made of the E trained experts, and a group limit "
            "over all A slots would be another one"
        )
    return {
        "renormalize": bool(gate.norm_topk_prob),
        "scoring_func": "sigmoid",
        "routed_scaling_factor": float(gate.routed_scaling_factor),
    }


@dataclass(frozen=True)
class _Family:
    """One family of models whose blocks `retrofit_` knows.

    ours: stock's classes of block, gate and experts, in this order, and our class for each. rules: gives a block's
    routing rules as keywords of MoEConfig. on_disk: what checkpoints call the block, if not as the model does.
    """

    ours: Mapping[type[nn.Module], type[nn.Module]]
    rules: Callable[[Any], dict[str, Any]]
    on_disk: str | None = None

    @property
    def block(self) -> type[nn.Module]:
        return next(iter(self.ours))


@dataclass(frozen=True)
class _OnDisk:
    """A load_state_dict hook of a block's owner: renames what checkpoints call `name` to the model's `own`."""

    name: str
    own: str

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        theirs = f"{prefix}{self.name}."
        for key in [key for key in state_dict if key.startswith(theirs)]:
            state_dict[f"{prefix}{self.own}.{key[len(theirs) :]}"] = state_dict.pop(key)


_FAMILIES = (
    _Family(
        ours={
            qwen3.Qwen3MoeSparseMoeBlock: ZeroExpertQwen3MoeBlock,
            qwen3.Qwen3MoeTopKRouter: ZeroExpertQwen3MoeRouter,
            qwen3.Qwen3MoeExperts: ZeroExpertQwen3MoeExperts,
        },
        rules=_qwen3_rules,
    ),
    _Family(
        ours={
            mixtral.MixtralSparseMoeBlock: ZeroExpertMixtralBlock,
            mixtral.MixtralTopKRouter: ZeroExpertMixtralRouter,
            mixtral.MixtralExperts: ZeroExpertMixtralExperts,
        },
        rules=_mixtral_rules,
        on_disk="block_sparse_moe",
    ),
    _Family(
        ours={
            deepseek.DeepseekV3MoE: ZeroExpertDeepseekV3Block,
            deepseek.DeepseekV3TopkRouter: ZeroExpertDeepseekV3Router,
            deepseek.DeepseekV3Experts: ZeroExpertDeepseekV3Experts,
        },
        rules=_deepseek_rules,
    ),
    _Family(
        ours={
            glm4.Glm4MoeLiteMoE: ZeroExpertGlm4MoeLiteBlock,
            glm4.Glm4MoeLiteTopkRouter: ZeroExpertGlm4MoeLiteRouter,
            glm4.Glm4MoeLiteExperts: ZeroExpertGlm4MoeLiteExperts,
        },
        rules=_deepseek_rules,
    ),
)
_STOCK = {ours: stock for family in _FAMILIES for stock, ours in family.ours.items()}


def retrofit_(
    model: nn.Module,
    num_zero_experts: int,
    *,
    zero_expert_type: str = "zero",
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Give every MoE block of a trained transformers model zero experts, in place.

    Each router gets Z rows, drawn with the mean and deviation of its trained rows (ZEDA). Everything that was there
    stays the same object under the same name; `zero_weight` [Z, H] is new in every block, for an optimizer made after
    this. From then on a token's K choices are among all A slots and weighed by the model's own rule (scores, which are
    normalised over the K chosen if the model does that); the router computes in float32. Train with
    `zemoe.balance.zeda_balance_loss`. `zemoe.retrofit.zero_experts_disabled(model)` gives the model as it was,
    `unretrofit_` takes the zero experts out again.

    To load one: build or load the plain model, `retrofit_` it alike, then `load_state_dict`.

    Args:
        model: with blocks of Qwen3-MoE, Mixtral, DeepSeek-V3 or GLM-4.7-Flash (`n_group` 1); dense layers stay.
        num_zero_experts: Z, at least 1, in every block.
        zero_expert_type: "zero" (ZEDA) or "identity".
        top_k: K from now on; the model's own by default, so that zero choices take the place of FFN experts.
        generator: of the CPU, for the new rows. Data-parallel ranks must draw the same ones.

    Returns:
        The names of the blocks.

    Raises:
        ValueError: for a count or kind that cannot be, a model without such blocks, or one of them that has been
            changed before (retrofitted, quantized, wrapped, sharded) or routes as our rules can't express, with the
            reason. Nothing has changed then, nor after any other exception.
        TypeError: if model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: {model!r}")
    check_count("num_zero_experts", num_zero_experts, 1)
    kinds = expand_kinds(zero_expert_type, num_zero_experts)
    if kinds[0][0] not in _KINDS:
        raise ValueError(f"zero_expert_type must be one of {_KINDS} (or copy, null), got {zero_expert_type!r}")
    blocks = _blocks_of(model)
    prepared = []
    for name, (block, family) in blocks.items():
        try:
            rules = _rules(block, family, kinds, top_k)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        warn_of_weights_without_gradient(rules.top_k, rules.renormalize)
        prepared.append((block, family, rules, new_router_rows(block.gate.weight, num_zero_experts, generator)))
    _adopt_all(prepared)
    for name, (_, family) in blocks.items():
        owner, _, own = name.rpartition(".")
        if family.on_disk is not None and own:
            model.get_submodule(owner).register_load_state_dict_pre_hook(_OnDisk(family.on_disk, own))
    return tuple(blocks)


def _blocks_of(model: nn.Module) -> dict[str, tuple[Any, _Family]]:
    """The MoE blocks of a model by name. ValueError where there are none, or its own balance loss is on."""
    blocks: dict[str, tuple[Any, _Family]] = {}
    for name, module in model.named_modules():
        family = next((family for family in _FAMILIES if isinstance(module, family.block)), None)
        if family is not None:
            blocks[name] = module, family
    if not blocks:
        known = ", ".join(family.block.__name__ for family in _FAMILIES)
        raise ValueError(f"model must have mixture-of-experts blocks ({known}), got {type(model).__name__} without any")
    if any(getattr(getattr(module, "config", None), "output_router_logits", False) for module in model.modules()):
        raise ValueError(
            "config.output_router_logits must be False: transformers' own balance loss knows E experts only; use "
            "zemoe.observe and zemoe.balance.zeda_balance_loss"
        )
    return blocks


def _adopt_all(prepared: Sequence[tuple[Any, _Family, MoEConfig, Tensor]]) -> None:
    """Give every (block, family, rules, new router rows) our classes; none has them after an exception."""
    changed = []
    try:
        for block, family, rules, rows in prepared:
            changed.append(block)
            for part in (block, block.gate, block.experts):
                part.__class__ = family.ours[type(part)]
            block.adopt(rules, rows)
    except BaseException:
        for block in changed:
            _to_stock(block)
        raise


def unretrofit_(model: nn.Module) -> tuple[str, ...]:
    """Take the zero experts of `retrofit_` out again, in place; returns the names of the blocks that had them."""
    blocks: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, ZeroExpertBlock)}
    for block in blocks.values():
        _to_stock(block)
    for part in model.modules():
        remove_load_hooks(part, _OnDisk)
    return tuple(blocks)


def _to_stock(block: Any) -> None:
    ZeroExpertBlock.release(block)  # the block may not have our class yet
    for part in block.modules():  # also where something is wrapped around them
        part.__class__ = _STOCK.get(type(part), type(part))


def _rules(block: Any, family: _Family, kinds: tuple[tuple[str, int], ...], top_k: int | None) -> MoEConfig:
    """The MoEConfig of a stock block with zero experts of `kinds`; ValueError, with the reason, where there is none."""
    if isinstance(block, ZeroExpertBlock):
        raise ValueError("the block has zero experts already; unretrofit_ the model first")
    for part, expected in zip((block, block.gate, block.experts), family.ours, strict=True):
        if type(part) is not expected:
            raise ValueError(f"the block must be made of {expected.__name__}, got {type(part).__name__} (quantized?)")
        if "forward" in vars(part):
            raise ValueError(f"{expected.__name__} is wrapped (parallel or offloaded); unwrap it first")
    router, gate_up = block.gate.weight, block.experts.gate_up_proj
    for tensor in (router, gate_up, block.experts.down_proj):
        if isinstance(tensor, DTensor) or not tensor.is_floating_point():
            raise ValueError("the weights are sharded or quantized; retrofit before that")
    activation = activation_of(block.experts.act_fn)
    if activation is None:
        got = type(block.experts.act_fn).__name__
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {got}")
    return MoEConfig(
        hidden_size=router.shape[1],
        intermediate_size=gate_up.shape[1] // 2,
        num_experts=router.shape[0],
        top_k=block.gate.top_k if top_k is None else top_k,
        zero_expert_kinds=kinds,
        activation=activation,
        **family.rules(block),
    )
