"""What SGLang's sources say of the classes and functions that our plug-in meets: written to sglang_facts.json.

    python tests/tools/sglang_facts.py FOLDER    # with SGLang's wheels; `make sglang` downloads them and runs this

Wheels are read with `zipfile` and `ast`; nothing of SGLang is imported. The classes of its LongCat-Flash MoE layer go,
as they are, into FOLDER/VERSION.py beside the wheels, where integrations/sglang/test_plugin.py finds them.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

FACTS = Path(__file__).with_suffix(".json")
LONGCAT = "sglang.srt.models.longcat_flash"
FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer"
TOPK = "sglang.srt.layers.moe.topk"
REGISTRY = "sglang.srt.plugins.hook_registry"
# Modules that are read, and the names of theirs that matter here.
NAMES = {
    LONGCAT: ("LongcatFlashMoE", "tensor_model_parallel_all_reduce"),
    FUSED_MOE: ("FusedMoE",),
    TOPK: ("StandardTopKOutput",),
    "sglang.srt.layers.moe.utils": ("get_moe_a2a_backend",),
    "sglang.srt.layers.quantization.unquant": ("UnquantizedFusedMoEMethod",),
    REGISTRY: ("HookRegistry", "HookType"),
    "sglang.srt.plugins": ("GENERAL_PLUGINS_GROUP", "load_plugins"),
    "sglang.version": ("__version__",),
}


def parsed(wheel: zipfile.ZipFile, module: str) -> tuple[str, ast.Module]:
    path = module.replace(".", "/")
    name = f"{path}.py" if f"{path}.py" in wheel.namelist() else f"{path}/__init__.py"
    source = wheel.read(name).decode()
    return source, ast.parse(source)


def top_level(tree: ast.Module) -> set[str]:
    """Names that importing the module binds, in an `if` or `try` too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def named(nodes: list[ast.stmt], name: str) -> ast.ClassDef | ast.FunctionDef:
    return next(node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name)


def signature(function: ast.AST) -> str:
    assert isinstance(function, ast.FunctionDef)
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        argument.annotation = None
    return ast.unparse(function.args)


def attributes(cls: ast.ClassDef) -> list[str]:
    """What its __init__ sets on self."""
    stores = (node for node in ast.walk(named(cls.body, "__init__")) if isinstance(node, ast.Attribute))
    return sorted(
        {
            node.attr
            for node in stores
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
    )


def calls(tree: ast.AST, function: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == function]


def facts_of(path: Path) -> dict[str, object]:
    with zipfile.ZipFile(path) as wheel:
        trees = {module: parsed(wheel, module) for module in NAMES}
    longcat = trees[LONGCAT][1].body
    moe, router = named(longcat, "LongcatFlashMoE"), named(longcat, "LongcatFlashRouter")
    fused = named(trees[FUSED_MOE][1].body, "FusedMoE")
    hooks = trees[REGISTRY][1].body
    fields = [node for node in named(trees[TOPK][1].body, "StandardTopKOutput").body if isinstance(node, ast.AnnAssign)]
    submits = calls(named(longcat, "LongcatFlashForCausalLM"), "maybe_executor_submit")
    keywords = [{keyword.arg: keyword.value for keyword in call.keywords} for call in submits]
    kinds = [node for node in named(hooks, "HookType").body if isinstance(node, ast.Assign)]
    return {
        "names": {module: sorted(top_level(trees[module][1]) & set(names)) for module, names in NAMES.items()},
        "layer": signature(named(moe.body, "__init__")),
        "layer attributes": attributes(moe),
        "layer forward": signature(named(moe.body, "forward")),
        "layer sums over ranks": bool(calls(named(moe.body, "forward"), "tensor_model_parallel_all_reduce")),
        "layer built with": [sorted(str(k.arg) for k in call.keywords) for call in calls(trees[LONGCAT][1], moe.name)],
        "layer called with": [len(call.args) for call in calls(trees[LONGCAT][1], "self.mlp")],
        "router attributes": attributes(router),
        "router forward": signature(named(router.body, "forward")),
        "experts attributes": attributes(fused),
        "experts mapping": signature(named(fused.body, "make_expert_params_mapping")),
        "experts loader": signature(named(fused.body, "weight_loader")),
        "experts loaded with": [
            [ast.unparse(words["func_args"]), ast.unparse(words["func_kwargs"])]
            for words in keywords
            if "func_kwargs" in words
        ],
        "topk output": [ast.unparse(field.target) for field in fields],
        "register hook": signature(named(named(hooks, "HookRegistry").body, "register")),
        "hook types": [ast.unparse(kind.targets[0]) for kind in kinds],
    }


def classes_of(path: Path) -> str:
    """The source of SGLang's router and MoE layer."""
    with zipfile.ZipFile(path) as wheel:
        source, tree = parsed(wheel, LONGCAT)
    parts = [ast.get_source_segment(source, named(tree.body, f"LongcatFlash{name}")) for name in ("Router", "MoE")]
    return "\n\n\n".join(map(str, parts)) + "\n"


def main(folder: str) -> None:
    facts = {}
    for path in sorted(Path(folder).glob("sglang-*.whl")):
        version = path.name.split("-")[1]
        facts[version] = facts_of(path)
        (path.parent / f"{version}.py").write_text(classes_of(path))
    FACTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
