"""A stand-in for as much of SGLang as our plug-in and the classes of SGLang's MoE layer touch, without its GPU runtime.

`installed(version, ...)` puts modules of SGLang's names into sys.modules. The layer that gets replaced is SGLang's own
source where `make sglang` has put it, else one that says the same of itself; what it is made of is restated here.
"""

from __future__ import annotations
import __future__

import importlib
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from helpers.paths import ROOT

FACTS: dict[str, Any] = json.loads((ROOT / "tests" / "tools" / "sglang_facts.json").read_text())
SOURCES = ROOT / ".venv" / "sglang"
OURS = tuple(f"zemoe.integrations.sglang{module}" for module in ("", ".plugin", ".layers"))


@dataclass
class Ranks:
    """Where a process is among others. sent: what it gave to be summed over ranks."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    all_to_all: bool = False
    quantized: bool = False
    sent: list[Tensor] = field(default_factory=list)


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class ReplicatedLinear(nn.Module):
    def __init__(self, input_size, output_size, bias, params_dtype, quant_config, prefix) -> None:
        super().__init__()
        assert not bias and quant_config is None
        self.bias = None
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=params_dtype), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class UnquantizedFusedMoEMethod:
    pass


class Fp8MoEMethod:
    pass


def fused_moe_class(ranks: Ranks) -> type[nn.Module]:
    """SGLang's experts: a share of the weights and of the sum. They write over their input, as SGLang's may."""

    class FusedMoE(nn.Module):
        runner_backend = "triton"

        def __init__(
            self, num_experts, top_k, layer_id, hidden_size, intermediate_size, quant_config=None, prefix=""
        ) -> None:
            super().__init__()
            self.moe_tp_rank, self.moe_tp_size = ranks.tp_rank, ranks.tp_size // ranks.ep_size
            self.moe_ep_rank, self.moe_ep_size = ranks.ep_rank, ranks.ep_size
            if ranks.ep_size > 1:
                self.moe_tp_rank = 0
            self.hidden_size = hidden_size
            self.num_local_experts = num_experts // ranks.ep_size
            self.intermediate_size_per_partition = intermediate_size // self.moe_tp_size
            self.quant_method = Fp8MoEMethod() if ranks.quantized else UnquantizedFusedMoEMethod()
            width = self.intermediate_size_per_partition
            dtype = torch.get_default_dtype()
            self.w13_weight: Any = nn.Parameter(
                torch.empty(self.num_local_experts, 2 * width, hidden_size, dtype=dtype), requires_grad=False
            )
            self.w2_weight: Any = nn.Parameter(
                torch.empty(self.num_local_experts, hidden_size, width, dtype=dtype), requires_grad=False
            )
            self.w13_weight.weight_loader = self.w2_weight.weight_loader = self.weight_loader

        def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id) -> None:
            width = self.intermediate_size_per_partition
            local = expert_id - self.moe_ep_rank * self.num_local_experts
            if not 0 <= local < self.num_local_experts:
                return
            part = slice(self.moe_tp_rank * width, (self.moe_tp_rank + 1) * width)
            if shard_id == "w2":
                param.data[local] = loaded_weight[:, part]
            else:
                rows = slice(0, width) if shard_id == "w1" else slice(width, 2 * width)
                param.data[local, rows] = loaded_weight[part]

        def forward(self, hidden_states: Tensor, topk_output: StandardTopKOutput) -> Tensor:
            output = torch.zeros_like(hidden_states)
            width = self.intermediate_size_per_partition
            assert (topk_output.topk_ids >= 0).all(), "SGLang's kernels take no id but an expert's"
            for t, (weights, ids) in enumerate(zip(topk_output.topk_weights, topk_output.topk_ids, strict=True)):
                for weight, expert in zip(weights, (ids - self.moe_ep_rank * self.num_local_experts), strict=True):
                    if 0 <= expert < self.num_local_experts:
                        gate, up = (self.w13_weight[expert] @ hidden_states[t]).split(width)
                        output[t] += weight * (self.w2_weight[expert] @ (nn.functional.silu(gate) * up))
            return hidden_states.copy_(output)

    return FusedMoE


class TopK(nn.Module):
    """SGLang's routing without groups or renormalising, where a selection bias only selects."""

    def __init__(self, top_k, renormalize, use_grouped_topk, correction_bias, layer_id) -> None:
        super().__init__()
        assert not renormalize and not use_grouped_topk
        self.top_k, self.bias = top_k, correction_bias

    def forward_native(self, hidden_states: Tensor, router_logits: Tensor) -> StandardTopKOutput:
        scores = router_logits.softmax(-1)
        ids = (scores + self.bias).topk(self.top_k).indices
        return StandardTopKOutput(scores.gather(1, ids), ids.to(torch.int32), router_logits)

    def bind_runner_backend(self, backend) -> None:
        pass


def zero_experts_compute_triton(expert_indices, expert_scales, num_experts, zero_expert_type, hidden_states) -> Tensor:
    """SGLang's kernel: the zero experts' sum; their choices become expert 0 with weight 0, in place."""
    zero = expert_indices >= num_experts
    result = (expert_scales * zero).sum(-1, keepdim=True) * hidden_states
    expert_indices[zero] = 0
    expert_scales[zero] = 0.0
    return result


