"""docs/specification.md: what the code cites of it is there, and its examples are what is computed.

The page's tables of examples are read from the page. Each is computed again with the reference, and, where zemoe has a
function of its own for it, with that as well.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zemoe import FusedMoE, Routing, balance, fused_experts, reference, select_experts
from zemoe.affine import AFFINE_KINDS, AffineParams
from zemoe.config import KIND_ALIASES, RENORMALIZE_MODES
from zemoe.kernels.activations import ACTIVATIONS
from zemoe.retrofit import new_router_rows
from zemoe.routing import normalize_logits
from zemoe.scores import SCORES

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
PAGE = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
NAMES = {"ln": math.log, "exp": math.exp, "sqrt": math.sqrt, "inf": math.inf, "nan": math.nan}
CITE = re.compile(r'docs/specification\.md, ("[^"]+"(?:(?:, | and | up to |, and )"[^"]+")*)')

Row = dict[str, str]


def sections() -> dict[str, str]:
    """The text of each section by its name."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables() -> list[tuple[str, tuple[str, ...], list[Row]]]:
    """(section, column names, rows by column name) of each table of the page."""
    found = []
    for name, text in sections().items():
        for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
            header = tuple(lines[0])
            found.append((name, header, [dict(zip(header, line, strict=True)) for line in lines[2:]]))
    return found


def number(cell: str) -> Any:
    """The value that a cell of an example states in backticks."""
    return eval(cell.strip("`"), {"__builtins__": {}}, NAMES)


