"""The command as people and programs use it: output, errors, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points, version

import pytest
import torch
from typer.testing import CliRunner

import zemoe
from helpers.judge import one_thread
from helpers.tiny_checkpoint import CONTEXT, byte_tokenizer, write_checkpoint
from zemoe.backends import BACKENDS
from zemoe.cli import app, main
from zemoe.compile_loops import compile_loops
from zemoe.generate import command as generate_module
from zemoe.generate.command import EMBEDDED, OPENINGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def compiled_loops():
    """Compile the CPU's loops, or `zemoe generate` would say on stderr that it does, once in a fresh checkout."""
    with one_thread():
        compile_loops(torch.device("cpu"), torch.float32)


@pytest.fixture
def generate(checkpoint, compiled_loops, capsys):
    """Run `zemoe generate` on the random checkpoint; the exit code, stdout and stderr."""

    def run(*arguments, model=checkpoint):
        code = main(["generate", "--model", str(model), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------- the command


def test_version_and_entry_point(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zemoe {zemoe.__version__}\n"
    assert version("zemoe") == zemoe.__version__
    (script,) = entry_points(group="console_scripts", name="zemoe")
    assert script.value == "zemoe_main:main"


def test_help():
    runner = CliRunner()
    shown = runner.invoke(app(), ["--help"])
    assert shown.exit_code == 0
    commands = re.findall(r"^│ (\w+) {2}", shown.output, re.M)
    assert commands == ["generate", "doctor", "bench", "train", "report"]
    shown = runner.invoke(app(), ["generate", "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    options = "prompt style max-new-tokens temperature top-p seed model backend device dtype json"
    for option in options.split(" "):
        assert f" --{option} " in shown.output


def test_without_a_command_it_helps(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: zemoe" in out and err == ""


# ---------------------------------------------------------------------------------------------------------- generate


def test_text_and_table(generate):
    code, out, err = generate("--seed", 7, "--max-new-tokens", 30)
    assert (code, err) == (0, "")
    headline, empty, *text = out.split("\n")
    assert headline.endswith("2 layers, 4 of 5 FFN and 3 zero experts a token; style austen") and empty == ""
    assert text[0].startswith(OPENINGS["austen"])
    for name in (
        "prompt",
        "decoding",
        "FFN experts",
        "zero share",
        "  layer 0",
        "  layer 1",
        "backend",
        "stopped by",
        "seed",
    ):
        assert re.search(rf"^{name}  +\S", out, re.M), name
    assert re.search(r"^backend +cpu: the first that works on cpu in torch.float32", out, re.M)
    assert re.search(r"^seed +7 *$", out, re.M)
    assert re.search(r"^stopped by +--max-new-tokens *$", out, re.M)
    assert "\x1b" not in out


def test_json(generate):
    code, out, err = generate("--json", "--seed", 7, "--prompt", "the sea", "--style", "bible", "--max-new-tokens", 20)
    assert code == 0
    result = json.loads(out)
    assert out.count("\n") == 1
    assert "FFN experts" in err and "the sea" in err
    assert result["text"] in err
    ids = [token["id"] for token in result["tokens"]]
    assert len(ids) == 20
    assert result["text"] == byte_tokenizer().decode(ids) == "".join(token["text"] for token in result["tokens"])
    prompt_ids = [token["id"] for token in result["prompt_tokens"]]
    assert prompt_ids == [byte_tokenizer().token_to_id("<|bible|>"), *byte_tokenizer().encode("the sea").ids]
    for token in result["tokens"] + result["prompt_tokens"]:
        assert token["ffn_experts"] == sum(token["ffn_experts_by_layer"])
        assert len(token["ffn_experts_by_layer"]) == result["num_layers"] == 2
    assert result["mean_ffn_experts"] == pytest.approx(sum(token["ffn_experts"] for token in result["tokens"]) / 20)
    for layer, entry in enumerate(result["layers"]):
        mean = sum(token["ffn_experts_by_layer"][layer] for token in result["tokens"]) / 20
        assert entry == pytest.approx({"layer": layer, "mean_ffn_experts": mean, "zero_share": 1 - mean / 4})
    assert result["sampling"] == {"temperature": 0.8, "top_p": 0.95, "seed": 7}
    assert (result["prompt"], result["style"], result["finish"]) == ("the sea", "bible", "length")
    assert (result["device"], result["dtype"], result["backend"]["name"]) == ("cpu", "float32", "cpu")
    assert (result["num_experts"], result["num_zero_experts"], result["top_k"]) == (5, 3, 4)
    for part, tokens in (("prompt", len(prompt_ids)), ("decode", 20)):
        timing = result["timing"][part]
        assert timing["tokens"] == tokens
        assert timing["tokens_per_second"] == pytest.approx(tokens / timing["seconds"])


def tokens_of(result) -> list[int]:
    assert result[0] == 0
    return [token["id"] for token in json.loads(result[1])["tokens"]]


def test_seed_repeats_and_is_told(generate):
    first = tokens_of(generate("--json", "--seed", 1))
    assert first == tokens_of(generate("--json", "--seed", 1))
    assert first != tokens_of(generate("--json", "--seed", 2))
    drawn = json.loads(generate("--json")[1])
    again = tokens_of(generate("--json", "--seed", drawn["sampling"]["seed"]))
    assert again == [token["id"] for token in drawn["tokens"]]
    assert json.loads(generate("--json")[1])["sampling"]["seed"] != drawn["sampling"]["seed"]


def test_sampling_options_reach_the_draw(generate):
    greedy = tokens_of(generate("--json", "--temperature", 0, "--seed", 1))
    assert greedy == tokens_of(generate("--json", "--temperature", 0, "--seed", 2))
    assert greedy == tokens_of(generate("--json", "--top-p", 1e-9, "--seed", 3))
    assert greedy != tokens_of(generate("--json", "--seed", 3))


def test_the_context_ends_it(generate):
    result = json.loads(generate("--json", "--max-new-tokens", 10000)[1])
    assert result["finish"] == "context"
    assert len(result["tokens"]) + len(result["prompt_tokens"]) == CONTEXT


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_backend_is_the_one_that_computes(generate, monkeypatch, name):
    """Both backends' ops are counted, so a name that is shown but not used would be found out."""
    monkeypatch.setattr("zemoe.generate.command.compile_loops", lambda *_: None)
    calls = {"cpu": 0, "torch": 0}
    for backend in calls:
        ops = {field: getattr(BACKENDS[backend], field) for field in ("train", "infer")}

        def spy(*args, op, backend=backend):
            calls[backend] += 1
            return op(*args)

        spies = {field: partial(spy, op=op) for field, op in ops.items()}
        monkeypatch.setitem(BACKENDS, backend, replace(BACKENDS[backend], **spies))
    code, out, _ = generate("--json", "--backend", name, "--max-new-tokens", 3, "--seed", 1)
    assert code == 0
    assert json.loads(out)["backend"]["name"] == name
    assert json.loads(out)["backend"]["reason"].startswith("asked for")
    other = "torch" if name == "cpu" else "cpu"
    assert calls == {name: 2 * 4, other: 0}, "two layers, the prompt and three tokens"


def test_dtype(generate):
    for name in ("bfloat16", "float64"):
        assert json.loads(generate("--json", "--dtype", name, "--max-new-tokens", 2)[1])["dtype"] == name


def test_threads_are_given_back(generate):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert generate("--max-new-tokens", 2)[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_style_in_the_prompt_is_text(checkpoint, generate):
    result = json.loads(generate("--json", "--prompt", "<|bible|> a <|endoftext|>", "--max-new-tokens", 1)[1])
    tokenizer = byte_tokenizer()
    marks = [tokenizer.token_to_id(mark) for mark in ("<|austen|>", "<|bible|>", "<|endoftext|>")]
    ids = [token["id"] for token in result["prompt_tokens"]]
    assert ids[0] == marks[0] and not set(marks) & set(ids[1:])
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == "<|bible|> a <|endoftext|>"


def test_a_model_without_styles(checkpoint, tmp_path, generate):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    path.write_text(json.dumps(tokenizer))
    result = json.loads(generate("--json", "--max-new-tokens", 2, model=folder)[1])
    assert result["style"] is None and result["prompt"] == OPENINGS["austen"]
    code, _, err = generate("--style", "austen", model=folder)
    assert (code, err) == (2, "zemoe: error: --style must be left out (this model has none), got 'austen'\n")


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", " \n "], "--prompt is empty"),
        (["--prompt", "\udcff"], "--prompt must be valid UTF-8"),
        (["--prompt", "z" * 200], f"--prompt must be shorter than the model's context of {CONTEXT} tokens, got 201"),
        (["--style", "homer"], "--style must be one of austen, bible, got 'homer'"),
        (["--style", "<|endoftext|>"], "--style must be one of austen, bible"),
        (["--backend", "abacus"], f"--backend must be one of {sorted(BACKENDS)}, got 'abacus'"),
        (["--device", "abacus"], "--device must be one that torch can use here (cpu"),
        (["--device", "meta"], "--device must be one that torch can use here (cpu"),
        (["--device", "cuda:77"], "--device must be one that torch can use here (cpu"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["--temperature", "-1"], "--temperature must be a finite number >= 0, got -1.0"),
        (["--temperature", "nan"], "--temperature must be a finite number"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", str(10**30)], "--seed must be at least 0"),
        (["--seed", "one"], "--seed"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--poem"], "--poem"),
        (["--prompt"], "--prompt"),
    ],
)
def test_what_is_asked_wrongly(generate, arguments, said):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("zemoe: error: ") and said in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_unknown_command(capsys):
    assert main(["sing"]) == 2
    assert "'sing'" in capsys.readouterr().err


def damage_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def damage_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "BP')


def set_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def empty_model_in_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": {}}')


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def other_json_for_tokenizer(folder):
    (folder / "tokenizer.json").write_text("[]")


def foreign_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] += [dict(content["added_tokens"][0], id=5000, content="<|poe|>")]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def nan_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def only_config(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_config, "config.json: model_type must be 'longcat_flash'"),
        (
            set_config(rope_parameters={"rope_type": "spiral"}),
            "rope_parameters: rope_type must be one of default, ",
        ),
        (set_config(rope_parameters={"rope_type": "yarn"}), "factor"),
        (set_config(head_dim=6), "config.json: head_dim must be qk_rope_head_dim = 8"),
        (set_config(num_key_value_heads=1), "config.json: num_key_value_heads must be num_attention_heads = 2"),
        (set_config(rms_norm_eps="small"), "rms_norm_eps"),
        (set_config(max_position_embeddings=None), "max_position_embeddings"),
        (set_config(num_hidden_layers="two"), "config.json"),
        (set_config(eos_token_id={}), "eos_token_id"),
        (set_config(dtype="float99"), "float99"),
        (set_config(dtype=32), "config.json: dtype must be the name of a float dtype"),
        (empty_model_in_tokenizer, "tokenizer.json: does not work as a tokenizer ("),
        (damage_weights, "truncated"),
        (only_config, "model.safetensors: no such file"),
        (no_tokenizer, "tokenizer.json: not readable as a tokenizer ("),
        (damage_tokenizer, "tokenizer.json: not readable as a tokenizer ("),
        (other_json_for_tokenizer, "tokenizer.json: is not a tokenizer"),
        (foreign_tokenizer, "tokenizer.json: does not belong to this model"),
        (nan_weights, "the model's logits are not finite"),
    ],
)
def test_a_damaged_model(generate, checkpoint, tmp_path, damage, said):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    damage(folder)
    code, out, err = generate("--style", "poe" if damage is foreign_tokenizer else "austen", model=folder)
    assert code == 1
    assert err.startswith("zemoe: error: ") and said in err and err.count("\n") == 1
    assert out == "" or out.endswith("\n"), "what was begun is ended with its line"


def test_wrong_paths(generate, tmp_path):
    (tmp_path / "file").touch()
    for path, found in ((tmp_path / "nowhere", "nothing"), (tmp_path / "file", "a file")):
        code, _, err = generate(model=path)
        assert code == 2
        assert err == f"zemoe: error: --model must be a LongCat-Flash checkpoint folder, found {found} at {path}\n"
    code, _, err = generate(model=tmp_path)
    assert code == 1 and "config.json: no such file" in err


def test_too_little_memory(generate, monkeypatch):
    errors = (torch.OutOfMemoryError("out of memory.\nTried"), MemoryError(), RuntimeError("can't allocate memory: 1"))
    for error in errors:

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(generate_module, "generate", fail)
        code, _, err = generate()
        assert code == 1 and err.count("\n") == 1 and "emory" in err


def test_other_errors_are_not_hidden(generate, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(generate_module, "generate", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        generate()


def test_click_runner_sees_the_same(checkpoint):
    result = CliRunner().invoke(app(), ["generate", "--model", str(checkpoint), "--style", "homer"])
    assert result.exit_code == 2
    assert result.output.startswith("zemoe: error: --style")


# --------------------------------------------------------------------------------------------------- the real thing


def test_the_embedded_model(capsys):
    """No arguments but a seed: English in the style of Austen, about four of six choices an FFN expert, in seconds."""
    start = time.perf_counter()
    assert main(["generate", "--json", "--seed", "1"]) == 0
    seconds = time.perf_counter() - start
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(EMBEDDED) and result["style"] == "austen"
    assert len(result["tokens"]) == 200 or result["finish"] == "end"
    words = re.findall(r"[a-z]+", result["text"].lower())
    common = set(re.findall(r"\w+", "the and of to a in her she was he that not it had be as with his for you"))
    assert sum(word in common for word in words) > 0.2 * len(words) > 20
    assert 12 < result["mean_ffn_experts"] < 20
    counts = [token["ffn_experts"] for token in result["tokens"]]
    assert max(counts) - min(counts) >= 6, "tokens differ in what they use"
    assert seconds < 60


def test_the_embedded_models_styles(capsys):
    for style in OPENINGS:
        assert main(["generate", "--style", style, "--seed", "1", "--max-new-tokens", "3"]) == 0
        assert OPENINGS[style].splitlines()[-1] in capsys.readouterr().out
    assert main(["generate", "--style", "homer"]) == 2
    assert "must be one of austen, shakespeare, bible, sotu, got 'homer'" in capsys.readouterr().err
