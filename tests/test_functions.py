"""How long a function, a signature and a file of zemoe may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import zemoe

ROOT = Path(zemoe.__file__).parent
PARAMETERS, LINES, FILE_LINES = 8, 60, 400
# A kernel and an operator take one tensor after the other, and the reference states the rules by name.
APART = {"kernels", "ops", "reference.py"}
# Public signatures whose arguments are named, those that an engine calls, and commands with an option each.
MANY_PARAMETERS = {
    "cli.py": {"generate", "bench"},
    "experts.py": {"fused_experts"},
    "fused_moe.py": {"FusedMoE.__init__"},
    "integrations/vllm/layers.py": {"ZeroExpertLongcatMoE.__init__", "ZeroExpertLongcatMoEAroundTheirs.__init__"},
    "layer.py": {"MoE.__init__"},
    "routing.py": {"select_experts"},
}
MANY_LINES = {"cli.py": {"bench", "_add_bench"}}  # a line an option
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in APART]


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Each function's name, with its class before it, and its numbers of parameters (without self) and of lines."""

    def visit(node: ast.AST, owner: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = child.args
                named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
                parameters = [argument for argument in named if argument.arg not in ("self", "cls")]
                yield owner + child.name, len(parameters), (child.end_lineno or 0) - child.lineno + 1
                yield from visit(child, "")
            else:
                yield from visit(child, f"{child.name}." if isinstance(child, ast.ClassDef) else owner)

    yield from visit(ast.parse(source), "")


def too_long(path: Path) -> tuple[set[str], set[str]]:
    """The functions of a file with too many parameters, and those with too many lines."""
    found = list(functions(path.read_text(encoding="utf-8")))
    wide = {name for name, parameters, _ in found if parameters > PARAMETERS}
    return wide, {name for name, _, lines in found if lines > LINES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_is_too_long(path: Path) -> None:
    """The named exceptions are none that could be left out."""
    name = path.relative_to(ROOT).as_posix()
    assert too_long(path) == (MANY_PARAMETERS.get(name, set()), MANY_LINES.get(name, set()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def test_exceptions_name_files_that_are_there() -> None:
    assert {*MANY_PARAMETERS, *MANY_LINES} <= {path.relative_to(ROOT).as_posix() for path in FILES}


def test_a_long_function_is_found(tmp_path: Path) -> None:
    nine = ", ".join("abcdefghi")
    body = "    pass\n" * LINES
    (tmp_path / "long.py").write_text(
        f"class A:\n  def few(self, {nine[:-3]}): pass\n  def many(self, {nine}): pass\n"
        f"def one({nine[:-3]}, *, i):\n    def inner(*, {nine[:-3]}, **i): pass\n"
        f"def far():\n{body}def near():\n{body[9:]}"
    )
    assert too_long(tmp_path / "long.py") == ({"A.many", "one", "inner"}, {"far"})
