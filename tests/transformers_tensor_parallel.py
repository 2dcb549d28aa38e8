"""One rank of the tensor-parallel test; arguments: rank, ranks, port, checkpoint, result, and "ours" or "stock".

Rank 0 writes logits, and gradients of what every rank holds in full, to the result file.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import torch
from transformers import LongcatFlashForCausalLM
from transformers.distributed import DistributedConfig

from transformers_tiny import tiny_ids
from zemoe.integrations.transformers import applied


def main(rank: str, world: str, port: str, checkpoint: str, result: str, layers: str) -> None:
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with applied() if layers == "ours" else nullcontext():
        model = LongcatFlashForCausalLM.from_pretrained(
            checkpoint, distributed_config=DistributedConfig(tp_size=int(world)), dtype=torch.float32
        )
    experts = model.model.layers[0].mlp.experts
    ids = tiny_ids()
    logits = model(ids).logits
    logits.square().mean().backward()
    if rank == "0":
        torch.save(
            {
                "logits": logits.detach(),
                "router": model.model.layers[0].mlp.router.classifier.weight.grad,
                "norm": model.model.layers[0].post_attention_layernorm[0].weight.grad,
                "local_gate_up": tuple(experts.gate_up_proj.to_local().shape),
                "class": type(experts).__name__,
            },
            result,
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
