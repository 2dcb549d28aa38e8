"""vLLM's LongCat-Flash models with our MoE layer in them: what `plugin.py` registers.

All MoE layers of a model are of one kind, and `moe_layers` looks at the whole configuration before anything is built.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import vllm.envs as envs
from torch import Tensor
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.models import longcat_flash
from vllm.model_executor.models.longcat_flash import LongcatFlashForCausalLM
from vllm.model_executor.models.longcat_flash_ngram import LongcatFlashNgramForCausalLM
from vllm.platforms import current_platform

from ..._version import __version__
from ...backends import resolve_backend
from .layers import UnsupportedExpertsError, ZeroExpertLongcatMoE, ZeroExpertLongcatMoEAroundTheirs
from .plugin import logger

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_ROTARY = "rotary_embedding"


def why_not(vllm_config: Any) -> str | None:
    """Why a model with this VllmConfig keeps vLLM's own MoE layers, or None."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config, ranks = model.hf_config, parallel.tensor_parallel_size
    width = getattr(config, "moe_intermediate_size", None) or getattr(config, "expert_ffn_hidden_size", None)
    spread = parallel.enable_expert_parallel and ranks * parallel.data_parallel_size > 1
    checks = {
        "LoRA adapters are enabled": vllm_config.lora_config is not None,
        "expert load balancing is enabled": parallel.enable_eplb,
        "vLLM's experts for CPUs can't be spread over ranks": spread and current_platform.is_cpu(),
        f"tokens travel between ranks by {parallel.all2all_backend}": spread
        and parallel.data_parallel_size > 1
        and parallel.all2all_backend != "allgather_reducescatter",
        "prefill context parallelism is enabled": parallel.prefill_context_parallel_size > 1,
        "VLLM_BATCH_INVARIANT is set": envs.VLLM_BATCH_INVARIANT,
        "the experts chosen are asked for (enable_return_routed_experts)": getattr(
            model, "enable_return_routed_experts", False
        ),
        f"zero_expert_type is {config.zero_expert_type!r}": config.zero_expert_type != "identity",
        "the router has a bias": getattr(config, "router_bias", False),
        f"{width} columns of an expert don't divide among {ranks} ranks": not width or width % ranks,
        f"there is no path for {current_platform.device_name}": not (
            current_platform.is_cpu() or current_platform.is_cuda()
        ),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def why_their_experts(vllm_config: Any) -> str | None:
    """Why vLLM's own experts compute the FFN experts' part in a model that is not left to vLLM, or None."""
    model, parallel, quantised = vllm_config.model_config, vllm_config.parallel_config, vllm_config.quant_config
    if quantised is not None:
        return f"the model is quantised ({quantised.get_name()})"
    if parallel.enable_expert_parallel:
        return "expert parallelism is enabled"
    if parallel.data_parallel_size > 1:
        return "data parallelism is enabled"
    try:
        backend = _backend(vllm_config)
    except ValueError as error:
        return str(error)
    if current_platform.is_cuda() and backend != "triton":  # the others wait for the device
        return f"zemoe's kernels for {current_platform.device_name} don't take {model.dtype}"
    return None


def _backend(vllm_config: Any) -> str:
    model = vllm_config.model_config
    experts = model.hf_config.n_routed_experts
    return resolve_backend(current_platform.device_type, model.dtype, num_experts=experts).name


@contextmanager
def moe_layers(vllm_config: Any) -> Iterator[None]:
    """The context to build a LongCat model in: its MoE layers are ours, or ours around vLLM's experts, or vLLM's own.

    One line in the log says which, and why where they are not all ours.
    """
    reason = why_not(vllm_config)
    if reason is not None:
        _say("vLLM's own MoE layers: %s", reason)
        yield
        return
    reason = why_their_experts(vllm_config)
    ours = ZeroExpertLongcatMoE if reason is None else ZeroExpertLongcatMoEAroundTheirs
    _keep_apart_when_compiled(vllm_config)
    _mend_rotary_embedding(vllm_config)
    stock = longcat_flash.LongcatMoe
    longcat_flash.LongcatMoe = ours
    try:
        yield
    finally:
        longcat_flash.LongcatMoe = stock
    if reason is not None:
        _say("MoE layers with routing and zero experts by zemoe, FFN experts by vLLM: %s", reason)
    else:
        _say(
            "zemoe's MoE layers: unquantised %s, tensor parallel %d, backend %r",
            vllm_config.model_config.dtype,
            vllm_config.parallel_config.tensor_parallel_size,
            _backend(vllm_config),
        )


def construct(build: Callable[[], None], vllm_config: Any) -> None:
    """Run a model's constructor in `moe_layers`, and once more without, where vLLM's experts turn out not to fit.

    Which experts vLLM makes is known only when it has made the first layer's; they are forgotten then, with all that
    vLLM has noted of them.
    """
    compilation, additional = vllm_config.compilation_config, vllm_config.additional_config
    layers, moe_layer_names = dict(compilation.static_forward_context), list(compilation.static_all_moe_layers)
    try:
        with moe_layers(vllm_config):
            build()
        return
    except UnsupportedExpertsError as error:
        reason = str(error)
    vllm_config.additional_config = additional
    compilation.static_forward_context.clear()
    compilation.static_forward_context.update(layers)
    compilation.static_all_moe_layers[:] = moe_layer_names
    gc.collect()  # a layer's memory: parameters and their loaders refer to each other
    _say("vLLM's own MoE layers: %s", reason)
    build()


def _say(what: str, *values: Any) -> None:
    if get_world_group().is_first_rank:
        logger.info("zemoe %s: this LongCat model has " + what, __version__, *values)


def _keep_apart_when_compiled(vllm_config: Any) -> None:
    """Make vLLM keep compiled code of our layers apart: it looks that up on disk by configuration, not by layers."""
    known = vllm_config.additional_config
    if isinstance(known, dict):
        vllm_config.additional_config = {**known, "zemoe": __version__}


def _mend_rotary_embedding(vllm_config: Any) -> None:
    """On CPUs use torch's rotary embedding: vLLM's kernel rotates only the first head of 3-D queries."""
    custom_ops = vllm_config.compilation_config.custom_ops
    if current_platform.is_cpu() and not {f"+{_ROTARY}", f"-{_ROTARY}"} & set(custom_ops):
        custom_ops.append(f"-{_ROTARY}")


def without_dead_rows(weights: Iterable[tuple[str, Tensor]], num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """Leave out a checkpoint's tensors of zero experts, which transformers saves and nothing reads."""
    for name, tensor in weights:
        expert = _EXPERT.search(name)
        if expert is None or int(expert[1]) < num_experts:
            yield name, tensor


def _loadable(model: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    layers = (ZeroExpertLongcatMoE, ZeroExpertLongcatMoEAroundTheirs)
    ours = any(isinstance(module, layers) for module in model.modules())
    return without_dead_rows(weights, model.config.n_routed_experts) if ours else weights


class ZeroExpertLongcatFlashForCausalLM(LongcatFlashForCausalLM):
    """LongCat-Flash."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        build = super().__init__
        construct(lambda: build(vllm_config=vllm_config, prefix=prefix), vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_loadable(self, weights))


class ZeroExpertLongcatFlashNgramForCausalLM(LongcatFlashNgramForCausalLM):
    """LongCat-Flash-Lite, with n-gram embeddings."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        build = super().__init__
        construct(lambda: build(vllm_config=vllm_config, prefix=prefix), vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_loadable(self, weights))
