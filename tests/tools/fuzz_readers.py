"""The good folders that fuzz_folders.py damages, and what reads them and judges what was read."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETS = ["train.rows=2", "data.context=16", "run.log_every=1", "run.eval_every=2", "run.save_every=2", "train.seed=3"]
TEXT = "In the morning the sea was still, and in the evening the wind came over it.\n" * 40
PROMPT = "the sea"
TOML = """[model]
hidden_size = 16
num_layers = 2
q_lora_rank = 8
moe_topk = 3
[data]
context = 16
heldout = 0.25
[train]
steps = 3
learning_rate = 2e-3
dtype = "float32"
[run]
save_every = 2
[report]
plots = false
"""

# --------------------------------------------------------------------------------------------------------- good folders


def make_good_folders(base: Path) -> None:
    """Checkpoints in every layout and a run with two states, in `base`."""
    import torch
    from safetensors.torch import load_file, save_file

    import zemoe.integrations.transformers as bridge
    from helpers import moepp, zeda
    from helpers.tiny_checkpoint import write_checkpoint, write_fp8
    from zemoe.cli import main
    from zemoe.training import state

    torch.set_num_threads(1)
    plain = write_checkpoint(base / "plain")
    (plain / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 0}')
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    write_fp8(plain, base / "fp8")
    write_checkpoint(base / "tied", tie_word_embeddings=True, attention_bias=True)
    shutil.copytree(plain, base / "packed")
    tensors = bridge.load_model(plain).state_dict()
    save_file(tensors, base / "packed" / "model.safetensors", metadata={"format": "pt"})
    shards = shutil.copytree(plain, base / "shards")
    tensors, index = load_file(shards / "model.safetensors"), {}
    (shards / "model.safetensors").unlink()
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, shards / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("moepp", "moepp-shards", "qwen", "glm"):
        (base / name).mkdir()
    moepp.written(base / "moepp")
    moepp.written(base / "moepp-shards", shards=3)
    zeda.written("qwen3_moe_plus_plus", base / "qwen")
    zeda.written("glm4_moe_lite_plus_plus", base / "glm", "copy")
    (base / "text.txt").write_text(TEXT)
    state._PART_BYTES = 20_000  # a state of several files
    # Of the run to resume: all but the last two steps are done. Its end is known from one that was never stopped.
    common = ["train", "--from", str(plain), "--data", str(base / "text.txt")]
    for name, steps in (("whole", 6), ("run", 4)):
        out = ["--out", str(base / name), "--set", f"train.steps={steps}"]
        assert main([*common, *out, *(part for change in SETS for part in ("--set", change))]) == 0
    shutil.rmtree(base / "run")
    shutil.copytree(base / "whole", base / "run")
    shutil.rmtree(base / "run" / "states" / "step-00000006")


# --------------------------------------------------------------------------------------------------- what files do say


def stored_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def stock_logits(folder: Path, ids: list[int]) -> Any:
    """Logits [T, V] in float32 of transformers' own model, from config.json's numbers and the tensors as they are."""
    import torch
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    about = json.loads((folder / "config.json").read_text())
    own = set(LongcatFlashConfig.__annotations__) - {"architectures", "dtype"} | {"rope_scaling", "rope_theta"}
    config = LongcatFlashConfig(**{key: value for key, value in about.items() if key in own})
    stored = stored_tensors(folder)
    block = (about.get("quantization_config") or {}).get("weight_block_size")
    found = {}
    for name, tensor in stored.items():
        if name + "_scale_inv" in stored:
            factors, whole = stored[name + "_scale_inv"].float(), tensor.float()
            for i in range(whole.shape[0]):
                for j in range(factors.shape[1]):
                    whole[i, j * block[1] : (j + 1) * block[1]] *= factors[i // block[0], j]
            tensor = whole
        found[name] = tensor.float()
    model = LongcatFlashForCausalLM(config)
    if "lm_head.weight" in found:  # counts, also where the config ties it and it differs
        model.lm_head.weight = torch.nn.Parameter(found["lm_head.weight"].clone())
    with torch.no_grad():
        for name, mine in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name in found and found[name].shape == mine.shape:
                mine.copy_(found[name])
            elif name in found:  # packed without rows for zero experts
                mine[: len(found[name])] = found[name]
            elif ".experts." in name:
                prefix, which = name.rsplit(".", 1)
                for e in range(config.n_routed_experts):
                    parts = ("gate", "up") if which == "gate_up_proj" else ("down",)
                    mine[e] = torch.cat([found[f"{prefix}.{e}.{part}_proj.weight"] for part in parts])
        return model.eval()(torch.tensor([ids])).logits[0]


def close(found: Any, wanted: Any) -> bool:
    """Up to float32's rounding; NaN and infinities where the other has them."""
    import torch

    found, wanted = found.detach(), wanted.detach()
    usual = float(wanted[wanted.isfinite()].abs().mean()) if wanted.isfinite().any() else 0.0
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * usual + 1e-6, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------- readers
# Each returns the exit code, and what is wrong with what it gave, if something is.

