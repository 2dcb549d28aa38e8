"""Private names: of torch in `_compat.py` alone, each telling what it says, of transformers in its `private.py`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import zemoe
from zemoe import _compat

ROOT = Path(zemoe.__file__).parent


def private_names_of_torch(source: str) -> set[str]:
    """Dotted names in a file that begin at something imported from torch and go through a name with one underscore."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = {name for name in imported.values() if name.split(".")[0] == "torch"}
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and imported.get(node.id, "").split(".")[0] == "torch":
            found.add(".".join([imported[node.id], *parts]))
    return {name for name in found if any(part[0] == "_" and part[:2] != "__" for part in name.split("."))}


def test_only_compat_uses_private_names_of_torch():
    found = {
        str(path.relative_to(ROOT)): names
        for path in ROOT.rglob("*.py")
        if (names := private_names_of_torch(path.read_text(encoding="utf-8")))
    }
    assert list(found) == ["_compat.py"], found


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch._C._current_graph_task_id()",
        "from torch.autograd import forward_ad as ad\nad._current_level",
        "from torch._higher_order_ops import wrap",
        "def f():\n    import torch.nn as nn\n    return nn.modules._reduction",
    ],
)
def test_the_rule_finds_private_names(line):
    assert private_names_of_torch(line)
    assert not private_names_of_torch("import torch, os\nclass A:\n    _b = torch.nn.Linear\n    c = os._exit, _b.x\n")


def private_attributes_of_others(source: str) -> set[str]:
    """Attributes with one underscore of anything but `self`, `cls` and `super()`, and private names imported."""
    tree = ast.parse(source)
    found = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr[0] == "_"
        and node.attr[:2] != "__"
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    }
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return found | {alias.name for node in imported for alias in node.names if alias.name[0] == "_"}


def test_only_private_uses_private_names_of_transformers():
    folder = ROOT / "integrations" / "transformers"
    found = {
        path.name for path in folder.glob("*.py") if private_attributes_of_others(path.read_text(encoding="utf-8"))
    }
    assert found == {"private.py"}
    assert private_attributes_of_others("from transformers.x import _y") == {"_y"}
    assert private_attributes_of_others("self.model._z, self._own, super()._own()") == {"self.model._z"}


def test_forward_mode_is_seen_inside_of_its_level_only():
    assert not _compat.inside_forward_mode()
    with forward_ad.dual_level():
        assert _compat.inside_forward_mode()
    assert not _compat.inside_forward_mode()


def test_function_transforms_are_seen_with_the_tensors_that_they_track():
    outside, seen = torch.ones(2), []

    def function(x: torch.Tensor) -> torch.Tensor:
        tracked = _compat.tracked_by_function_transform
        seen.append((_compat.inside_function_transform(), tracked(x), tracked(outside), x.requires_grad))
        return x.sum()

    function(outside)
    torch.func.grad(function)(torch.ones(2))
    torch.vmap(function)(torch.ones(3, 2))
    assert [line[:3] for line in seen] == [(False, False, False), (True, True, False), (True, False, False)]


@pytest.mark.parametrize("retain", [False, True], ids=["once", "retain_graph"])
def test_a_backward_pass_is_seen_and_whether_it_keeps_its_graph(retain):
    seen = []

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.inside_backward())
        return x * x

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(recomputed, x, use_reentrant=False)
    y.register_hook(lambda grad: seen.append(_compat.backward_keeps_graph()))
    y.sum().backward(retain_graph=retain)
    assert seen == [False, retain, True] and not _compat.inside_backward()


def test_a_reshaped_tensor_is_no_view():
    x = torch.randn(6, 2, requires_grad=True)
    y = _compat.reshape_without_view(x * 1, torch.Size((2, 3, 2)))
    assert not y._is_view() and (x * 1).view(2, 3, 2)._is_view()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 2))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_multiplies_as_linear_does():
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    torch.testing.assert_close(_compat.onednn_linear(x, weight), nn.functional.linear(x, weight))
    assert isinstance(_compat.has_bfloat16_instructions(), bool)


class _Doubles(_compat.EditsStateDict):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def edit_state_dict(self, state_dict, prefix, missing_keys, error_msgs):
        missing_keys.append(f"{prefix}added")
        return {key: 2 * value for key, value in state_dict.items() if key.startswith(prefix)}


def test_a_module_loads_what_it_has_made_of_a_state_dict():
    model = nn.Sequential(_Doubles(), nn.Linear(1, 1, bias=False))
    state = {"0.weight": torch.tensor([3.0]), "1.weight": torch.tensor([[5.0]])}
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.added"]
    assert (model[0].weight.item(), model[1].weight.item(), state["0.weight"].item()) == (6.0, 5.0, 3.0)


def test_load_hooks_of_one_kind_are_taken_out():
    class Hook:
        calls = 0

        def __call__(self, *args: object) -> None:
            Hook.calls += 1

    class Other(Hook):
        pass

    module = nn.Linear(1, 1)
    module.register_load_state_dict_pre_hook(Hook())
    module.register_load_state_dict_pre_hook(Other())
    _compat.remove_load_hooks(module, Other)
    module.load_state_dict(module.state_dict())
    assert Hook.calls == 1
