"""A case of the judge, computed by a backend and by the reference, with gradients."""

from __future__ import annotations

import torch

from helpers.judge import Case
from zemoe import AffineParams, fused_experts

LEAVES = ("x", "w13", "w2", "weights", "constant_router", "constant_value", "scale")


def run(case: Case, inputs, backend: str | None = None, **kwargs) -> torch.Tensor:
    return fused_experts(
        *inputs[:5],
        num_experts=case.E,
        zero_expert_kinds=case.kinds,
        affine_params=inputs.affine,
        backend=backend,
        **kwargs,
    )


def gradients(case: Case, dtype: torch.dtype, compute, seed: int = 5) -> dict[str, torch.Tensor]:
    """The gradients of a fixed random functional of `compute(inputs)` with respect to everything that has one."""
    inputs = case.inputs()
    affine = AffineParams() if inputs.affine is None else inputs.affine
    leaves = dict(zip(LEAVES, (inputs.x_TH, inputs.w13, inputs.w2, inputs.weights_TK, *affine), strict=True))
    for name, leaf in leaves.items():
        if leaf is not None:
            # In the test's dtype first, so that all sides differentiate the same numbers.
            rounded = leaf.to(dtype if name in ("x", "w13", "w2") else torch.float32)
            leaves[name] = rounded.to(rounded.dtype if compute.dtype is None else compute.dtype).requires_grad_()
    inputs = inputs._replace(
        x_TH=leaves["x"],
        w13=leaves["w13"],
        w2=leaves["w2"],
        weights_TK=leaves["weights"],
        affine=None if inputs.affine is None else AffineParams(*(leaves[name] for name in LEAVES[4:])),
    )
    out = compute(inputs)
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out.backward(seeds.to(out.dtype))
    grads = {}
    for name, leaf in leaves.items():
        if leaf is not None:
            grads[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return grads


class Reference:
    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype

    def __call__(self, inputs):
        return self.case.reference(inputs, self.dtype)
