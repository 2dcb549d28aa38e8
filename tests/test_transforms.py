"""torch.vmap and torch.func's transforms: refused with a sentence, where a layer would lose gradients without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from zemoe import FusedMoE, MoE, MoEConfig, fused_experts, select_experts

H, E, K = 8, 4, 2
NO_VMAP = "do not run under torch.vmap; give them the whole batch"
NO_FUNC = "take no part in torch.func.grad, vjp or jacrev; use backward"
NO_FORWARD = "have no forward-mode derivative; use backward"
X = torch.randn(3, 5, H, generator=torch.Generator().manual_seed(0))


def layer(backend: str | None) -> MoE:
    torch.manual_seed(1)
    kinds = (("identity", 2), ("constant", 1))
    return MoE(
        MoEConfig(hidden_size=H, intermediate_size=4, num_experts=E, top_k=K, zero_expert_kinds=kinds),
        backend=backend,
        init_std=0.3,
    )


def loss(moe: MoE) -> Callable[..., Tensor]:
    return lambda weights, x: functional_call(moe, weights, (x,)).square().sum()


def an_ensemble(moe: MoE, weights: dict[str, Tensor]) -> None:
    stacked, buffers = stack_module_state([moe, moe])
    vmap(lambda w, b, x: functional_call(moe, (w, b), (x,)), in_dims=(0, 0, None))(stacked, buffers, X)


TRANSFORMS: dict[str, tuple[Callable[[MoE, dict[str, Tensor]], object], str]] = {
    "vmap": (lambda moe, w: vmap(moe)(X), NO_VMAP),
    "vmap of the router": (lambda moe, w: vmap(moe.router)(X), NO_VMAP),
    "vmap over layers": (an_ensemble, NO_VMAP),
    "gradients a sample": (lambda moe, w: vmap(grad(loss(moe)), in_dims=(None, 0))(w, X), NO_VMAP),
    "grad": (lambda moe, w: grad(loss(moe))(w, X), NO_FUNC),
    "vjp": (lambda moe, w: vjp(moe, X), NO_FUNC),
    "jacrev": (lambda moe, w: jacrev(moe)(X), NO_FUNC),
    "hessian": (lambda moe, w: hessian(lambda x: moe(x).sum())(X), NO_FUNC),
    "jvp in x": (lambda moe, w: jvp(moe, (X,), (X,)), NO_FORWARD),
    "jvp in the weights": (lambda moe, w: jvp(lambda v: functional_call(moe, v, (X,)), (w,), (w,)), NO_FORWARD),
    "jacfwd": (lambda moe, w: jacfwd(moe)(X), NO_FORWARD),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_layer_refuses(transform, backend, gradients):
    moe = layer(backend)
    run, words = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match=words), torch.set_grad_enabled(gradients):
        run(moe, {name: parameter.detach() for name, parameter in moe.named_parameters()})


def test_layers_from_logits_and_functions_refuse():
    moe = FusedMoE(E, K, H, 4)
    with pytest.raises(RuntimeError, match=NO_VMAP):
        vmap(moe)(X, torch.randn(3, 5, E))
    with pytest.raises(RuntimeError, match=NO_VMAP):
        vmap(lambda logits: select_experts(logits, K, num_experts=E))(torch.randn(3, 5, E))
    w13, w2 = torch.randn(E, 8, H), torch.randn(E, H, 4)
    given = {"num_experts": E, "zero_expert_kinds": ()}
    with pytest.raises(RuntimeError, match=NO_VMAP):
        weights, ids = torch.rand(3, 5, K), torch.zeros(3, 5, K, dtype=torch.int64)
        vmap(lambda x, w, i: fused_experts(x, w13, w2, w, i, **given))(X, weights, ids)


def test_compiled_code_refuses():
    """Nothing can look at a tensor while it is traced; there the operators refuse."""
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=NO_VMAP):
        torch.compile(vmap(layer(None)), backend="eager")(X)


OPERATORS = ["topk_ids", "select_few", "plan", "moe_ffn", "moe_ffn_from_ids", "moe_ffn_few", "plan_tiles"]
OPERATORS += ["moe_ffn_tiles", "moe_ffn_tiles_train", "select_experts"]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_choose_or_compute_a_layer_refuse(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zemoe::{name}", "FuncTorchBatched")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_many_gradients_at_once_are_right(backend):
    """torch.autograd.grad(is_grads_batched=True) runs a backward under vmap, and that is one of plain operators."""
    moe, seeds = layer(backend), torch.randn(4, 3, 5, H, generator=torch.Generator().manual_seed(2))
    x = X.clone().requires_grad_()
    inputs = [x, moe.w13, moe.router.classifier.weight]
    together = torch.autograd.grad(moe(x), inputs, seeds, is_grads_batched=True)
    for i, seed in enumerate(seeds):
        for batch, alone in zip(together, torch.autograd.grad(moe(x), inputs, seed), strict=True):
            torch.testing.assert_close(batch[i], alone, rtol=1e-5, atol=1e-6)


def test_a_layer_beside_a_transform_runs():
    moe = layer(None)
    scaled = vmap(lambda scale: moe(X) * scale)(torch.arange(3.0))
    assert torch.equal(scaled[2], 2 * moe(X))
