"""Damaged folders through everything that reads them: `make fuzz N=2000 SEED=1`, or `python -m tools.fuzz_folders`.

Each case copies a good checkpoint or run, damages one thing of it (fuzz_mutations.py) and hands it to one reader.
Either the reader refuses: exit code 1 or 2, and one line of at most 500 plain characters that names the file, tensor
or key. Or it gives what the files say, which is computed here another way, with transformers' own layers and tensors
read one by one.
No case may end in a traceback, run code of the folder, hang, or take much more memory than the folder has bytes.

Cases run one after the other in a worker process, so that imports are paid once; it is killed where a case hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

SOURCE = ROOT / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT / "tests")]), "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
SECONDS = 60  # a case that takes longer hangs
MEMORY = 10**9  # beside the folder's size, above what the worker held before
SETS = ["train.rows=2", "data.context=16", "run.log_every=1", "run.eval_every=2", "run.save_every=2", "train.seed=3"]
TEXT = "In the morning the sea was still, and in the evening the wind came over it.\n" * 40
PROMPT = "the sea"
READERS = {"load_model": 10, "generate": 8, "start": 3, "dry_run": 2, "resume": 4, "report": 3}
READERS |= {"moepp": 4, "zeda": 4, "toml": 3}
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
# What an error may name: a file of a folder or of the command line.
NAMES = re.compile(
    r"config\.json|model[\w.-]*\.safetensors|index\.json|part[\w.-]*\.safetensors|tokenizer\.json|metrics\.jsonl|"
    r"settings\.json|state\.json|tensors-\d+\.safetensors|corpus\.safetensors|text\.txt|pytorch_model\.bin|/case\b|"
    r"data\.\w+|train\.\w+|model\.\w+|model: \w+ must|run\.\w+|settings\.toml|report\.\w+|--prompt"
)

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


# -------------------------------------------------------------------------------------------------------------- worker


def prepare(base: Path, folder: Path, seed: int, number: int) -> tuple[str, Path, str]:
    """The reader of a case, what it reads and what is wrong with that."""
    from tools.fuzz_mutations import mutate, mutate_safetensors

    draw = random.Random(f"{seed}/{number}")
    reader = draw.choices(list(READERS), list(READERS.values()))[0]
    case, text = folder / "case", folder / "text.txt"
    shutil.copy(base / "text.txt", text)
    if reader in ("resume", "report"):
        source = "run"
        shutil.copytree(base / source, case)
        names = ["settings.json", "tokenizer.json", "corpus.safetensors", "metrics.jsonl"]
        state = case / "states" / "step-00000004"
        parts = sorted(state.glob("tensors-*"))
        targets = [case / name for name in names] + [state / "state.json", draw.choice(parts)]
        target = case / "metrics.jsonl" if reader == "report" else draw.choice(targets)
        if target in parts and draw.random() < 0.5:
            for other in draw.sample(parts, draw.randint(1, len(parts))):
                if other != target:
                    mutate_safetensors(other, draw)
    elif reader == "toml":
        source = "toml"
        case.mkdir()
        target = case / "settings.toml"
        target.write_text(TOML)
    else:
        of_others = {"moepp": ["moepp", "moepp-shards"], "zeda": ["qwen", "glm"]}
        source = draw.choice(of_others.get(reader, ["plain", "plain", "shards", "packed", "tied", "fp8"]))
        shutil.copytree(base / source, case)
        weights = [path for path in case.iterdir() if path.suffix == ".safetensors" or "index" in path.name]
        targets = [case / "config.json"] * (12 if reader in of_others else 4) + sorted(weights) * 3
        targets += [case / "tokenizer.json"] * 2
        targets += [text] * (reader in ("start", "dry_run")) + [case / "generation_config.json"]
        target = draw.choice([path for path in targets if path.exists()])
    return reader, case, f"{source}: {mutate(target, draw)}"


def one_case(base: Path, folder: Path, seed: int, number: int) -> dict[str, Any]:
    """Run a case in `folder`, with both output streams in files there."""
    reader, case, damage = prepare(base, folder, seed, number)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())
    os.chdir(folder)
    kept = os.dup(1), os.dup(2), sys.stdout, sys.stderr
    for number_of, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number_of)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number_of, "w", closefd=False) for number_of in (1, 2))  # noqa: SIM115
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = memory("VmRSS"), time.monotonic()
    try:
        code, wrong = globals()[f"read_{reader}"](case)
    except BaseException:
        code, wrong = -1, "traceback: " + traceback.format_exc()[-1500:]
    seconds, peak = time.monotonic() - begin, memory("VmHWM") - before
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    sys.stdout, sys.stderr = kept[2:]
    os.close(kept[0])
    os.close(kept[1])
    told = (folder / "stderr").read_bytes()[:5000].decode(errors="replace")
    if not wrong and peak > size + MEMORY:
        wrong = f"took {peak / 1e6:.0f} MB"
    if not wrong and any(path.name == "executed" for path in folder.rglob("executed")):
        wrong = "code of the folder was executed"
    about = {"reader": reader, "damage": damage, "code": code, "told": told, "seconds": seconds, "peak": peak}
    return about | {"wrong": wrong or wrong_words(code, told, reader)}


def wrong_words(code: int, told: str, reader: str) -> str:
    """What is wrong with the standard error stream."""
    if "Traceback" in told or "panicked" in told:
        return f"a traceback: {told}"
    if code == 0:
        return ""
    begin = "" if reader in ("load_model", "moepp", "zeda") else "zemoe: error: "
    if reader == "generate" and begin in told:  # what it had written by then goes there too
        told = told[told.index(begin) :]
    if code not in (1, 2):
        return f"exit code {code}"
    line = told.removesuffix("\n")
    if not told.endswith("\n") or not line.startswith(begin) or len(line) > 500 or not line.isprintable():
        return f"not one plain line of at most 500 characters: {line!r}"
    return "" if NAMES.search(line) else f"names neither file nor tensor nor key: {line}"


def memory(key: str) -> int:
    """In bytes, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def work(base: Path) -> None:
    """Read lines of seed and number, write a line of JSON for each."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    torch.set_num_threads(1)
    for line in sys.stdin:
        seed, number = map(int, line.split())
        folder = base.parent / f"{seed}-{number}"
        folder.mkdir()
        answers.write(json.dumps(one_case(base, folder, seed, number)) + "\n")
        answers.flush()
        os.chdir(base)
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------------------- driver


class Worker:
    """A process that runs cases; a new one after each that hangs or dies."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, seed: int, number: int) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "tools.fuzz_folders", "--worker", str(self.base)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{seed} {number}\n".encode())
        self.process.stdin.flush()
        end = time.monotonic() + SECONDS + 60 * (number == 0)
        while time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                if line := self.process.stdout.readline():
                    return json.loads(line)
                break
            if self._memory() > 8 * 10**9:
                break
        wrong = "died" if self.process.poll() is not None else f"hangs, or takes {self._memory() / 1e9:.1f} GB"
        self.close()
        return {"reader": "?", "damage": "?", "code": -1, "told": "", "seconds": SECONDS, "peak": 0, "wrong": wrong}

    def _memory(self) -> int:
        assert self.process is not None
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def fuzz(count: int, seed: int, first: int = 0) -> list[dict[str, Any]]:
    """Run `count` cases from number `first` on; what was found of each."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        quiet: Any = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT}
        subprocess.run([sys.executable, "-m", "tools.fuzz_folders", "--make", str(base)], **quiet)
        worker = Worker(base)
        try:
            return [{"number": number} | worker.run(seed, number) for number in range(first, first + count)]
        finally:
            worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to run one again")
    parser.add_argument("--show", action="store_true", help="print every case")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        make_good_folders(asked.make)
        return 0
    if asked.worker:
        work(asked.worker)
        return 0
    begin = time.monotonic()
    found = fuzz(asked.cases, asked.seed, asked.first)
    for case in found:
        if case["wrong"] or asked.show:
            print(f"{case['number']} {case['reader']}, {case['damage']}: {case['wrong'] or case['told'] or 'accepted'}")
    wrong, refused = sum(bool(case["wrong"]) for case in found), sum(case["code"] in (1, 2) for case in found)
    slow, large = max(case["seconds"] for case in found), max(case["peak"] for case in found)
    print(
        f"seed {asked.seed}: {len(found)} cases in {time.monotonic() - begin:.0f} s, {refused} refused, {wrong} wrong; "
        f"the slowest {slow:.1f} s, the largest {large / 1e6:.0f} MB"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