LAYER = """
class LongcatFlashRouter(nn.Module):
    def __init__(self, config, prefix):
        super().__init__()
        slots = config.n_routed_experts + config.zero_expert_num
        self.classifier = ReplicatedLinear(config.hidden_size, slots, False, torch.float32, None, prefix)
        self.e_score_correction_bias = nn.Parameter(torch.zeros(slots))

    def forward(self, hidden_states):
        return self.classifier(hidden_states.float())[0]

class LongcatFlashMoE(nn.Module):
    def __init__(self, config, layer_id, quant_config=None, prefix=""):
        super().__init__()
        self.layer_id, self.tp_size = layer_id, get_tensor_model_parallel_world_size()
        self.num_experts, self.top_k = config.n_routed_experts, config.moe_topk
        self.zero_expert_num, self.zero_expert_type = config.zero_expert_num, config.zero_expert_type
        self.routed_scaling_factor = config.routed_scaling_factor
        self.router = LongcatFlashRouter(config, prefix)
        self.experts = get_moe_impl_class(quant_config)(
            self.num_experts, self.top_k, layer_id, config.hidden_size, config.moe_intermediate_size, quant_config
        )

    def forward(self, hidden_states):
        return "SGLang's own"
"""


def layer_source(version: str) -> str:
    path = SOURCES / f"{version}.py"
    return path.read_text() if path.exists() else LAYER


def modules(version: str, ranks: Ranks) -> dict[str, types.ModuleType]:
    fused_moe = fused_moe_class(ranks)
    deep_ep = type("DeepEPMoE", (fused_moe,), {})
    backend = SimpleNamespace(is_none=lambda: not ranks.all_to_all)
    parallel = SimpleNamespace(tp_size=ranks.tp_size, tp_rank=ranks.tp_rank)

    def all_reduce(tensor: Tensor) -> Tensor:
        ranks.sent.append(tensor.clone())
        return tensor

    longcat: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "ReplicatedLinear": ReplicatedLinear,
        "TopK": TopK,
        "StandardTopKOutput": StandardTopKOutput,
        "zero_experts_compute_triton": zero_experts_compute_triton,
        "get_moe_impl_class": lambda quant_config: deep_ep if ranks.all_to_all else fused_moe,
        "add_prefix": lambda name, prefix: f"{prefix}.{name}",
        "get_tensor_model_parallel_world_size": lambda: ranks.tp_size,
        "get_parallel": lambda: parallel,
        "get_exec": lambda: SimpleNamespace(moe=SimpleNamespace(ep_dispatch_algorithm=None)),
        "_LONGCAT_FLASH_ROUTER_HPC_GEMM_MIN_M": {},
    }
    if FACTS[version]["layer sums over ranks"]:
        longcat["tensor_model_parallel_all_reduce"] = all_reduce
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.version": {"__version__": version},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": registry(),
            "HookType": SimpleNamespace(REPLACE="replace", AFTER="after"),
        },
        "sglang.srt.models": {},
        "sglang.srt.models.longcat_flash": longcat,
        "sglang.srt.layers": {},
        "sglang.srt.layers.moe": {},
        "sglang.srt.layers.moe.topk": {"StandardTopKOutput": StandardTopKOutput},
        "sglang.srt.layers.moe.utils": {"get_moe_a2a_backend": lambda: backend},
        "sglang.srt.layers.moe.fused_moe_triton": {},
        "sglang.srt.layers.moe.fused_moe_triton.layer": {"FusedMoE": fused_moe},
    }
    made_modules = {}
    for name, content in contents.items():
        module = made_modules[name] = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(content)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made_modules[parent], last, module)
    code = compile(layer_source(version), f"sglang-{version}", "exec", __future__.annotations.compiler_flag)
    exec(code, vars(made_modules["sglang.srt.models.longcat_flash"]))
    return made_modules


def registry() -> Any:
    """What HookRegistry does with a class that replaces another, and with a function to be called after another."""
    hooks: dict[str, tuple[Any, str]] = {}

    def register(target, hook, hook_type="after", *, source=None) -> None:
        hooks[target] = hook, hook_type

    def apply_hooks() -> None:
        for target, (hook, hook_type) in hooks.items():
            owner, _, name = target.rpartition(".")
            wrapped = hook
            if hook_type == "after":
                module, _, cls = owner.rpartition(".")
                owner = getattr(sys.modules[module], cls)
                wrapped = called_after(getattr(owner, name), hook)
            setattr(owner if isinstance(owner, type) else sys.modules[owner], name, wrapped)

    return SimpleNamespace(register=register, apply_hooks=apply_hooks, hooks=hooks)


def called_after(function: Any, hook: Any) -> Any:
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        found = hook(result, *args, **kwargs)
        return result if found is None else found

    return wrapper


@contextmanager
def installed(version: str, ranks: Ranks | None = None) -> Iterator[types.ModuleType]:
    """The modules are there, our plug-in has been called and SGLang's hooks applied; yields longcat_flash."""
    before = dict(sys.modules)
    made = modules(version, ranks or Ranks())
    sys.modules |= made
    try:
        importlib.import_module("zemoe.integrations.sglang").register()
        made["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()
        yield made["sglang.srt.models.longcat_flash"]
    finally:
        for name in [*made, *OURS]:
            sys.modules.pop(name, None)
        sys.modules |= {name: module for name, module in before.items() if name in made}
