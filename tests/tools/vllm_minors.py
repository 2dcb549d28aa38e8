"""What the plug-in leans on, in the sources of several vLLM versions, which are read and not run.

    python tests/tools/vllm_minors.py SOURCE...

A source is a wheel, or a folder with a vllm package; `make vllm-minors` fetches them.

Prints a line a source; exits with 1 where something is missing.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from pathlib import Path

ARGUMENTS = ["self", "config", "num_experts", "top_k", "hidden_size", "intermediate_size"]
ARGUMENTS += ["params_dtype", "quant_config", "prefix", "enable_eplb"]
# Of the function that makes vLLM's experts: what we give it, and what keeps off what we don't want.
EXPERTS = {"num_experts", "top_k", "hidden_size", "intermediate_size", "params_dtype", "renormalize", "quant_config"}
EXPERTS |= {"prefix", "custom_routing_function", "router_logits_dtype"}
OFF = {"enable_eplb": "False", "is_sequence_parallel": "False", "zero_expert_type": "None", "scoring_func": "'softmax'"}
# File, and what must be in it.
FACTS = {
    "model_executor/models/longcat_flash.py": (
        r"self\.mlp = LongcatMoe\(",
        r"class LongcatFlashForCausalLM\(",
        r"success = weight_loader\(\s*param,\s*loaded_weight,\s*name_mapped,\s*shard_id=\w+,\s*expert_id=expert_id,"
        r"\s*return_success=True",
        r"fused_moe_make_expert_params_mapping\(",
        r"e_score_correction_bias",
    ),
    "model_executor/models/longcat_flash_ngram.py": (
        r"class FlashNgramModel\(FlashModel\)",
        r"class LongcatFlashNgramForCausalLM\(",
    ),
    "model_executor/models/longcat_flash_mtp.py": (r'"n_routed_experts", None',),  # a draft model has no MoE layer
    "model_executor/layers/fused_moe/routed_experts.py": (
        r'routed_experts_prefix: str = "routed_experts"',
        r"self\.quant_method = ",
    ),
    "model_executor/layers/fused_moe/layer.py": (r"custom_routing_function=custom_routing_function,",),
    "model_executor/layers/fused_moe/__init__.py": (r'"FusedMoE(Factory)?",',),
    "model_executor/layers/fused_moe/router/custom_routing_router.py": (
        r"self\.custom_routing_function\(\s*hidden_states=hidden_states,\s*gating_output=router_logits,"
        r"\s*topk=self\.top_k,\s*renormalize=self\.renormalize,\s*\)",
        r"return RoutingMethodType\.Custom\n",  # which no experts take that choose by themselves
    ),
    "model_executor/layers/fused_moe/fused_moe_method_base.py": (r"def is_monolithic\(",),
    # Experts pad what they are given, give back the sum over ranks, and choose by router_logits as they came.
    "model_executor/layers/fused_moe/runner/moe_runner.py": (
        r"def forward\(\s*self,\s*hidden_states: torch\.Tensor,\s*router_logits: torch\.Tensor,",
        r"hidden_states = F\.pad\(",
        r"states = tensor_model_parallel_all_reduce\(states\)",
        r"result = self\._maybe_reduce_final_output\(|return self\._maybe_reduce_final_output\(",
        r"self\.router\.select_experts\(\s*hidden_states=hidden_states,\s*router_logits=router_logits,",
    ),
    "model_executor/models/registry.py": (
        r'"LongcatFlashForCausalLM": \(\s*"longcat_flash"',
        r'"LongcatFlashNgramForCausalLM": \(\s*"longcat_flash_ngram"',
        r"def register_model\(\s*self,\s*model_arch: str,",
    ),
    "model_executor/utils.py": (r"def set_weight_attrs\(",),
    "config/compilation.py": (
        r"    static_forward_context: dict\[str, Any\] = ",
        r"    static_all_moe_layers: list\[str\] = ",
    ),
    "model_executor/layers/rotary_embedding/base.py": (r'@CustomOp\.register\("rotary_embedding"\)',),
    "distributed/parallel_state.py": (
        r"def get_world_group\(",
        r"def is_first_rank\(",
        r"def get_tensor_model_parallel_rank\(",
    ),
    "distributed/communication_op.py": (r"def tensor_model_parallel_all_reduce\(",),
    "plugins/__init__.py": (r'"vllm\.general_plugins"',),
    "config/vllm.py": (r"additional_config: dict", r"additional_config_hash", r"lora_config: ", r"quant_config: "),
    "config/parallel.py": (
        r"tensor_parallel_size: ",
        r"enable_expert_parallel: ",
        r"data_parallel_size: ",
        r"prefill_context_parallel_size: ",
        r"enable_eplb: bool",
        r'all2all_backend: All2AllBackend = "allgather_reducescatter"',
    ),
    "envs.py": (r"VLLM_BATCH_INVARIANT: bool",),
    "platforms/interface.py": (r"def is_cpu\(", r"def is_cuda\(", r"device_name: str", r"device_type: str"),
}


def missing(folder: Path | zipfile.Path) -> list[str]:
    """What the plug-in needs and this version does not have."""
    found = []
    for name, patterns in FACTS.items():
        path = folder / "vllm" / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found += [f"{name}: {pattern}" for pattern in patterns if not re.search(pattern, text)]
    layer = _named(folder / "vllm/model_executor/models/longcat_flash.py", "LongcatMoe")
    init = next(node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = [argument.arg for argument in init.args.args]
    if arguments != ARGUMENTS:
        found.append(f"LongcatMoe takes {arguments}")
    layer = folder / "vllm/model_executor/layers/fused_moe/layer.py"
    if layer.exists():
        taken = _named(layer, "FusedMoEFactory", "FusedMoE").args
        defaults = dict(zip([argument.arg for argument in taken.args][::-1], taken.defaults[::-1], strict=False))
        found += [f"experts take no {name}" for name in EXPERTS - {argument.arg for argument in taken.args}]
        found += [
            f"{name} of experts isn't {value} unless asked for"
            for name, value in OFF.items()
            if name not in defaults or ast.unparse(defaults[name]) != value
        ]
    return found


def _named(path: Path | zipfile.Path, *names: str) -> ast.ClassDef | ast.FunctionDef:
    return next(node for node in ast.parse(path.read_text(encoding="utf-8")).body if getattr(node, "name", "") in names)


def main() -> int:
    wrong = 0
    for source in sys.argv[1:]:
        lacking = missing(zipfile.Path(source) if source.endswith(".whl") else Path(source))
        print(Path(source).name, lacking or "has all that the plug-in needs")
        wrong += bool(lacking)
    return int(wrong > 0 or len(sys.argv) < 2)


if __name__ == "__main__":
    sys.exit(main())
