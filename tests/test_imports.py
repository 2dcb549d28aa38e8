"""Who may import whom, and what `import zemoe` may need: the table of the house, as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zemoe

ROOT = Path(zemoe.__file__).parent
# What a room (a folder, or a file that stands alone) may import of zemoe itself, beside what is in the room.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "_compat": set(),
    "config": set(),
    "reference": set(),
    "scores": set(),
    "casts": {"_compat"},
    "separate_experts": {"_compat"},
    "routing": {"_compat", "config", "ops", "scores", "casts", "backends"},
    "plan": {"config", "ops"},
    "affine": {"config", "ops"},
    "ops": {"_compat", "kernels", "scores", "versions"},
    "kernels": {"_compat", "versions"},
    "versions": set(),
    "engine_options": set(),
    "backends": {"config", "plan", "affine", "ops", "scores"},
    "experts": {"_compat", "config", "routing", "affine", "backends", "ops", "kernels"},
    "balance": {"config", "routing", "scores"},
    "statistics": {"config", "routing", "balance"},
    "retrofit": {"config", "casts", "routing", "backends", "experts", "separate_experts"},
    "checkpoints": {"messages", "regular_files"},
    "messages": set(),
    "regular_files": set(),
    "terminal": {"messages"},
    "machine": {"_version"},
    "controller": {"balance", "config", "routing", "scores"},
    "integrations": {
        "_compat",
        "_version",
        "affine",
        "backends",
        "casts",
        "checkpoints",
        "config",
        "experts",
        "fused_moe",
        "layer",
        "public",
        "retrofit",
        "routing",
        "separate_experts",
        "versions",
    },
    "compile_loops": {"config", "kernels", "layer"},
    "doctor": {"affine", "backends", "bench", "experts", "kernels", "machine", "reference", "terminal", "versions"},
    "bench": {
        "_compat",
        "_version",
        "backends",
        "compile_loops",
        "config",
        "experts",
        "layer",
        "machine",
        "reference",
        "regular_files",
        "terminal",
    },
    "generate": {
        "_version",
        "backends",
        "checkpoints",
        "compile_loops",
        "experts",
        "integrations",
        "machine",
        "regular_files",
        "routing",
        "terminal",
    },
    "training": {
        "_version",
        "balance",
        "checkpoints",
        "compile_loops",
        "controller",
        "generate",
        "integrations",
        "machine",
        "regular_files",
        "routing",
        "statistics",
        "terminal",
    },
    "cli": {"_version", "backends", "bench", "doctor", "experts", "generate", "messages", "terminal", "training"},
    "__main__": set(),
    "__init__": {
        "_version",
        "affine",
        "backends",
        "balance",
        "config",
        "controller",
        "experts",
        "fused_moe",
        "layer",
        "retrofit",
        "routing",
        "statistics",
    },
    "fused_moe": {"config", "casts", "scores", "routing", "affine", "backends", "engine_options", "experts"},
    "layer": {"config", "casts", "routing", "affine", "backends", "experts"},
}
# Third-party packages that may be imported at the top of a module; torch is the only dependency of `import zemoe`.
TOP_LEVEL = {
    "_version": set(),
    "config": set(),
    "messages": set(),
    "regular_files": set(),
    "versions": set(),
    "terminal": {"rich"},
    "checkpoints": {"torch", "safetensors"},
}
FRAMEWORKS = {"transformers", "vllm", "sglang"}


COMMANDS = {"__main__", "bench", "cli", "doctor", "generate", "training"}  # they may need more than the library does


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path, *, nested: bool = True) -> set[str]:
    """Absolute dotted names that a file imports; without `nested` only what runs when it is imported."""
    package = ["zemoe", *path.relative_to(ROOT).parts[:-1]]
    found = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if not nested and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = [*base, *(child.module.split(".") if child.module else [])]
                found.update(".".join([*base, alias.name]) for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def own_rooms(names: set[str]) -> set[str]:
    """Rooms of zemoe among dotted names; names of the package itself count as "public"."""
    rooms = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "zemoe":
            second = parts[1] if len(parts) > 1 else ""
            is_room = (ROOT / f"{second}.py").exists() or (ROOT / second).is_dir()
            rooms.add(second if second and is_room else "public")
    return rooms


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms(path):
    name = room(path)
    assert own_rooms(imports(path)) <= MAY_IMPORT[name] | ({name} if path.parent != ROOT else set())
    if name == "integrations" and path.parent.name != name:
        others = {part.split(".")[2] for part in imports(path) if part.startswith("zemoe.integrations.")}
        assert others <= {path.parent.name, "engines"}, "integrations know each other only through engines"


def test_the_table_is_the_tree():
    assert set(MAY_IMPORT) == {room(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_frameworks(path):
    """An integration knows its one framework; nobody else imports any. Triton stays in its folder."""
    outside = {name.split(".")[0] for name in imports(path)}
    relative = path.relative_to(ROOT).parts
    if relative[0] == "integrations":
        assert outside & FRAMEWORKS <= {path.parent.name}
    elif room(path) not in COMMANDS:
        assert not outside & FRAMEWORKS
    if relative[:2] != ("kernels", "triton"):
        assert "triton" not in {name.split(".")[0] for name in imports(path, nested=False)}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) not in {*COMMANDS, "integrations"}], ids=lambda path: path.stem
)
def test_packages_at_the_top(path):
    allowed = TOP_LEVEL.get(room(path), {"torch"}) | {"zemoe"} | set(sys.stdlib_module_names)
    if path.relative_to(ROOT).parts[:2] == ("kernels", "triton"):
        allowed |= {"triton"}
    if path.name in ("choices.py", "compiled.py", "loop_cache.py", "loops.py"):
        allowed |= {"numba", "llvmlite", "numpy"}
    assert {name.split(".")[0] for name in imports(path, nested=False)} <= allowed


def test_only_what_judges_imports_the_reference():
    """The reference shares no code with what it judges: the library never computes with it."""
    users = {str(path.relative_to(ROOT)) for path in FILES if "reference" in own_rooms(imports(path))}
    assert users == {"doctor.py", "bench/check.py"}


def test_the_rules_bite(tmp_path, monkeypatch):
    """A file that breaks them is found: the parser sees relative, absolute and nested imports."""
    (tmp_path / "layer.py").touch()
    (tmp_path / "plan.py").write_text(
        "from . import layer\nfrom .layer import MoE\nimport zemoe.layer\ndef f():\n    from zemoe import layer\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(tmp_path / "plan.py") == {"zemoe.layer", "zemoe.layer.MoE"}
    assert own_rooms(imports(tmp_path / "plan.py")) == {"layer"}
    assert "zemoe.layer" in imports(tmp_path / "plan.py", nested=False)


BLOCKED = """
import sys

