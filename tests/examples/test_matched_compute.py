"""examples/matched_compute: what is equal in all arms is, a run is found again, the summary sums up."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.judge import one_thread
from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"
NAMES = "arms", "kinds", "training", "evaluation", "run", "plots", "summary"


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """On few cores that others use too, threads cost these sizes more than they gain."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.syspath_prepend(EXAMPLES / "matched_compute")
        yield SimpleNamespace(**{name: import_module(name) for name in NAMES})
    for name in set(sys.modules) - before:
        if name in NAMES or name == "decoder":
            del sys.modules[name]


@pytest.fixture(scope="module")
def runs(scripts, tmp_path_factory) -> Path:
    """All arms, two steps; a second seed of three."""
    path = tmp_path_factory.mktemp("matched") / "runs.jsonl"
    for more in (["--seeds", "1"], ["--seeds", "2", "--arms", "plain4,identity4,null4"]):
        scripts.run.main(["--smoke", "--steps", "2", "--out", str(path), *more])
    return path


@pytest.fixture(scope="module")
def corpus(scripts, tmp_path_factory):
    folder = scripts.run.smoke_corpus(tmp_path_factory.mktemp("corpus"))
    return scripts.run.Corpus(folder, torch.device("cpu"))


def settings_of(scripts, **changes):
    return scripts.arms.Settings(**{"steps": 4, **scripts.run.SMOKE, **changes})


def training_of(scripts, corpus, arm: str, seed: int = 1, **changes):
    device = torch.device("cpu")
    return scripts.training.Training(settings_of(scripts, **changes), arm, seed, corpus, device, False)


class TestArms:
    def test_issue(self, scripts):
        made = {name: scripts.arms.make_moe(settings_of(scripts), arm, 1) for name, arm in scripts.arms.ARMS.items()}
        assert {n: (m.config.num_experts, m.config.num_zero_experts, m.config.top_k) for n, m in made.items()} == {
            **{f"plain{k}": (16, 0, k) for k in (3, 4, 5)},
            **dict.fromkeys(("identity3", "identity4", "identity5", "null4", "moepp4"), (16, 8, 6)),
        }
        assert made["moepp4"].config.zero_expert_kinds == (("zero", 2), ("identity", 2), ("constant", 4))
        assert made["moepp4"].router.residual is not None and made["identity4"].router.residual is None

    def test_chosen_experts_start_at_a_quarter(self, scripts):
        for name in ("plain3", "plain4", "identity4", "null4", "identity5"):
            moe = scripts.arms.make_moe(settings_of(scripts), scripts.arms.ARMS[name], 0)
            torch.nn.init.zeros_(moe.router.classifier.weight)
            weights_TK = moe(torch.randn(3, 16), return_routing=True)[1].topk_weights_TK
            torch.testing.assert_close(weights_TK, torch.full_like(weights_TK, 0.25))

    def test_schedules(self, scripts):
        settings = settings_of(scripts, steps=100, warmup=10)
        assert [settings.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
        assert settings.cosine(0) == settings.cosine(10) == 1.0
        assert settings.rate(99) == pytest.approx(0.05, abs=1e-3)


class TestTraining:
    def test_batches_are_the_same_in_all_arms_and_differ_by_seed(self, scripts, corpus):
        first, second, other = (
            training_of(scripts, corpus, arm, seed) for arm, seed in (("plain4", 1), ("moepp4", 1), ("plain4", 2))
        )
        batches = [[t.batch(step)[0] for step in (0, 5, 40)] for t in (first, second, other)]
        for training in (first, second, other):
            training.close()
        assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))

    def test_steering_moves_ffn_experts_alone(self, scripts, corpus):
        training = training_of(scripts, corpus, "moepp4")
        training.step(0)
        biases = [router.e_score_correction_bias.clone() for router in training.routers]
        training.close()
        assert all(bias[:16].any() and not bias[16:].any() for bias in biases)

    def test_calibration_brings_k_e_back(self, scripts, corpus):
        training = training_of(scripts, corpus, "identity3", steps=20, calibration=60, bias_rate=0.1)
        training.train(lambda step: None, lambda steps: None)
        for router in training.routers:
            router.e_score_correction_bias[:16] += 0.02  # too many FFN experts, in a model as small as this
        weights = [parameter.clone() for parameter in training.parameters]
        before = scripts.evaluation.score(training, "val")
        training.calibrate()
        after = scripts.evaluation.score(training, "val")
        used = [scripts.evaluation.brief(training, "val", scores)["ffn_experts"] for scores in (before, after)]
        assert all(torch.equal(now, was) for now, was in zip(training.parameters, weights, strict=True))
        training.close()
        assert used[0] > 4.0 and used[1] == pytest.approx(3.0, abs=0.35)

    def test_learns(self, scripts, corpus):
        training = training_of(scripts, corpus, "identity4", steps=30, learning_rate=2e-2)
        training.train(lambda step: None, lambda steps: None)
        losses = training.history[:, 0]
        training.close()
        assert losses[-5:].mean() < losses[:5].mean() - 1.0

    def test_a_loss_that_is_not_finite_ends_the_run(self, scripts, corpus):
        training = training_of(scripts, corpus, "plain4")
        with torch.no_grad():
            training.model.embedding.weight.fill_(math.nan)
        with pytest.raises(RuntimeError, match="step 1: the loss is nan"):
            training.train(lambda step: None, lambda steps: None)
        training.close()


