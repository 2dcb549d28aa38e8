"""How `apply` and `register` change what transformers reads and writes of LongCat-Flash's experts.

E FFN experts, Z zero experts, A = E + Z slots.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch.distributed.tensor import DTensor
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

_MODEL_TYPE = "longcat_flash"
_GATE_UP = "mlp.experts.gate_up_proj"


class DropDeadRows(ConversionOps):
    """Keep as many experts as the parameter has rows: a checkpoint may carry dead rows for the zero experts.

    Stands before stock's stacking, so that dead tensors are dropped and never copied. A model that does have rows for
    its zero experts is left alone.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name, config = kwargs["full_layer_name"], kwargs["config"]
        param = kwargs["model"].get_parameter(name)
        rows = (param.to_local() if isinstance(param, DTensor) else param).shape[0]
        slots = config.n_routed_experts + config.zero_expert_num
        # Where the rows themselves are sharded, a rank sees its own, and dead ones behind them.
        allowed = {rows, slots} if rows == param.shape[0] else set(range(rows, rows + config.zero_expert_num + 1))
        kept = {}
        for pattern, tensors in input_dict.items():
            packed = len(tensors) == 1 and tensors[0].ndim == 3  # all rows in one tensor, not a list of rows
            found = tensors[0].shape[0] if packed else len(tensors)
            if found not in allowed:
                raise ValueError(f"{name} needs {rows} experts ({slots} with dead rows), the checkpoint has {found}")
            if packed and found > rows:
                kept[pattern] = [tensors[0][:rows].clone()]  # a view would keep the dead rows in memory
            else:
                kept[pattern] = tensors if packed else tensors[:rows]
        return kept

    @property
    def reverse_op(self) -> ConversionOps:
        return KeepRows()


class KeepRows(ConversionOps):
    """Does nothing: it is the reverse of dropping rows that nothing reads."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return DropDeadRows()


def _our_conversions(stock: list[Any]) -> list[Any]:
    """Stock's weight conversions with dead rows dropped on the way; `_stock_conversions` takes that out again."""
    ours = [WeightConverter(_GATE_UP, _GATE_UP, [DropDeadRows()])]  # first here is last when saving
    found = False
    for converter in stock:
        if isinstance(converter, WeightConverter) and converter.target_patterns == [_GATE_UP]:
            converter.operations = [DropDeadRows(), *converter.operations]
            found = True
        ours.append(converter)
    if not found:
        raise RuntimeError(f"transformers {transformers.__version__} stacks LongCat-Flash's experts in an unknown way")
    return ours


def _stock_conversions(conversions: list[Any]) -> list[Any]:
    stock = []
    for converter in conversions:
        operations = getattr(converter, "operations", None)
        if operations is not None:
            converter.operations = [op for op in operations if not isinstance(op, DropDeadRows)]
        if operations is None or converter.operations:
            stock.append(converter)
    return stock


def _register_conversions(conversions: list[Any]) -> None:
    by_user = _MODEL_TYPE in conversion_mapping.USER_REGISTERED_MAPPINGS
    try:
        conversion_mapping.register_checkpoint_conversion_mapping(_MODEL_TYPE, conversions, overwrite=True)
    finally:
        if not by_user:  # registering marks it, and then it would count for remote code of the same model_type too
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(_MODEL_TYPE)


def _registered() -> list[Any]:
    return conversion_mapping.get_checkpoint_conversion_mapping(_MODEL_TYPE) or []  # a copy


def are_installed() -> bool:
    """Whether transformers has our conversions."""
    return any(isinstance(op, DropDeadRows) for converter in _registered() for op in _operations(converter))


def _operations(converter: Any) -> list[Any]:
    return getattr(converter, "operations", None) or []


def install() -> None:
    """Make both disk layouts load, with or without dead rows in the model; what stock loads stays the same.

    Raises RuntimeError for a transformers whose own conversions are not what we know.
    """
    if are_installed():
        return
    stock = _registered()
    if not stock:
        raise RuntimeError(f"transformers {transformers.__version__} has no weight conversions for {_MODEL_TYPE}")
    _register_conversions(_our_conversions(stock))


def remove() -> None:
    """Undo `install`."""
    if are_installed():
        _register_conversions(_stock_conversions(_registered()))
