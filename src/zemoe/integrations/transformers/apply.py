"""Our layers in LongCat-Flash models built or loaded from now on, and `experts_implementation="zemoe"`; both undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.monkey_patching import get_patch_mapping

from . import by_name, conversions
from .layers import StockMoE, ZeroExpertLongcatMoE, modeling
from .patch import STOCK_CAN_COMPILE
from .private import set_can_compile

# For DistributedConfig(ep_size=..., ep_plan=EP_PLAN), whole experts on each rank: transformers has no such plan itself.
EP_PLAN = {
    "model.layers.*.mlp.experts": "ep_dispatch_experts",
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
}


def is_applied() -> bool:
    """Whether LongCat-Flash models built now get our layers, whatever they are asked for."""
    return modeling.LongcatFlashMoE is ZeroExpertLongcatMoE


def apply() -> None:
    """From now on, every LongCat-Flash model that is built or loaded in this process has our MoE layers.

    Covers `from_pretrained`, `from_config` and the class called directly. Checkpoints load in the original layout and
    in the one transformers saves, and are saved in the original one. Calling it again does nothing; `unapply` undoes
    it; after an exception nothing has changed. Models built before are for `patch_`.

    Raises:
        RuntimeError: if something else has replaced LongCat-Flash's layers, or this transformers is not understood.
    """
    if is_applied():
        return
    if modeling.LongcatFlashMoE is not StockMoE:
        raise RuntimeError(f"LongcatFlashMoE has been replaced by {modeling.LongcatFlashMoE!r}; undo that first")
    taken = {"LongcatFlashMoE", "LongcatFlashExperts", "LongcatFlashTopkRouter"} & set(get_patch_mapping())
    if taken:
        raise RuntimeError(f"a patch mapping is registered for {sorted(taken)}; unregister it first")
    try:
        conversions.install()
        set_can_compile(modeling.LongcatFlashPreTrainedModel, True)
        modeling.LongcatFlashMoE = ZeroExpertLongcatMoE
    except BaseException:
        unapply()
        raise


def unapply() -> None:
    """Undo `apply`. Models that have our layers keep them (and save as before); `unpatch_` takes them out."""
    if is_applied():
        modeling.LongcatFlashMoE = StockMoE
    set_can_compile(modeling.LongcatFlashPreTrainedModel, STOCK_CAN_COMPILE)
    if not is_registered():
        conversions.remove()


@contextmanager
def applied() -> Iterator[None]:
    """`apply` for the duration of a `with` block."""
    before = is_applied()
    apply()
    try:
        yield
    finally:
        if not before:
            unapply()


def is_registered() -> bool:
    """Whether transformers knows `experts_implementation="zemoe"`."""
    return by_name.is_registered()


def register() -> None:
    """From now on transformers knows `experts_implementation="zemoe"`; nothing changes for what doesn't ask for it.

    For `from_pretrained`, `from_config` and `model.set_experts_implementation`. LongCat-Flash models get our layers as
    by `patch_` ("eager" gives stock's back, any other name is refused, since nobody else knows zero experts) and load
    from both layouts. In families without zero experts `zemoe.fused_experts` computes the experts; one whose experts
    are not of our kind (biases, a clamped gate, ...) raises ValueError at its first forward.
    Calling it again does nothing; after an exception nothing has changed.

    Raises:
        RuntimeError: if something else has taken the place of LongCat-Flash's methods, or this transformers is not
            understood.
    """
    if is_registered():
        return
    try:
        conversions.install()
        by_name.install()
    except BaseException:
        unregister()
        raise


def unregister() -> None:
    """Undo `register`. LongCat-Flash models keep their layers; models of other families must be set to another name."""
    by_name.remove()
    if not is_applied():
        conversions.remove()
