"""One rank of the tests with sharded weights; arguments: rank, port, checkpoint, result, "tp_size" or "fsdp_size".

Rank 0 writes logits and, under tensor parallelism, gradients of what every rank holds in full, to the result file.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import LongcatFlashForCausalLM
from transformers.distributed import DistributedConfig

from transformers_tiny import tiny_ids
from zemoe.integrations.transformers import applied


def main(rank: str, port: str, checkpoint: str, result: str, plan: str) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with applied():
        config = DistributedConfig(**{plan: 2})
        model = LongcatFlashForCausalLM.from_pretrained(checkpoint, distributed_config=config, dtype=torch.float32)
    logits = model(tiny_ids()).logits
    layer = model.model.layers[0]
    found = {
        "logits": logits.detach(),
        "class": type(layer.mlp.experts).__name__,
        "local_gate_up": tuple(layer.mlp.experts.gate_up_proj.to_local().shape),
    }
    if plan == "tp_size":
        logits.square().mean().backward()
        found["router"] = layer.mlp.router.classifier.weight.grad
        found["norm"] = layer.post_attention_layernorm[0].weight.grad
    if rank == "0":
        torch.save(found, result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
