"""What the plug-in leans on, in the sources of several vLLM versions, which are read and not run.

    python tests/vllm_minors.py FOLDER...   # each with a vllm package, as unzipped from a wheel

Prints a line a folder; exits with 1 where something is missing.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ARGUMENTS = ["self", "config", "num_experts", "top_k", "hidden_size", "intermediate_size"]
ARGUMENTS += ["params_dtype", "quant_config", "prefix", "enable_eplb"]
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
    "model_executor/layers/fused_moe/routed_experts.py": (r'routed_experts_prefix: str = "routed_experts"',),
    "model_executor/models/registry.py": (
        r'"LongcatFlashForCausalLM": \(\s*"longcat_flash"',
        r'"LongcatFlashNgramForCausalLM": \(\s*"longcat_flash_ngram"',
        r"def register_model\(\s*self,\s*model_arch: str,",
    ),
    "model_executor/utils.py": (r"def set_weight_attrs\(",),
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
    ),
    "envs.py": (r"VLLM_BATCH_INVARIANT: bool",),
    "platforms/interface.py": (r"def is_cpu\(", r"def is_cuda\(", r"device_name: str", r"device_type: str"),
}


def missing(folder: Path) -> list[str]:
    """What the plug-in needs and this version does not have."""
    found = []
    for name, patterns in FACTS.items():
        path = folder / "vllm" / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found += [f"{name}: {pattern}" for pattern in patterns if not re.search(pattern, text)]
    source = (folder / "vllm/model_executor/models/longcat_flash.py").read_text(encoding="utf-8")
    layer = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "LongcatMoe"
    )
    init = next(node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = [argument.arg for argument in init.args.args]
    return found if arguments == ARGUMENTS else [*found, f"LongcatMoe takes {arguments}"]


def main() -> int:
    wrong = 0
    for folder in map(Path, sys.argv[1:]):
        lacking = missing(folder)
        print(folder.name, lacking or "has all that the plug-in needs")
        wrong += bool(lacking)
    return int(wrong > 0 or len(sys.argv) < 2)


if __name__ == "__main__":
    sys.exit(main())
