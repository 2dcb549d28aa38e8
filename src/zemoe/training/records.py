"""What a record of a training run says about routing.

E FFN experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..statistics import RoutingTally


def routing_record(tally: RoutingTally, biases: Mapping[str, Tensor], num_experts: int) -> dict[str, Any]:
    """FFN experts a token, zero share and load, over all layers and `by_layer`, with its biases; read to the host.

    biases: by layer, the selection bias [A]. num_experts: E.
    """
    seen = tally.statistics(biases=biases).to_dict()
    zero_means = dict.fromkeys(biases)
    if any(len(bias) > num_experts for bias in biases.values()):
        means = torch.stack([bias[num_experts:].mean() for bias in biases.values()]).tolist()
        zero_means = dict(zip(biases, means, strict=True))
    by_layer = [
        {
            "ffn_experts": layer["ffn_mean"],
            "ffn_experts_std": layer["ffn_std"],
            "zero_share": layer["zero_share"],
            "max_over_mean_load": layer["max_load"],
            "dead_experts": len(layer["dead_experts"]),
            "bias_ffn_mean": layer["bias_mean"],
            "bias_zero_mean": zero_means[name],
            "bias_min": layer["bias_min"],
            "bias_max": layer["bias_max"],
        }
        for name, layer in seen["layers"].items()
    ]
    return {
        "ffn_experts": seen["ffn_mean"],
        "ffn_experts_std": seen["ffn_std"],
        "zero_share": seen["zero_share"],
        "max_over_mean_load": seen["max_load"],
        "dead_experts": seen["dead_experts"],
        "by_layer": by_layer,
    }
