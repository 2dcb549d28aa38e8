"""What inference engines expect of FusedMoE beside computing: options without a meaning here, and a memo of routing.

T tokens, K choices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

# Arguments of engines' FusedMoE that zemoe has no use for: neutral values, and what to do instead of another one.
_NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "reduce_results": ((True, False), ""),
    "quant_config": ((None,), "load dequantised weights"),
    "tp_size": ((None, False, 0, 1), "shard outside of the layer"),
    "ep_size": ((None, False, 0, 1), "shard outside of the layer"),
    "dp_size": ((None, False, 0, 1), "run one layer per data-parallel rank"),
    "pcp_size": ((None, False, 0, 1), "run one layer per rank"),
    "apply_router_weight_on_input": ((None, False, 0), "scale the hidden states yourself"),
    "has_bias": ((None, False, 0), "use experts without bias"),
    "is_act_and_mul": ((None, True), "use gated experts"),
    "num_redundant_experts": ((None, False, 0), "load balance outside of the layer"),
    "enable_eplb": ((None, False, 0), "load balance outside of the layer"),
    "is_sequence_parallel": ((None, False, 0), "gather the sequence before the layer"),
    "expert_mapping": ((None,), "give weight_loader the expert id"),
    "n_shared_experts": ((None, 0), "use zemoe.MoE, which has shared experts"),
    "zero_expert_num": ((None, 0), "use ZeroExpertFusedMoE"),
    "zero_expert_type": ((None,), "use ZeroExpertFusedMoE"),
}


def check_engine_options(layer: str, options: Mapping[str, object]) -> None:
    """Refuse what is no option of an engine's FusedMoE, and options that ask for what zemoe does not have.

    Raises:
        TypeError: for an unknown name, in the words of a call of the class `layer`. ValueError: for another value.
    """
    for name, value in options.items():
        if name not in _NEUTRAL:
            raise TypeError(f"{layer}() got an unexpected keyword argument {name!r}")
        neutral, instead = _NEUTRAL[name]
        if not any(value is known or (value == known and type(value) is type(known)) for known in neutral):
            raise ValueError(f"{name} must be one of {neutral}, got {value!r}; {instead}")


class RoutingMemo(threading.local):
    """Routing handed from the caller to the layer, one per thread; a copied layer starts with an empty one."""

    def __init__(self) -> None:
        self.routed: tuple[Tensor, Tensor] | None = None
        self.read = 0

    def __deepcopy__(self, memo: dict) -> RoutingMemo:
        return RoutingMemo()

    def __reduce__(self) -> tuple:
        return RoutingMemo, ()

    @contextmanager
    def holding(self, weights_TK: Tensor, ids_TK: Tensor) -> Iterator[None]:
        """Hold this routing until the context ends; an outer one goes on afterwards where it was."""
        outer = self.routed, self.read
        self.routed, self.read = (weights_TK, ids_TK), 0
        try:
            yield
        finally:
            self.routed, self.read = outer

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the weights and ids of the next `rows` tokens.

        Raises:
            RuntimeError: when this thread holds nothing, or fewer rows are left.
        """
        if self.routed is None:
            raise RuntimeError(
                "no routing is memoized on this thread: call inside `with layer._memoize(weights, ids):`"
            )
        weights, ids = self.routed
        start, end = self.read, self.read + rows
        if end > len(ids):
            raise RuntimeError(f"hidden_states asks for rows {start} to {end}, but only {len(ids)} rows were routed")
        self.read = end
        return weights[start:end], ids[start:end]
