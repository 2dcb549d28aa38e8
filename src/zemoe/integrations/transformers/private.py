"""All private names of transformers that zemoe uses, each behind a function that says what it is for.

transformers may rename them without notice. They were seen, with these meanings, in transformers 5.17 to 5.24, and none
of them has a public twin there. What is not here: what a model's class declares for PreTrainedModel to read
(`_no_split_modules`, `_can_record_outputs`, `_init_weights`), in `moepp_model.py`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe

M = TypeVar("M", bound=PreTrainedModel)


def build(model_class: type[M], config: PreTrainedConfig, dtype: torch.dtype | str) -> M:
    """A model of `config` with parameters in `dtype`. The public `from_config` is of the Auto classes only."""
    return model_class._from_config(config, dtype=dtype)


def can_compile(model_class: type[PreTrainedModel]) -> bool:
    """Whether transformers takes models of this class for such that compile without graph breaks."""
    return model_class._can_compile_fullgraph


def set_can_compile(model: PreTrainedModel | type[PreTrainedModel], value: bool) -> None:
    """Say so of one model, or of all of a class."""
    model._can_compile_fullgraph = value


# --- who computes the experts ---


def implementation_name(config: PreTrainedConfig) -> str | None:
    """The name that `experts_implementation=` gave a model."""
    return config._experts_implementation


def note_implementation_name(config: PreTrainedConfig, name: str) -> None:
    """Write the name down without a check of transformers' own, which the public setter of a model makes."""
    config._experts_implementation_internal = name


def has_default_gate(experts: Any) -> bool:
    """Whether a family's experts multiply act(gate) with up, as those do that define no gate of their own."""
    return type(experts)._apply_gate is moe._default_apply_gate


def unregister_experts_function(name: str) -> None:
    """Undo `ALL_EXPERTS_FUNCTIONS.register`; deleting from the mapping itself would reach local entries only."""
    del type(moe.ALL_EXPERTS_FUNCTIONS)._global_mapping[name]


class MarkedForExpertParallelism:
    """Experts that transformers marks when its plan divides them among ranks; unmarked to begin with."""

    _is_expert_parallel = False


def is_expert_parallel(experts: Any) -> bool:
    """Whether this rank has only some of the experts; False for experts that carry no mark."""
    return getattr(experts, "_is_expert_parallel", False)
