"""One rank of the tests with sharded weights; arguments: rank, port, checkpoint, result, and which of PLANS.

Rank 0 writes logits and, under tensor parallelism, gradients of what every rank holds in full, to the result file.
"""

from __future__ import annotations

import gc
import os
import sys

import torch
from torch.distributed.tensor import DTensor
from transformers import LongcatFlashForCausalLM
from transformers.distributed import DistributedConfig

from helpers.transformers_tiny import tiny_ids
from zemoe.integrations.transformers import EP_PLAN, applied

PLANS = {
    "tp_size": {"tp_size": 2},
    "fsdp_size": {"fsdp_size": 2},
    "experts": {"tp_size": 2, "ep_size": 2, "ep_plan": EP_PLAN},  # attention and dense layers by tensor parallelism
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank: transformers 5.19 keeps parameters of a mesh as DTensors, and so their gradients."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def main(rank: str, port: str, checkpoint: str, result: str, plan: str) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with applied():
        config = DistributedConfig(**PLANS[plan])
        model = LongcatFlashForCausalLM.from_pretrained(checkpoint, distributed_config=config, dtype=torch.float32)
    logits = model(tiny_ids()).logits
    with torch.no_grad():
        without = model(tiny_ids()).logits
    layer = model.model.layers[0]
    found = {
        "logits": whole(logits),
        "logits without gradients": whole(without),
        "class": type(layer.mlp.experts).__name__,
        "local_gate_up": tuple(layer.mlp.experts.gate_up_proj.to_local().shape),
    }
    if plan != "fsdp_size":
        logits.square().mean().backward()
        found["router"] = whole(layer.mlp.router.classifier.weight.grad)
        found["norm"] = whole(layer.post_attention_layernorm[0].weight.grad)
    if rank == "0":
        torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    gc.collect()  # as in ranks.as_rank
    torch.distributed.destroy_process_group()
