"""Train the embedded model, and plain top-4 of the same experts beside it: see README.md in this folder.

    python examples/train_tiny.py train --out runs/zero
    python examples/train_tiny.py train --out runs/top4 --baseline top4
    python examples/train_tiny.py export --runs runs
    python examples/train_tiny.py card --runs runs

LongcatFlashForCausalLM of transformers with zemoe's MoE layers. The loss is cross entropy plus LongCat's group loss;
after every step LongCat's expert-bias controller moves the selection bias towards K_e FFN experts a token. Weights are
bfloat16 on a GPU (float32 on a CPU; the router always), AdamW works on float32 copies of them. Killed at any moment,
the same command with --resume goes on from the last saved step, and gives the same numbers as a run that was never
stopped: batches and dropout depend on the seed and the step alone. No file that is read or written can hold code.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import tiny_card
from corpus import STYLES
from tiny_model import (
    IGNORE,
    SMOKE,
    TINY,
    Corpus,
    Design,
    add_dropout,
    bits_per_byte,
    build_model,
    evaluate,
    ffn_use,
    load_into,
    load_shards,
    load_tensors,
    mean,
    model_config,
    model_tensors,
    parameter_counts,
    save_atomically,
    save_shards,
    smoke_corpus,
    write_json,
)
from zemoe.balance import longcat_balance_loss, slot_counts, update_longcat_bias_
from zemoe.routing import Observed, observe


@dataclass
class Settings:
    """What decides the numbers of a run; kept in every file that it writes."""

    baseline: str | None
    smoke: bool
    steps: int
    seed: int
    learning_rate: float
    warmup: int
    dropout: float
    balance: float
    bias_rate: float
    weight_decay: float
    dtype: str

    @property
    def design(self) -> Design:
        return SMOKE if self.smoke else TINY

    @property
    def top_k(self) -> int:
        return self.design.ffn_target if self.baseline else self.design.top_k

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine to 5 %; as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """AdamW on float32 copies of the weights, gradients clipped to norm 1."""

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        self.names, self.weights = zip(*model.named_parameters(), strict=True)
        self.copies = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        groups = [
            {"params": [c for c in self.copies if c.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [c for c in self.copies if c.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.peak = settings.learning_rate

    def step(self, rate: float) -> Tensor:
        for weight, copy in zip(self.weights, self.copies, strict=True):
            copy.grad = weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = self.peak * rate
        self.adamw.step()
        with torch.no_grad():
            for weight, copy in zip(self.weights, self.copies, strict=True):
                weight.copy_(copy)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        saved = {}
        for name, copy in zip(self.names, self.copies, strict=True):
            saved[f"weight/{name}"] = copy
            for key, value in self.adamw.state[copy].items():
                saved[f"{key}/{name}"] = value
        return saved

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        for name, weight, copy in zip(self.names, self.weights, self.copies, strict=True):
            copy.copy_(saved[f"weight/{name}"])
            weight.copy_(copy)
            self.adamw.state[copy] = {
                "step": saved[f"step/{name}"].to(copy.device),
                "exp_avg": saved[f"exp_avg/{name}"].to(copy.device),
                "exp_avg_sq": saved[f"exp_avg_sq/{name}"].to(copy.device),
            }


@dataclass
class Run:
    """One training run: everything between two steps is in here or in the files under `out` and `state`."""

    settings: Settings
    corpus: Corpus
    out: Path
    state: Path
    device: torch.device
    compile: bool = False
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        design, settings = self.settings.design, self.settings
        config = model_config(design, self.corpus.manifest["vocab_size"], not settings.baseline)
        self.model = build_model(design, config, settings.seed, getattr(torch, settings.dtype)).to(self.device)
        add_dropout(self.model, settings.dropout)
        if self.compile:
            for layer in self.model.model.layers:
                for module in (*layer.self_attn, *layer.mlps):
                    module.compile()
        self.optimizer = Optimizer(self.model, settings)
        self.routers = [layer.mlp.router for layer in self.model.model.layers]
        self.epoch_rows: tuple[int, tuple[Tensor, Tensor]] | None = None

    # ---- one step

    def batch(self) -> tuple[Tensor, Tensor]:
        design = self.settings.design
        per_epoch = self.corpus.rows_an_epoch(design.context) // design.batch_rows
        epoch, index = divmod(self.step, per_epoch)
        if self.epoch_rows is None or self.epoch_rows[0] != epoch:
            self.epoch_rows = epoch, self.corpus.train_rows(design.context, self.settings.seed, epoch)
        part = slice(index * design.batch_rows, (index + 1) * design.batch_rows)
        return self.epoch_rows[1][0][part], self.epoch_rows[1][1][part]

    def train_step(self, seen: Observed) -> dict[str, Tensor]:
        settings, design = self.settings, self.settings.design
        x_BL, y_BL = self.batch()
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # dropout
        seen.clear()
        logits = self.model(input_ids=x_BL, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), y_BL.flatten(), ignore_index=IGNORE)
        wanted = {"num_experts": design.experts, "ffn_experts_per_token": design.ffn_target}
        balance = torch.stack([longcat_balance_loss(routing, **wanted) for routing in seen.values()]).mean()
        (loss + settings.balance * balance).backward()
        rate = settings.rate(self.step)
        norm = self.optimizer.step(rate)
        for router, routing in zip(self.routers, seen.values(), strict=True):
            bias_A = router.e_score_correction_bias
            counts_A = slot_counts(routing.topk_ids_TK, len(bias_A))
            update_longcat_bias_(bias_A, counts_A, top_k=settings.top_k, rate=settings.bias_rate * rate, **wanted)
        use = torch.stack(list(ffn_use(seen, design.experts).values()))
        return {"loss": loss.detach(), "balance": balance.detach(), "norm": norm, "ffn": use}

    # ---- files

    def save(self) -> None:
        buffers = {f"bias/{i}": router.e_score_correction_bias for i, router in enumerate(self.routers)}
        about = {"step": self.step, "best": self.best, "seconds": self.seconds, "settings": vars(self.settings)}
        self.state.mkdir(parents=True, exist_ok=True)
        save_atomically({**self.optimizer.tensors(), **buffers}, self.state / "state.safetensors", about)

    def load(self) -> None:
        path = self.state / "state.safetensors"
        if not path.exists():
            print(f"{path} isn't there: starting from step 0", flush=True)
            return
        saved, about = load_tensors(path)
        if about["settings"] != vars(self.settings):
            changed = {k for k, v in vars(self.settings).items() if about["settings"].get(k) != v}
            raise SystemExit(f"{path}: was trained with other settings ({', '.join(sorted(changed))}); can't resume")
        self.optimizer.load(saved)
        for i, router in enumerate(self.routers):
            router.e_score_correction_bias.copy_(saved[f"bias/{i}"])
        self.step, self.best, self.seconds = about["step"], about["best"], about["seconds"]

    def score(self, split: str, seen: Observed) -> dict[str, Any]:
        design = self.settings.design
        result = evaluate(self.model, seen, self.corpus.fixed_rows(split, design.context), design.batch_rows)
        entry = self.corpus.manifest["splits"][split]
        result["bits_per_byte"] = bits_per_byte(result["nats"], entry["bytes"])
        result["bits_per_byte_by_style"] = {
            style: bits_per_byte(result["nats_by_style"][style], entry["styles"][style]["bytes"])
            for style in STYLES
            if entry["styles"][style]["bytes"]
        }
        result["ffn_experts_a_token"] = mean(result["ffn_by_layer"])
        result["zero_share"] = 1 - result["ffn_experts_a_token"] / self.settings.top_k
        return result

    def validate(self, seen: Observed) -> dict[str, Any]:
        result = self.score("val", seen)
        if not self.best or result["bits_per_byte"] < self.best["bits_per_byte"]:
            self.best = {"step": self.step, "bits_per_byte": result["bits_per_byte"]}
            save_shards(model_tensors(self.model), self.out, {"step": self.step, "settings": vars(self.settings)})
        return result


def open_log(path: Path, step: int) -> Any:
    """The log for appending, without what a killed run wrote after the step that is resumed."""
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8", buffering=1)


def train(run: Run, minutes: float, log_every: int, eval_every: int, save_every: int) -> dict[str, Any]:
    settings, design = run.settings, run.settings.design
    entry = run.corpus.manifest["splits"]["train"]
    bits_a_nat = entry["tokens"] / math.log(2) / entry["bytes"]
    tokens_a_step = design.batch_rows * design.context
    run.out.mkdir(parents=True, exist_ok=True)
    run.model.train()
    begin, before = time.perf_counter(), run.seconds
    last_time, last_step = begin, run.step
    with observe(run.model) as seen, open_log(run.out / "log.jsonl", run.step) as log:
        while run.step < settings.steps and (run.seconds - before) < minutes * 60:
            values = run.train_step(seen)
            run.step += 1
            record: dict[str, Any] = {}
            if run.step % log_every == 0 or run.step in (1, settings.steps):
                loss = float(values["loss"])  # waits for the device
                if not math.isfinite(loss):
                    raise SystemExit(f"step {run.step}: the loss is {loss}; the last good state is in {run.state}")
                now = time.perf_counter()
                ffn_by_layer = [round(use, 4) for use in values["ffn"].tolist()]
                record = {
                    "step": run.step,
                    "loss": loss,
                    "bits_per_byte": loss * bits_a_nat,
                    "balance_loss": float(values["balance"]),
                    "grad_norm": float(values["norm"]),
                    "ffn_experts_a_token": mean(ffn_by_layer),
                    "ffn_by_layer": ffn_by_layer,
                    "zero_share": 1 - mean(ffn_by_layer) / settings.top_k,
                    "lr": settings.learning_rate * settings.rate(run.step - 1),
                    "tokens_per_s": tokens_a_step * (run.step - last_step) / (now - last_time),
                }
                last_time, last_step = now, run.step
            run.seconds = before + time.perf_counter() - begin
            if run.step % eval_every == 0 or run.step == settings.steps:
                result = run.validate(seen)
                record |= {"step": run.step, "val_bits_per_byte": result["bits_per_byte"]}
                record |= {"val_ffn_experts_a_token": result["ffn_experts_a_token"]}
                last_time, last_step = time.perf_counter(), run.step
            if record:
                log.write(json.dumps(record) + "\n")
                left = (settings.steps - run.step) * run.seconds / run.step
                print(json.dumps({**record, "seconds": round(run.seconds, 1), "seconds_left": round(left)}), flush=True)
            if run.step % save_every == 0 and run.step < settings.steps:
                run.save()
        if not run.best or run.step < settings.steps:
            run.validate(seen)
        run.save()
        return finish(run, seen)


def finish(run: Run, seen: Observed) -> dict[str, Any]:
    """Score the best checkpoint on the held-out documents, write summary.json."""
    settings, design = run.settings, run.settings.design
    tensors, about = load_shards(run.out)
    load_into(run.model, tensors)
    heldout = run.score("heldout", seen)
    cuda = run.device.type == "cuda"
    summary = {
        "model": settings.baseline or "zero",
        "settings": vars(settings),
        "design": design._asdict(),
        "config": json.loads(run.model.config.to_json_string()),
        "parameters": parameter_counts(run.model, design.ffn_target),
        "best": {**run.best, "shards_step": about["step"]},
        "steps_done": run.step,
        "stopped_early": run.step < settings.steps,
        "tokens_seen": run.step * design.batch_rows * design.context,
        "epochs": run.step * design.batch_rows / run.corpus.rows_an_epoch(design.context),
        "seconds": run.seconds,
        "heldout": heldout,
        "baselines_bits_per_byte": run.corpus.manifest["heldout_bits_per_byte"],
        "heldout_bytes": run.corpus.bytes_of("heldout"),
        "splits": run.corpus.manifest["splits"],
        "corpus_sha256": run.corpus.manifest["sha256"],
        "tokenizer_sha256": run.corpus.manifest["tokenizer_sha256"],
        "device": torch.cuda.get_device_name(run.device) if cuda else platform.processor() or "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "peak_memory_bytes": torch.cuda.max_memory_allocated(run.device) if cuda else None,
    }
    write_json(run.out / "summary.json", summary)
    return summary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train, export and describe the embedded model.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", help="one run; --baseline top4 for the model without zero experts")
    add.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what examples/corpus.py wrote")
    add.add_argument("--out", type=Path, required=True, help="weights of the best step, log.jsonl, summary.json")
    add.add_argument("--state", type=Path, help="where the optimizer's state goes (default: OUT/state)")
    add.add_argument("--baseline", choices=["top4"], help="no zero experts, the same number of FFN experts a token")
    add.add_argument("--resume", action="store_true", help="go on from the last saved state, if there is one")
    add.add_argument("--smoke", action="store_true", help="a toy model on made-up text, seconds on a CPU")
    add.add_argument("--steps", type=int, default=3000)
    add.add_argument("--minutes", type=float, default=1e9, help="end cleanly after this much training time")
    add.add_argument("--seed", type=int, default=1)
    add.add_argument("--learning-rate", type=float, default=2e-3)
    add.add_argument("--warmup", type=int, default=150)
    add.add_argument("--dropout", type=float, default=0.15)
    add.add_argument("--balance", type=float, default=1e-3, help="coefficient of the group loss")
    add.add_argument("--bias-rate", type=float, default=0.2, help="step of the bias controller at the peak rate")
    add.add_argument("--weight-decay", type=float, default=0.1)
    add.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add.add_argument("--compile", action="store_true", help="torch.compile the attention and dense halves")
    add.add_argument("--log-every", type=int, default=20)
    add.add_argument("--eval-every", type=int, default=100)
    add.add_argument("--save-every", type=int, default=500)
    tiny_card.add_commands(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command == "train":
        run_train(parsed)
    else:
        parsed.run(parsed)


def run_train(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    settings = Settings(
        baseline=arguments.baseline,
        smoke=arguments.smoke,
        steps=arguments.steps,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        warmup=arguments.warmup,
        dropout=arguments.dropout,
        balance=arguments.balance,
        bias_rate=arguments.bias_rate,
        weight_decay=arguments.weight_decay,
        dtype=arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
    )
    folder = smoke_corpus(arguments.out / "corpus") if arguments.smoke else arguments.corpus
    state = arguments.state or arguments.out / "state"
    run = Run(settings, Corpus(folder, device), arguments.out, state, device, arguments.compile)
    if arguments.resume:
        run.load()
    summary = train(run, arguments.minutes, arguments.log_every, arguments.eval_every, arguments.save_every)
    heldout = summary["heldout"]
    print(
        f"{summary['model']}: held-out {heldout['bits_per_byte']:.4f} bits/byte, "
        f"{heldout['ffn_experts_a_token']:.3f} FFN experts a token, "
        f"best step {summary['best']['step']} of {run.step}, {run.seconds:.0f} s",
        flush=True,
    )
    return summary


if __name__ == "__main__":
    main()