def tensor(cell: str) -> torch.Tensor | None:
    value = number(cell)
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def close(result: torch.Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(result.detach().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------------------ one function for each table of examples

EXAMPLES: dict[tuple[str, ...], Callable[[Row], None]] = {}


def example(*columns: str) -> Callable[[Callable[[Row], None]], Callable[[Row], None]]:
    def register(check: Callable[[Row], None]) -> Callable[[Row], None]:
        EXAMPLES[columns] = check
        return check

    return register


@example("E", "Z", "W_g", "logits before", "logits")
def logits(row: Row) -> None:
    previous = tensor(row["logits before"])
    result = reference.router_logits(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        num_experts=number(row["E"]),
        num_zero_experts=number(row["Z"]),
        residual_weight=tensor(row["W_g"]),
        prev_logits_TA=None if previous is None else previous[None],
    )
    close(result[0], number(row["logits"]))


@example("logits", "logit_norm", "normalised")
def normalised(row: Row) -> None:
    given, scale = tensor(row["logits"]), number(row["logit_norm"])
    close(normalize_logits(given[None], scale)[0], number(row["normalised"]), 1e-6)
    one = torch.ones(1, 1)  # the logits as a classifier's weight
    ours = reference.router_logits(one, given[:, None], num_experts=len(given), num_zero_experts=0, logit_norm=scale)
    close(ours[0], number(row["normalised"]), 1e-6)


@example("scoring_func", "logits", "scores")
def scores(row: Row) -> None:
    name, given, expected = row["scoring_func"].strip("`"), tensor(row["logits"]), number(row["scores"])
    close(reference.scores_of_token(given, name), expected)
    close(SCORES[name](given[None].float())[0], expected, 1e-6)


def check_selection(row: Row, kinds: tuple[tuple[str, int], ...], **rules: Any) -> None:
    given, bias = tensor(row["logits"])[None], tensor(row["b"]) if "b" in row else None
    rules |= {"num_experts": 2, "zero_expert_kinds": kinds, "e_score_correction_bias": bias}
    chosen = reference.select(given, number(row["K"]), **rules)
    weights, ids = select_experts(given.float(), number(row["K"]), **rules)
    assert chosen.topk_ids_TK[0].tolist() == ids[0].tolist() == number(row["ids"])
    if "weights" in row:
        close(chosen.topk_weights_TK[0], number(row["weights"]))
        close(weights[0], number(row["weights"]), 1e-6)


@example("logits", "K", "b", "ids", "weights")
def selection(row: Row) -> None:
    check_selection(row, (("identity", 1), ("zero", 1)))


@example("logits", "K", "b", "G", "topk_group", "ids")
def group_limit(row: Row) -> None:
    check_selection(row, (("zero", 4),), num_expert_group=number(row["G"]), topk_group=number(row["topk_group"]))


@example("renormalize", "K", "routed_scaling_factor", "ids", "weights")
def renormalised(row: Row) -> None:
    check_selection(
        {**row, "logits": "[ln(1), ln(2), ln(3), ln(4)]"},
        (("identity", 1), ("zero", 1)),
        renormalize=row["renormalize"].strip("`"),
        routed_scaling_factor=number(row["routed_scaling_factor"]),
    )


@example("activation", "gate", "up", "down", "x", "value")
def ffn(row: Row) -> None:
    w13 = torch.tensor([[number(row["gate"])], [number(row["up"])]], dtype=torch.float64)
    w2, x = torch.tensor([[number(row["down"])]], dtype=torch.float64), tensor(row["x"])[None]
    name = row["activation"].strip("`")
    close(reference.ffn(x, w13, w2, name)[0], number(row["value"]))
    ones = torch.ones(1, 1, dtype=torch.float64)
    result = fused_experts(
        x[None], w13[None], w2[None], ones, ones.long() * 0, num_experts=1, zero_expert_kinds=(), activation=name
    )
    close(result[0, 0], number(row["value"]))


def zero_experts(x_TH: torch.Tensor, weights: torch.Tensor, ids: list[int], kinds, params=None) -> torch.Tensor:
    """The output of one token by the reference, after a look that fused_experts has the same, to rounding."""
    H = x_TH.shape[1]
    args = (
        x_TH,
        torch.zeros(0, 2, H, dtype=torch.float64),
        torch.zeros(0, H, 1, dtype=torch.float64),
        weights[None],
        torch.tensor([ids]),
    )
    result = reference.experts(*args, num_experts=0, zero_expert_kinds=kinds, affine_params=params)
    close(fused_experts(*args, num_experts=0, zero_expert_kinds=kinds, affine_params=params), result)
    return result[0]


@example("kind", "learned", "value")
def kind(row: Row) -> None:
    name, learned = row["kind"].strip("`"), number(row["learned"])
    params = AffineParams()
    if name == "constant":
        params = AffineParams(*(torch.tensor([part], dtype=torch.float64) for part in learned), None)
    elif name == "scaled_identity":
        params = AffineParams(scale=torch.tensor([learned], dtype=torch.float64))
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    close(zero_experts(x, torch.ones(1, dtype=torch.float64), [0], ((name, 1),), params), number(row["value"]))


@example("ids", "weights", "y")
def ids(row: Row) -> None:
    params = AffineParams(scale=torch.tensor([3.0], dtype=torch.float64))
    args = tensor(row["weights"]), number(row["ids"]), (("identity", 1), ("scaled_identity", 1)), params
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    if row["y"] == "`ValueError`":
        with pytest.raises(ValueError, match="topk_ids"):
            zero_experts(x, *args)
        with pytest.raises(ValueError, match="topk_ids"):
            no_ffn = torch.zeros(0, 2, 2, dtype=torch.float64), torch.zeros(0, 2, 1, dtype=torch.float64)
            fused_experts(
                x,
                *no_ffn,
                args[0][None],
                torch.tensor([args[1]]),
                num_experts=0,
                zero_expert_kinds=args[2],
                affine_params=params,
            )
    else:
        close(zero_experts(x, *args), number(row["y"]))


@example("x", "logits", "weights", "y")
def broken(row: Row) -> None:
    rules = {"num_experts": 0, "zero_expert_kinds": (("identity", 3),)}
    x, given = tensor(row["x"]).reshape(1, 1), tensor(row["logits"])[None]
    chosen = reference.select(given, 2, **rules)
    close(chosen.topk_weights_TK[0], number(row["weights"]))
    close(select_experts(given.float(), 2, **rules)[0][0], number(row["weights"]), 1e-6)
    y = zero_experts(x, chosen.topk_weights_TK[0], chosen.topk_ids_TK[0].tolist(), rules["zero_expert_kinds"])
    close(y[0], number(row["y"]))


def two_tokens() -> Routing:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 3.0, 1.0]], dtype=torch.float64).log()
    chosen = reference.select(values, 2, num_experts=2, zero_expert_kinds=(("zero", 2),))
    assert chosen.topk_ids_TK.tolist() == [[3, 2], [0, 2]]
    return Routing(values, chosen.topk_weights_TK, chosen.topk_ids_TK)


@example("loss", "arguments", "value")
def loss(row: Row) -> None:
    routing, function = two_tokens(), getattr(balance, row["loss"].strip("`"))
    given = eval(f"dict({row['arguments'].strip('`')})", {"__builtins__": {}}, {"dict": dict})
    if "num_experts" in inspect.signature(function).parameters:
        close(function(routing, num_experts=2, **given), number(row["value"]))
    else:
        close(function(routing), number(row["value"]))
    if function is balance.longcat_balance_loss:
        judge = reference.longcat_group_loss(
            routing.logits_TA,
            routing.topk_ids_TK,
            num_experts=2,
            expected_ffn=given["ffn_experts_per_token"],
            num_groups=given.get("num_groups"),
        )
        close(judge, number(row["value"]))