IDS = [5, 17, 99, 200, 33, 60]


def read_load_model(case: Path) -> tuple[int, str]:
    import torch

    from zemoe.integrations.transformers import load_model

    try:
        model = load_model(case, dtype=torch.float32)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1, ""
    ids = [i % model.config.vocab_size for i in IDS]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return 0, "" if close(logits, stock_logits(case, ids)) else "other logits than transformers' own model"


def read_generate(case: Path) -> tuple[int, str]:
    from tokenizers import Tokenizer

    from zemoe.cli import main

    arguments = f"generate --model {case} --json --temperature 0 --max-new-tokens 4 --dtype float32".split()
    code = main([*arguments, "--prompt", PROMPT])
    sys.stdout.flush()
    if code:
        return code, ""
    sys.stdout.flush()
    told = json.loads(Path("stdout").read_text())
    prompt, made = ([token["id"] for token in told[key]] for key in ("prompt_tokens", "tokens"))
    stored = json.loads((case / "tokenizer.json").read_text())
    stored["model"].pop("dropout", None)
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    wanted = tokenizer.encode(PROMPT, add_special_tokens=told["style"] is None).ids
    if prompt[-len(wanted) :] != wanted:
        return code, f"prompt ids {prompt}, not {wanted}"
    logits = stock_logits(case, prompt + made)[len(prompt) - 1 : -1] if made else []
    for at, token in zip(logits, made, strict=True):
        if at[token] < at.max() - 1e-3 * at.abs().max():
            return code, f"token {token} is not the likeliest"
    return code, ""


def read_start(case: Path) -> tuple[int, str]:
    import torch

    from zemoe.cli import main
    from zemoe.integrations.transformers import load_model

    sets = [*SETS, "train.steps=1", "train.learning_rate=1e-30"]
    arguments = [
        "train",
        "--from",
        str(case),
        "--data",
        str(case.parent / "text.txt"),
        "--out",
        str(case.parent / "out"),
    ]
    code = main([*arguments, *(part for change in sets for part in ("--set", change))])
    if code:
        return code, ""
    export = case.parent / "out" / "export"
    given, exported = (load_model(folder, dtype=torch.float32) for folder in (case, export))
    for (name, tensor), (_, other) in zip(given.named_parameters(), exported.named_parameters(), strict=True):
        if not close(other, tensor):
            return code, f"{name} was exported with other numbers"
    here, there = ({path.name for path in folder.iterdir()} for folder in (case, export))
    return code, "" if there >= here & {"chat_template.jinja"} else "chat_template.jinja was not exported"


def read_dry_run(case: Path) -> tuple[int, str]:
    from zemoe.cli import main

    return main(["train", "--dry-run", "--from", str(case), "--data", str(case.parent / "text.txt"), "--json"]), ""


