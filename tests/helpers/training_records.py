"""Records of a made-up training run, as zemoe.training.run.train hands them to its listener."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

K = 6


def run(**changes: Any) -> dict[str, Any]:
    sizes = {"parameters": 7_900_000, "active_parameters": 5_100_000, "k_e": 4.0, "choices": K, "layers": 2}
    slots = {"ffn_slots": 16, "zero_slots": 8, "device": "cpu", "dtype": "float32", "world": 1, "versions": {}}
    text = {"tokens_per_step": 512, "train_tokens": 12_345, "heldout_tokens": 678}
    return {"kind": "run", "step": 0, "steps": 40} | sizes | slots | text | changes


def train(step: int, **changes: Any) -> dict[str, Any]:
    """The loss falls from 5 to 3, FFN experts a token from 6 to 4, a layer's share of zero choices grows with both."""
    part = step / 40
    ffn = 6 - 2 * part
    loads = {"max_over_mean_load": 1.5, "dead_experts": 0}
    layers = [
        {"ffn_experts": ffn + shift, "ffn_experts_std": 0.5, "zero_share": 1 - (ffn + shift) / K}
        | loads
        | {"bias_ffn_mean": -part, "bias_zero_mean": 0.0, "bias_min": -part - 0.1, "bias_max": -part + 0.5 + shift}
        for shift in (0.25, -0.25)
    ]
    loss = {"loss": 5 - 2 * part, "bits_per_byte": 2 - part, "balance_loss": 1.1, "grad_norm": 0.75}
    speed = {"tokens": 512 * step, "learning_rate": 3e-4, "tokens_per_s": 3210.9}
    experts = {"ffn_experts": ffn, "ffn_experts_std": 0.9, "zero_share": 1 - ffn / K, **loads, "by_layer": layers}
    return {"kind": "train", "step": step} | loss | speed | experts | changes


def evaluation(step: int, best: bool, bits: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "heldout_loss": 2 * bits, "heldout_bits_per_byte": bits, "best": best}


def end(step: int = 40, **changes: Any) -> dict[str, Any]:
    best = {"best_step": 20, "best_heldout_bits_per_byte": 1.625, "start_is_best": False}
    return {"kind": "end", "step": step, "reason": "finished", "seconds": 65.0, "export": "out/export"} | best | changes


def whole() -> Iterator[dict[str, Any]]:
    yield run()
    for step in (10, 20, 30, 40):
        yield train(step)
        if step % 20 == 0:
            yield evaluation(step, best=step == 20, bits=1.625 if step == 20 else 1.75)
            yield {"kind": "saved", "step": step, "path": f"out/states/step-{step:08d}"}
    yield end()
