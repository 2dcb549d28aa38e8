"""The embedded model: what examples/train_tiny.py trains, resumes and exports, and the files that are shipped."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from helpers.paths import ROOT
from zemoe.checkpoints.longcat import expected_shapes, verify
from zemoe.integrations.transformers import load_model
from zemoe.routing import observe

EXAMPLES = ROOT / "examples"
SHIPPED = ROOT / "src" / "zemoe" / "models" / "tiny"
# Two dozen steps would do for the loss; the controller needs these to arrive at K_e.
SMOKE = ["train", "--smoke", "--steps", "60", "--warmup", "5", "--bias-rate", "0.3", "--dropout", "0.05"]
SMOKE += ["--log-every", "5", "--eval-every", "20", "--save-every", "15"]


class Scripts(NamedTuple):
    train: ModuleType
    model: ModuleType
    card: ModuleType
    corpus: ModuleType


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import corpus
        import tiny_card
        import tiny_model
        import train_tiny

        yield Scripts(train_tiny, tiny_model, tiny_card, corpus)


@pytest.fixture(scope="module")
def runs(scripts: Scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    scripts.train.main([*SMOKE, "--out", str(folder / "zero")])
    scripts.train.main([*SMOKE, "--out", str(folder / "top4"), "--baseline", "top4"])
    return folder


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# ---- training


def test_the_loss_falls_and_the_controller_reaches_its_target(scripts: Scripts, runs: Path) -> None:
    for name in ("zero", "top4"):
        log, summary = read_log(runs / name), read_summary(runs / name)
        assert [record["step"] for record in log] == [1, *range(5, 61, 5)]
        assert log[-1]["loss"] < log[0]["loss"] - 2
        assert summary["best"]["bits_per_byte"] == min(r["val_bits_per_byte"] for r in log if "val_bits_per_byte" in r)
        assert summary["heldout"]["bits_per_byte"] == pytest.approx(summary["best"]["bits_per_byte"], abs=0.15)
        assert not summary["stopped_early"]
    zero, plain = read_summary(runs / "zero"), read_summary(runs / "top4")
    target = scripts.model.SMOKE.ffn_target
    assert zero["heldout"]["ffn_experts_a_token"] == pytest.approx(target, abs=0.35)
    assert zero["heldout"]["zero_share"] == pytest.approx(1 - target / scripts.model.SMOKE.top_k, abs=0.12)
    assert plain["heldout"]["ffn_experts_a_token"] == target
    assert zero["config"]["zero_expert_type"] == "identity"
    assert zero["config"]["mla_scale_q_lora"] is True
    assert zero["config"]["mla_scale_kv_lora"] is True
    assert zero["baselines_bits_per_byte"]["xz -9"] > 0


def test_a_killed_run_resumes_to_the_same_numbers(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), *SMOKE, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SHIPPED.parent.parent.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or '"step": 20,' not in log.read_text():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "summary.json").exists()
    with log.open("a") as file:  # what a kill in the middle of a write leaves
        file.write('{"step": 25, "lo')
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=True)
    assert '"step": 5,' not in done.stdout  # it went on, it did not start again
    measured = ("tokens_per_s",)
    for resumed, straight in zip(read_log(tmp_path), read_log(runs / "zero"), strict=True):
        for key in straight.keys() - set(measured):
            assert resumed[key] == pytest.approx(straight[key], rel=1e-4, abs=1e-5), (straight["step"], key)
    assert read_summary(tmp_path)["heldout"]["nats"] == pytest.approx(
        read_summary(runs / "zero")["heldout"]["nats"], rel=1e-4
    )


def test_resuming_with_other_settings_is_refused(scripts: Scripts, runs: Path) -> None:
    with pytest.raises(SystemExit, match=r"other settings \(dropout\)"):
        scripts.train.main([*SMOKE, "--out", str(runs / "zero"), "--resume", "--dropout", "0.5"])


def test_the_time_limit_ends_a_run_with_a_checkpoint(scripts: Scripts, tmp_path: Path) -> None:
    scripts.train.main([*SMOKE, "--out", str(tmp_path), "--minutes", "0.0001"])
    summary = read_summary(tmp_path)
    assert summary["stopped_early"]
    assert 1 <= summary["steps_done"] < 60
    assert summary["best"]["step"] == summary["steps_done"]


def test_no_corpus_or_a_damaged_one_is_said(scripts: Scripts, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"examples/corpus\.py"):
        scripts.model.Corpus(tmp_path, torch.device("cpu"))
    for path in (runs / "zero" / "corpus").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes()[:-2])
    with pytest.raises(SystemExit, match=r"val\.bin doesn't match"):
        scripts.model.Corpus(tmp_path, torch.device("cpu"))


# ---- data and score


def test_every_token_is_a_target_once_with_its_style_known(scripts: Scripts, runs: Path) -> None:
    model = scripts.model
    corpus = model.Corpus(runs / "zero" / "corpus", torch.device("cpu"))
    tokens = corpus.tokens["heldout"]
    inputs, targets = corpus.fixed_rows("heldout", 64)
    assert inputs.shape == targets.shape == (math.ceil(len(tokens) / 64), 64)
    scored = targets.flatten()[: len(tokens)]
    style = model.is_style(tokens)
    assert torch.equal(scored[~style], tokens[~style])
    assert (scored[style] == model.IGNORE).all()
    assert (targets.flatten()[len(tokens) :] == model.IGNORE).all()
    for i in range(len(inputs)):
        before = tokens[: 64 * i + 1]
        assert inputs[i, 0] == before[model.is_style(before)][-1]
        assert torch.equal(inputs[i, 1:], torch.nn.functional.pad(tokens, (0, 64))[64 * i : 64 * i + 63])


def test_an_epoch_is_a_shuffle_that_the_seed_decides(scripts: Scripts, runs: Path) -> None:
    corpus = scripts.model.Corpus(runs / "zero" / "corpus", torch.device("cpu"))
    first, again = corpus.train_rows(64, seed=1, epoch=0), corpus.train_rows(64, seed=1, epoch=0)
    other = corpus.train_rows(64, seed=1, epoch=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert len(first[0]) == corpus.rows_an_epoch(64)
    tokens = corpus.tokens["train"]
    seen = first[1][first[1] != scripts.model.IGNORE].bincount(minlength=400)
    missing = tokens[~scripts.model.is_style(tokens)].bincount(minlength=400) - seen
    assert (missing >= 0).all()
    assert missing.sum() < 128  # less than a row at either end


def test_a_uniform_model_scores_log_vocabulary(scripts: Scripts, runs: Path) -> None:
    model = scripts.model
    corpus = model.Corpus(runs / "zero" / "corpus", torch.device("cpu"))
    config = model.model_config(model.SMOKE, corpus.manifest["vocab_size"], zero_experts=True)
    network = model.build_model(model.SMOKE, config, 1, torch.float32)
    torch.nn.init.zeros_(network.lm_head.weight)
    rows = corpus.fixed_rows("heldout", 64)
    with observe(network) as seen:
        result = model.evaluate(network, seen, rows, batch_rows=7)
    entry = corpus.manifest["splits"]["heldout"]
    assert result["tokens"] == entry["tokens"] - entry["documents"]  # all but the style tokens
    assert result["nats"] == pytest.approx(result["tokens"] * math.log(corpus.manifest["vocab_size"]), rel=1e-6)
    for style, nats in result["nats_by_style"].items():
        count = entry["styles"][style]["tokens"] - entry["styles"][style]["documents"]
        assert nats == pytest.approx(count * math.log(corpus.manifest["vocab_size"]), rel=1e-6)


def test_both_runs_start_from_the_same_shared_weights(scripts: Scripts) -> None:
    model = scripts.model
    zero, plain = (
        model.model_tensors(
            model.build_model(model.SMOKE, model.model_config(model.SMOKE, 384, zeros), 1, torch.bfloat16)
        )
        for zeros in (True, False)
    )
    assert zero.keys() == plain.keys()
    for name, tensor in plain.items():
        if ".router." in name:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, zero[name][: len(tensor)])
            assert len(zero[name]) == model.SMOKE.experts + model.SMOKE.zero_experts
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, zero[name]), name


def test_dropout_acts_in_training_only(scripts: Scripts) -> None:
    model = scripts.model
    network = model.build_model(model.SMOKE, model.model_config(model.SMOKE, 384, True), 1, torch.float32)
    tokens = torch.arange(32)[None]
    plain = network.eval()(input_ids=tokens).logits
    model.add_dropout(network, 0.5)
    assert torch.equal(network(input_ids=tokens).logits, plain)
    network.train()
    assert not torch.equal(network(input_ids=tokens).logits, network(input_ids=tokens).logits)


# ---- files


def test_the_design_fits_what_is_shipped(scripts: Scripts) -> None:
    model = scripts.model
    config = model.model_config(model.TINY, 8192, zero_experts=True)
    entries = {**json.loads(config.to_json_string()), "tie_word_embeddings": False}
    shapes = expected_shapes(entries)
    assert (
        sum(2 * math.prod(shape) for shape in shapes.values()) < 31_800_000
    )  # bfloat16; the header and the router add 0.2
    assert not any(".experts.16." in name for name in shapes)


def test_shards_must_be_one_complete_set(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripts.model
    monkeypatch.setattr(model, "MAX_SHARD_BYTES", 1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    model.save_shards(tensors, tmp_path, {"step": 3})
    assert len(list(tmp_path.iterdir())) == 3
    loaded, about = model.load_shards(tmp_path)
    assert about == {"step": 3, "shards": 3}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    model.save_atomically({"t4": tensors["t4"]}, tmp_path / "weights-3.safetensors", {"step": 4, "shards": 3})
    with pytest.raises(SystemExit, match="one complete set"):
        model.load_shards(tmp_path)
    (tmp_path / "weights-3.safetensors").unlink()
    with pytest.raises(SystemExit, match="one complete set"):
        model.load_shards(tmp_path)


def test_the_export_is_the_original_layout_and_reloads(scripts: Scripts, runs: Path, tmp_path: Path) -> None:
    corpus = runs / "zero" / "corpus"
    scripts.card.export_model(runs / "zero", corpus, tmp_path)
    manifest = verify(tmp_path)
    assert manifest.layout == "original"
    assert manifest.tensors.keys() == expected_shapes(manifest.config).keys()
    router = [info.dtype for name, info in manifest.tensors.items() if ".router." in name]
    assert set(router) == {"F32"}
    assert {info.dtype for name, info in manifest.tensors.items() if ".router." not in name} == {"BF16"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        head, embedding = file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(head, embedding)
    score, summary = scripts.card.score_model(tmp_path, corpus), read_summary(runs / "zero")
    # The run's weights were float32, the file's are bfloat16.
    assert score["bits_per_byte"] == pytest.approx(summary["heldout"]["bits_per_byte"], abs=0.02)
    assert score["ffn_experts_a_token"] == pytest.approx(summary["heldout"]["ffn_experts_a_token"], abs=0.05)


def test_the_card_is_made_of_the_summaries(scripts: Scripts, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"first run .*export"):
        scripts.card.write_card(runs, tmp_path)
    scripts.card.export_model(runs / "zero", runs / "zero" / "corpus", tmp_path)
    scripts.card.write_card(runs, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for name in ("zero", "top4"):
        assert f"{read_summary(runs / name)['heldout']['bits_per_byte']:.3f}" in card
    assert "xz -9" in card
    assert all(f"`<|{style}|>`" in card for style in scripts.corpus.STYLES)
    assert not re.search(r"\$[a-z_]", card)


# ---- what is shipped

shipped = pytest.mark.skipif(
    not (SHIPPED / "model.safetensors").exists(), reason="the embedded model hasn't been trained yet"
)


@shipped
def test_the_shipped_files_are_a_checkpoint_in_the_original_layout() -> None:
    manifest = verify(SHIPPED)
    assert manifest.layout == "original"
    assert manifest.files == ("model.safetensors",)
    assert (SHIPPED / "model.safetensors").stat().st_size <= 32_000_000
    config = manifest.config
    assert (config["n_routed_experts"], config["zero_expert_num"], config["moe_topk"]) == (16, 8, 6)
    assert config["zero_expert_type"] == "identity"
    assert config["mla_scale_q_lora"] is True
    assert config["mla_scale_kv_lora"] is True
    assert config["architectures"] == ["LongcatFlashForCausalLM"]


@shipped
def test_the_shipped_tokenizer_gives_any_text_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert len(tokenizer) == 8192
    assert tokenizer.eos_token_id == 0
    text = "It is a truth universally acknowledged -- zoë, 日本, \t\n\n1790."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<|austen|>", "<|shakespeare|>", "<|bible|>", "<|sotu|>"]) == [1, 2, 3, 4]
    assert tokenizer("<|bible|>")["input_ids"] == [3]


@shipped
def test_the_shipped_model_knows_its_styles() -> None:
    """Sentences from no training text: a model that was loaded wrong needs about 13 bits a token."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(SHIPPED, dtype=torch.float32), AutoTokenizer.from_pretrained(SHIPPED)
    texts = {
        "austen": "Mrs. Grey was persuaded that her sister could not be happy in such a house, and said so.",
        "bible": "And the king of the city said unto his servants, Go ye forth, and gather the people.",
        "sotu": "The revenue of the Government for the fiscal year has exceeded the estimates.",
    }

    @torch.no_grad()
    def bits_a_token(style: str, text: str) -> float:
        ids = tokenizer(f"<|{style}|>{text}", return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids, labels=ids).loss) / math.log(2)

    with observe(model) as seen:
        for style, text in texts.items():
            own = bits_a_token(style, text)
            assert own < 8
            others = [bits_a_token(other, text) for other in texts if other != style]
            assert own < min(others), (style, own, others)
        use = [(routing.topk_ids_TK < 16).sum(-1).float().mean() for routing in seen.values()]
    assert 3 < float(torch.stack(use).mean()) < 5