class Wall:
    # What is not allowed is not installed.
    allowed = set({allowed!r}) | set(sys.stdlib_module_names)
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.allowed:
            specs = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
            return next((spec for spec in specs if spec is not None), None)

# torch may use what it likes of its own dependencies; numpy is optional even for it.
import torch, torch._dynamo, torch.distributed
sys.meta_path[:] = [Wall()]
{code}
"""


def run_blocked(code: str) -> str:
    program = BLOCKED.format(allowed=["torch", "zemoe"], code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_a_layer_need_torch_alone():
    heavy = ["transformers", "tokenizers", "safetensors", "typer", "rich", "triton", "numba"]
    out = run_blocked(
        "functions, before = dict(vars(torch.nn.functional)), set(sys.modules)\n"  # torch._dynamo may hold triton
        f"import zemoe\nprint([name for name in {heavy} if name in set(sys.modules) - before])\n"
        "assert functions == vars(torch.nn.functional), 'importing patches'\n"
        "for name in zemoe.__all__: getattr(zemoe, name)\n"
        "from zemoe import FusedMoE, ZeroExpertFusedMoE\n"
        "sizes = dict(num_experts=2, top_k=2, hidden_size=4, intermediate_size=4)\n"
        "layer = zemoe.ZeroExpertFusedMoE(2, 'identity', None, **sizes)\n"
        "for p in layer.parameters(): torch.nn.init.normal_(p)\n"
        "layer(torch.randn(3, 4), torch.randn(3, 4)).sum().backward()"
    )
    assert out.strip() == "[]"


def test_the_wall_blocks():
    with pytest.raises(AssertionError, match="No module named 'safetensors'"):
        run_blocked("import safetensors")
