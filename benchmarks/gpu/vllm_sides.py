"""LongCat's MoE layer in vLLM's own module tree, for gpu_vllm.py: vLLM's and ours, made and loaded as vLLM does it.

T tokens, H hidden size, I expert width, E FFN experts, A slots (E and the zero experts).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.scheduler import SchedulerConfig
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.longcat_flash import LongcatMoe
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.workspace import init_workspace_manager

from zemoe.bench.cases import Case
from zemoe.integrations.vllm.layers import ZeroExpertLongcatMoE, ZeroExpertLongcatMoEAroundTheirs
from zemoe.layer import MoE

# The first is vLLM's own.
MODULES = {"vllm": LongcatMoe, "zemoe": ZeroExpertLongcatMoE, "around": ZeroExpertLongcatMoEAroundTheirs}
_BIAS = 0.3  # of a mean score, 1 / A: it changes what is chosen and leaves about a third to the zero experts
_SEED = 1


@contextmanager
def engine(most_tokens: int, device: torch.device) -> Iterator[VllmConfig]:
    """What vLLM's worker sets up before it builds a model: configuration, one rank, workspace."""
    scheduler = SchedulerConfig.default_factory(max_num_batched_tokens=most_tokens, max_model_len=most_tokens)
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode="NONE")
    config = VllmConfig(scheduler_config=scheduler, compilation_config=compilation)
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, current_platform.dist_backend)
        initialize_model_parallel()
        init_workspace_manager(device)
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


class Layers:
    """One layer as several modules on the same weights: `sides` by name, and `known`, which the reference looks at."""

    def __init__(self, case: Case, config: VllmConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        longcat = SimpleNamespace(
            hidden_size=case.hidden_size,
            n_routed_experts=case.num_experts,
            zero_expert_num=case.num_zero_experts,
            zero_expert_type="identity",
            routed_scaling_factor=case.routed_scaling_factor,
            router_dtype="float32",
            router_bias=False,
        )
        sizes = (longcat, case.num_experts, case.top_k, case.hidden_size, case.intermediate_size)
        self.sides: dict[str, nn.Module] = {}
        with set_default_torch_dtype(dtype):
            for name, module in MODULES.items():
                with torch.device("meta") if self.sides else device:
                    self.sides[name] = module(*sizes, prefix=f"{case.name}.{name}")
            with torch.device("meta"):
                self.known = MoE(case.config, dtype=dtype)
        first, *others = self.sides.values()
        self._load(first)
        for other in others:
            self._share(first, other)
        for side in self.sides.values():
            side.requires_grad_(False)
            process_weights_after_loading(side, SimpleNamespace(dtype=dtype, quantization=None), device)
        experts = first.experts.routed_experts
        self.known.w13, self.known.w2 = experts.w13_weight, experts.w2_weight
        self.known.router.classifier.weight = first.router.classifier.weight
        self.known.router.register_buffer("e_score_correction_bias", first.router.e_score_correction_bias.data)
        self.known.requires_grad_(False)

    def _experts(self) -> Iterator[tuple[int, str, Tensor]]:
        """(expert, shard, matrix) of all experts, the same at each call; products keep the size of what comes in."""
        generator = torch.Generator(self.device).manual_seed(_SEED)
        H, width = self.case.hidden_size, self.case.intermediate_size
        for expert in range(self.case.num_experts):
            for shard, shape in (("w1", (width, H)), ("w3", (width, H)), ("w2", (H, width))):
                matrix = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
                yield expert, shard, matrix.mul_(shape[1] ** -0.5)

    def _load(self, layer: nn.Module) -> None:
        """Fill a layer by its own weight loaders, as the model's `load_weights` calls them."""
        params = dict(layer.named_parameters())
        A, H = self.case.config.num_slots, self.case.hidden_size
        generator = torch.Generator(self.device).manual_seed(_SEED - 1)
        classifier = torch.randn(A, H, generator=generator, device=self.device) * H**-0.5
        bias = torch.randn(A, generator=generator, device=self.device) * (_BIAS / A)
        for name, tensor in (("router.classifier.weight", classifier), ("router.e_score_correction_bias", bias)):
            getattr(params[name], "weight_loader", default_weight_loader)(params[name], tensor)
        for expert, shard, matrix in self._experts():
            name = "experts.routed_experts." + ("w2_weight" if shard == "w2" else "w13_weight")
            param = params[name]
            if not param.weight_loader(param, matrix, name, shard_id=shard, expert_id=expert, return_success=True):
                raise AssertionError(f"{type(layer).__name__} did not take {shard} of expert {expert}")

    def _share(self, first: nn.Module, other: nn.Module) -> None:
        """Give `other` the storage of the experts of `first`, and see that its own loader writes the same into it."""
        weights = [getattr(first.experts.routed_experts, name) for name in ("w13_weight", "w2_weight")]
        for name, weight in zip(("w13_weight", "w2_weight"), weights, strict=True):
            _place(other.experts.routed_experts, name, weight.data)
        _place(other.router.classifier, "weight", torch.empty_like(first.router.classifier.weight))
        _place(other.router, "e_score_correction_bias", torch.empty_like(first.router.e_score_correction_bias))
        loaded = [_row_sums(weight) for weight in weights]
        for weight in weights:
            weight.data.fill_(float("nan"))
        self._load(other)
        if not all(map(torch.equal, loaded, map(_row_sums, weights))):
            raise AssertionError(f"the weight loaders of vLLM and of {type(other).__name__} do different things")


def _place(module: nn.Module, name: str, data: Tensor) -> None:
    """Put `data` in a parameter's place; what vLLM hung on it, its loader, stays."""
    placed = nn.Parameter(data, requires_grad=False)
    vars(placed).update(vars(getattr(module, name)))
    setattr(module, name, placed)


def _row_sums(weight: Tensor) -> Tensor:
    """[E, rows], of the bits, so that rows in another order or at another expert show."""
    # One expert at a time: torch converts all of what it sums to int64 first.
    return torch.stack([expert.view(torch.int16).sum(-1, dtype=torch.int64) for expert in weight.data])


@support_torch_compile(dynamic_arg_dims={"hidden_states": 0})
class Compiled(nn.Module):
    """A layer as vLLM compiles it: its own backend, once for all numbers of tokens."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer(hidden_states)