class TestReadings:
    def test_kinds(self, scripts):
        kinds = scripts.kinds
        texts = ["<|s|>", " the", "re", "\n", "The", " 19", "63", ".", '"', "Oh", "'s", " of"]
        words = kinds.Vocabulary(
            torch.tensor([kinds.STYLE, *(kinds.shape_of(text) for text in texts[1:])]),
            torch.tensor([text.startswith(" ") for text in texts]),
            torch.tensor([text[-1].isalpha() for text in texts]),
            torch.tensor([len(text) for text in texts]),
            texts,
        )
        common = torch.zeros(len(texts), dtype=torch.bool)
        common[1] = True
        S, B, N, P, C, W, R = range(len(kinds.KINDS))
        expected = [S, C, R, B, W, N, N, P, P, W, R, W]
        assert kinds.token_kinds(words, torch.arange(len(texts)), common).tolist() == expected

    def test_vocabulary_counts_the_bytes_of_the_text(self, scripts, corpus, tmp_path):
        folder = scripts.run.smoke_corpus(tmp_path)
        tokenizer = scripts.run.Tokenizer.from_file(str(folder / "tokenizer.json"))
        words = scripts.kinds.read_vocabulary(tokenizer, set(corpus.manifest["special_tokens"].values()))
        readings = scripts.evaluation.Readings(corpus, words)
        assert int(readings.document_bytes.sum()) == corpus.bytes_of("heldout")
        assert len(readings.document_bytes) == corpus.manifest["splits"]["heldout"]["documents"]


class TestRuns:
    def test_every_arm_is_there(self, scripts, runs):
        found = scripts.run.read_runs(runs)
        assert [run["arm"] for run in found if run["seed"] == 1] == list(scripts.arms.ARMS)
        for run in found:
            nats = sum(run["readings"]["nats_by_document"])
            size = sum(run["readings"]["bytes_by_document"])
            assert nats / math.log(2) / size == pytest.approx(run["heldout"]["bits_per_byte"], rel=1e-6)
            if not scripts.arms.ARMS[run["arm"]].zero:
                assert run["heldout"]["ffn_experts"] == run["ffn_target"] and run["heldout"]["ffn_std"] == 0
            json.dumps(run, allow_nan=False)

    def test_finished_runs_are_skipped_and_a_torn_line_is_repaired(self, scripts, runs, tmp_path, capsys):
        path = tmp_path / "runs.jsonl"
        lines = runs.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:3]) + lines[3][:100], encoding="utf-8")
        scripts.run.main(["--smoke", "--steps", "2", "--seeds", "1", "--arms", "plain4,moepp4", "--out", str(path)])
        assert "moepp4" in capsys.readouterr().out
        again = scripts.run.read_runs(path)
        assert [run["arm"] for run in again] == ["plain4", "identity4", "null4", "moepp4"]
        assert again[3]["heldout"]["bits_per_byte"] == pytest.approx(json.loads(lines[3])["heldout"]["bits_per_byte"])

    def test_other_settings_are_refused(self, scripts, runs):
        with pytest.raises(SystemExit, match=r"differ in learning_rate, steps; choose another --out"):
            scripts.run.main(["--smoke", "--steps", "3", "--learning-rate", "1", "--out", str(runs)])

    def test_time_limit(self, scripts, tmp_path, capsys):
        arguments = ["--smoke", "--steps", "2", "--minutes", "0", "--out", str(tmp_path / "none.jsonl")]
        scripts.run.main(arguments)
        assert "0 of 24 runs done" in capsys.readouterr().out


class TestSummary:
    def test_interval(self, scripts):
        mean, half = scripts.summary.interval([1.0, 2.0, 3.0])
        assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
        assert math.isnan(scripts.summary.interval([1.0])[1])

    def test_tokens_are_two_tables_with_a_column_an_arm(self, scripts):
        tokens = [[f" t{n}", 100, n / 10] for n in range(20)]
        names = "identity4", "null4"
        runs = [{"arm": name, "seed": 1, "readings": {"tokens": tokens}} for name in names]
        cheapest, dearest = (
            scripts.summary.token_table(runs, 3).removeprefix("The cheapest:\n\n").split("The dearest:\n\n")
        )
        head = "| identity, K_e = 4 | null, K_e = 4 |"
        for part, costs in ((cheapest, ("0.00", "0.10", "0.20")), (dearest, ("1.70", "1.80", "1.90"))):
            rows = [f"| `' t{10 * float(cost):.0f}'` {cost} | `' t{10 * float(cost):.0f}'` {cost} |" for cost in costs]
            assert part.strip().splitlines() == [head, "| --- | --- |", *rows]

    def test_files_plots_and_page(self, scripts, runs, tmp_path):
        page = tmp_path / "page.md"
        page.write_text((ROOT / "dev" / "matched_compute.md").read_text(encoding="utf-8"), encoding="utf-8")
        folders = ["--results", str(tmp_path), "--images", str(tmp_path), "--page", str(page)]
        scripts.summary.main([str(runs), *folders])
        text = page.read_text(encoding="utf-8")
        assert "11 runs (2 seeds)" in text and "| identity, K_e = 4 | plain top-4 |" in text
        assert max(map(len, text.splitlines())) <= 120
        with (tmp_path / "differences.csv").open(encoding="utf-8") as file:
            rows = {(row["arm"], row["against"]): row for row in csv.DictReader(file)}
        found = scripts.run.read_runs(runs)
        score = {(run["arm"], run["seed"]): run["heldout"]["bits_per_byte"] for run in found}
        expected = sum(score["null4", seed] - score["plain4", seed] for seed in (1, 2)) / 2
        assert float(rows["null4", "plain4"]["bits_per_byte"]) == pytest.approx(expected, rel=1e-4)
        assert {path.name for path in tmp_path.glob("*.png")} == {
            f"matched-{name}.png" for name in ("bits", "experts", "validation", "kinds")
        }
        scripts.summary.main([str(runs), *folders])  # the marks are still there
        assert page.read_text(encoding="utf-8") == text