def read_moepp(case: Path) -> tuple[int, str]:
    import torch

    from helpers.moepp import restated_model
    from zemoe.integrations.transformers.moepp import load_moepp

    try:
        model: Any = load_moepp(case, dtype=torch.float32)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1, ""
    ids = torch.tensor([5, 17, 3, 20, 11, 6]) % model.config.vocab_size
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    # What published code takes for an entry that is absent.
    about = {"moe_use_mixtral_gating": False, "moe_2layer_gate": False, "moe_use_logits_norm": False}
    about |= {"moe_feature_no_mul_topk": False, "moe_gate_norm_std": 1.0, "tie_word_embeddings": False}
    about |= {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048}
    about |= json.loads((case / "config.json").read_text())
    wanted = restated_model(stored_tensors(case), about, ids)[0].float()
    return 0, "" if close(logits, wanted) else "other logits than the files say"


def read_zeda(case: Path) -> tuple[int, str]:
    import torch
    from safetensors.torch import load_file

    from helpers import zeda
    from zemoe.integrations.transformers.zeda import load_zeda

    try:
        model: Any = load_zeda(case, dtype=torch.float32)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1, ""
    stored, loaded = load_file(case / "model.safetensors"), model.state_dict()
    for name, tensor in stored.items():
        if name in loaded and loaded[name].shape == tensor.shape and not close(loaded[name], tensor.float()):
            return 0, f"{name} was loaded with other numbers"
    x_TH = torch.randn(9, zeda.H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(torch.tensor([[5, 17, 3, 20]]) % model.config.vocab_size)
        found = model.get_submodule(zeda.BLOCK)(x_TH[None])[0]
    about = json.loads((case / "config.json").read_text())
    usual = zeda.CONFIGS[about["model_type"]].to_dict() | {"use_zce_mask": False}
    deciding = [key for key in usual if re.search("expert|topk|group|routed|score|hidden_act|zce", key)]
    if any(about.get(key) != usual[key] for key in deciding):
        return 0, ""  # another block than the restatement's
    wanted = zeda.restated(about["model_type"], stored, x_TH, about["zce_types"][0]).float()
    return 0, "" if close(found, wanted) else "the block gives other numbers than the files say"


def read_toml(case: Path) -> tuple[int, str]:
    from zemoe.cli import main

    file = case / "settings.toml"
    code = main(["train", "--dry-run", "--json", "--config", str(file), "--data", str(case.parent / "text.txt")])
    sys.stdout.flush()
    if code:
        return code, ""
    planned = json.loads(Path("stdout").read_text())["settings"]
    for section, table in tomllib.loads(file.read_bytes().decode()).items():
        for key, value in table.items():
            if isinstance(planned[section][key], float):
                value = float(value)
            if planned[section][key] != value:
                return code, f"{section}.{key} is {planned[section][key]!r}, the file says {value!r}"
    return code, ""


def read_resume(case: Path) -> tuple[int, str]:
    from safetensors.torch import load_file

    from zemoe.cli import main

    code = main(["train", "--resume", "--out", str(case)])
    last = case / "states" / "step-00000006"
    if code or not last.exists():
        return code, "" if code else "no state of the last step"
    whole = case.parent.parent / "base" / "whole" / "states" / last.name
    good, found = (
        {name: tensor for file in sorted(folder.glob("tensors-*")) for name, tensor in load_file(file).items()}
        for folder in (whole, last)
    )
    wrong = [name for name in good if name not in found or not found[name].equal(good[name])]
    return code, f"goes on with other numbers: {wrong[0]}" if wrong else ""


def read_report(case: Path) -> tuple[int, str]:
    from zemoe.cli import main

    return main(["report", str(case)]), ""


# How often each reader is drawn, and what it is: a folder to its exit code and what is wrong, "" for nothing.
READERS: dict[str, tuple[int, Callable[[Path], tuple[int, str]]]] = {
    "load_model": (10, read_load_model),
    "generate": (8, read_generate),
    "start": (3, read_start),
    "dry_run": (2, read_dry_run),
    "resume": (4, read_resume),
    "report": (3, read_report),
    "moepp": (4, read_moepp),
    "zeda": (4, read_zeda),
    "toml": (3, read_toml),
}