@example("controller", "n", "b afterwards")
def controller(row: Row) -> None:
    function, counts = getattr(balance, row["controller"].strip("`")), torch.tensor(number(row["n"]))
    bias = torch.zeros(4, dtype=torch.float64)
    budget = {"top_k": 2, "ffn_experts_per_token": 1} if function is balance.update_longcat_bias_ else {}
    function(bias, counts, num_experts=2, rate=0.1, **budget)
    close(bias, number(row["b afterwards"]))
    if budget and counts.any():
        ids_TK = two_tokens().topk_ids_TK
        assert balance.slot_counts(ids_TK, 4).tolist() == counts.tolist()
        step = reference.longcat_bias_update(ids_TK, num_experts=2, num_slots=4, expected_ffn=1, rate=0.1)
        close(step, number(row["b afterwards"]))


@example("rows of the trained router", "a new row")
def new_rows(row: Row) -> None:
    for new in new_router_rows(tensor(row["rows of the trained router"]), 3):
        close(new, number(row["a new row"]))


@example("argument", "accepted")
def accepted(row: Row) -> None:
    sizes = {"num_experts": 2, "top_k": 1, "hidden_size": 3, "intermediate_size": 2}
    for name in re.findall(r"`(\w+)`", row["argument"]):
        for value in re.findall(r"`(\w+)`", row["accepted"]):
            FusedMoE(**sizes, **{name: number(value)})
        with pytest.raises(ValueError, match=name):
            FusedMoE(**sizes, **{name: 3 if name != "reduce_results" else SimpleNamespace()})


CHECKED = [(section, header, row) for section, header, rows in tables() if header in EXAMPLES for row in rows]


@pytest.mark.parametrize(
    ("header", "row"),
    [(header, row) for _, header, row in CHECKED],
    ids=[f"{section}-{'-'.join(row.values())}" for section, _, row in CHECKED],
)
def test_an_example_is_what_is_computed(header, row):
    EXAMPLES[header](row)


def test_every_table_of_examples_is_on_the_page():
    assert {header for _, header, _ in CHECKED} == set(EXAMPLES)


# ------------------------------------------------------------------------------------------------ names, and who cites


def named(*columns: str) -> set[str]:
    """First cells of the table with this header, without backticks."""
    (rows,) = [rows for _, header, rows in tables() if header == columns]
    return {re.split(r"[ ,]", row[columns[0]].strip("`"))[0] for row in rows}


def test_every_kind_score_and_mode_has_its_row():
    kinds = ("kind", "alias", "value", "learns", "source")
    assert named(*kinds) == set(AFFINE_KINDS)
    (rows,) = [rows for _, header, rows in tables() if header == kinds]
    assert {row["alias"]: row["kind"] for row in rows if row["alias"]} == KIND_ALIASES
    assert named("scoring_func", "score of slot i", "used by") == set(SCORES)
    assert named("renormalize", "what is done", "used by") == set(RENORMALIZE_MODES)
    assert set(re.findall(r"`(\w+)`", sections()["FFN experts"])) >= set(ACTIVATIONS)


def test_every_loss_and_controller_has_its_row():
    losses = {name for name in vars(balance) if name.endswith("_loss")}
    assert named("loss", "value", "source") == losses
    assert losses <= {row["loss"].strip("`") for _, header, row in CHECKED if header == ("loss", "arguments", "value")}
    controllers = {name for name in vars(balance) if name.startswith("update_")}
    assert named("controller", "how far b_i moves", "source") == controllers | {"BudgetController"}


def cites() -> list[tuple[str, str]]:
    """(file, section) of each place that cites a section; the words may be broken over two lines of a comment."""
    found = []
    for folder in ("src", "tests", "benchmarks", "examples", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".toml", ".sh") and path != Path(__file__).resolve():
                text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
                for names in CITE.findall(text):
                    found += [(str(path.relative_to(ROOT)), name) for name in re.findall(r'"([^"]+)"', names)]
    return found


def test_every_section_that_is_cited_exists():
    wrong = [(path, name) for path, name in cites() if name not in sections()]
    assert not wrong
    assert len({path for path, _ in cites() if path.startswith("src/")}) >= 8


def test_nothing_cites_sections_by_number():
    number_of = re.compile(r"\bSPEC (section|\()|section \d+ of the specification", re.IGNORECASE)
    for folder in ("src", "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__).resolve():
                assert not number_of.search(path.read_text(encoding="utf-8")), path


def test_the_glossary_has_each_term_once_and_every_letter_of_the_notation():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    first_cells = [line.strip("|").split("|")[0] for line in glossary.split("\n") if line.startswith("| ")]
    terms = [term.strip(" `") for cell in first_cells for term in re.sub(r"\(.*?\)", "", cell).split(",")]
    terms = [term for term in terms if term not in ("letter", "term", "---")]
    assert len(terms) > 60 and len(terms) == len(set(terms))
    assert named("letter", "meaning") <= set(terms)


def test_lines_fit():
    for page in ("specification.md", "glossary.md"):
        lines = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n")
        assert not [line for line in lines if len(line) > 120]


def test_links_of_the_page_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in sections()}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists() if file else anchor in anchors, target
