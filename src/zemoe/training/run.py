"""The training loop: steps, held-out evaluation, states, export, and what is told about them.

E FFN experts, Z zero experts, K choices a token, K_e FFN experts a token wanted, L tokens of context.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..balance import longcat_balance_loss
from ..compile_loops import compile_loops
from ..controller import BudgetController
from ..machine import device_name, versions
from ..routing import observe
from ..statistics import RoutingTally
from .data import IGNORE, Rows
from .export import export
from .files import Files, Prepared, prepare_run
from .model import build, checkpoint_activations, companions, count_parameters
from .optimizer import Optimizer, rate
from .parallel import Ranks, ranks
from .records import routing_record
from .settings import Settings
from .state import TrainingError, Writer, copy_into
from .stopping import Stop, stopping

Record = dict[str, Any]


class Diverged(TrainingError):
    """The loss or the gradient is NaN or infinite; the message names the step and what to do."""


def train(settings: Settings, *, resume: bool, listener: Callable[[Record], None]) -> Record:
    """Train a language model, on every process that torchrun started or on this one alone.

    Under `settings.run.out` it writes settings.json, tokenizer.json, corpus.safetensors (the encoded text),
    metrics.jsonl, states/, and export/: the checkpoint that was best on the held-out text, which for a run that begins
    with a trained model may be that model, scored before the first step. Each is whole or not there.
    The same settings give the same numbers, also when a run was killed and resumed: what a step computes depends on
    the state before it and on the seed. When that holds to the bit is in docs/train.md, "To the bit".

    SIGINT and SIGTERM end the run after the step: its state is saved. Another SIGINT raises KeyboardInterrupt at once,
    as the first one does before there is a step.

    Args:
        resume: go on from the last state; from the start if there is none yet.
        listener: called with each record, and on the first process only. Records are dicts of plain values, of kind
            "run" (what is trained), "train" (a step; `loss` and `balance_loss` are means since the last such record,
            in nats a token, the rest is of this step), "eval", "saved" and "end". They are the lines of metrics.jsonl.

    Returns:
        The "end" record: reason "finished" or "stopped"; signal: the name of the one that came, None if it came to
        another process.

    Raises:
        SettingsError: for what can't be trained as it was asked for; nothing has been changed.
        StateError: for a file that could not be written, or a state that could not be read.
        Diverged: if the loss or gradient is not finite; after an "end" record with the reason "diverged".
        RankError: if another process has failed or is gone. What fails on one process fails on all.
    """
    with (
        ranks(settings.run) as processes,
        Files(Path(settings.run.out), writes=processes.first) as files,
    ):
        return _train(settings, processes, files, listener, resume=resume)


def _train(
    settings: Settings, processes: Ranks, files: Files, listener: Callable[[Record], None], *, resume: bool
) -> Record:
    """Do `train` between joining and leaving the other processes: the model must be gone before they part."""
    prepared = prepare_run(settings, processes, files, resume=resume)
    trainer = Trainer(settings, processes, files, prepared, listener)
    compile_loops(processes.device, trainer.dtype, gradients=True)  # or the first step would look slow
    with stopping() as stop:  # not before: there is nothing to save, and a signal may end the process at once
        return trainer.run(stop)


@dataclass
class Progress:
    """What a state says beside its tensors. losses: of the steps since the last "train" record, summed."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_bits: float | None = None
    lm_sum: float = 0.0
    balance_sum: float = 0.0
    summed: int = 0


class Trainer:
    """One process of a run. Between two steps, all of it is in `progress`, the parameters, the optimizer and biases."""

    def __init__(
        self,
        settings: Settings,
        processes: Ranks,
        files: Files,
        prepared: Prepared,
        listener: Callable[[Record], None],
    ) -> None:
        self.settings, self.ranks, self.files, self.listener = settings, processes, files, listener
        self.corpus = prepared.corpus
        config, train, reader = prepared.config, settings.train, prepared.reader
        self.K_e = prepared.ffn_experts
        self.E, self.Z, self.K = config.n_routed_experts, config.zero_expert_num or 0, config.moe_topk
        with processes.together():
            self.companions = companions(settings, prepared.start) | {"tokenizer.json": prepared.tokenizer}
            self.model = build(config, train.seed, prepared.start if reader is None else None)
        self.parameters = count_parameters(self.model.config, self.K_e)
        if train.checkpoint_activations:
            checkpoint_activations(self.model)
        self.wrapped = processes.wrap(self.model)
        self.optimizer = Optimizer(self.model, train)
        self.routers = {
            name.removesuffix(".e_score_correction_bias"): buffer
            for name, buffer in self.model.named_buffers()
            if name.endswith(".e_score_correction_bias")
        }
        self.tally = RoutingTally(self.E)
        self.controller = BudgetController(self.E, self.K_e, train.bias_rate)
        self.rows = Rows(self.corpus.train, settings.data.context, train.seed)
        self.dtype = torch.float32
        if train.dtype == "bfloat16" or (train.dtype == "auto" and processes.device.type == "cuda"):
            self.dtype = torch.bfloat16
        self.progress = Progress()
        self.unread: list[Tensor] = []  # of steps: LM loss, balance loss, gradient norm; on the device
        self.busy = 0.0  # seconds in steps since the last "train" record
        self.since = 0  # the step of it
        if reader is not None:
            with processes.together():
                copy_into(dict(self._tensors()), reader)
            self.progress = Progress(**reader.about["progress"])
            self.since = self.progress.step

    # ---- a step

    def _micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [rows, L] of this process: its part of micro-batch `number` of the step."""
        train = self.settings.train
        parts = train.accumulate * self.ranks.world
        count = train.rows // parts
        first = self.progress.step * train.rows + (number * self.ranks.world + self.ranks.rank) * count
        inputs, targets = self.rows.batch(first, count)
        return self.ranks.put(inputs), self.ranks.put(targets)

    def _logits(self, model: Any, inputs: Tensor) -> Tensor:
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return model(input_ids=inputs, use_cache=False).logits.float()

    def _step(self) -> None:
        train, step = self.settings.train, self.progress.step
        torch.manual_seed((train.seed * 1_000_003 + step) * self.ranks.world + self.ranks.rank)  # a model's dropout
        losses = torch.zeros(2, device=self.ranks.device)
        self.tally.clear()
        with observe(self.model) as seen:
            for number in range(train.accumulate):
                seen.clear()
                inputs, targets = self._micro_batch(number)
                with self.ranks.sharing_gradients(self.wrapped, number == train.accumulate - 1):
                    logits = self._logits(self.wrapped, inputs)
                    lm_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                    balance = torch.stack(
                        [
                            longcat_balance_loss(routing, num_experts=self.E, ffn_experts_per_token=self.K_e)
                            for routing in seen.values()
                        ]
                    ).mean()
                    ((lm_loss + train.balance * balance) / train.accumulate).backward()
                losses += torch.stack([lm_loss.detach(), balance.detach()]) / train.accumulate
                self.tally.add(seen)
                self.controller.add(seen, self.routers)
        norm = self.optimizer.step(step)
        self.unread.append(torch.stack([*losses, norm]))
        self.tally.all_reduce_()
        self.controller.all_reduce_()
        self.controller.update_(self.routers)
        self.progress.step += 1

    def _read_losses(self) -> float:
        """Add up the losses of the steps since the last call, which waits for the device; the last gradient norm.

        Raises:
            Diverged: for the first step of them in which a number is not finite.
        """
        progress = self.progress
        numbers_S3 = self.ranks.sum_(torch.stack(self.unread).double()) / self.ranks.world
        self.unread.clear()
        first = progress.step - len(numbers_S3) + 1
        for step, (lm_loss, balance, norm) in enumerate(numbers_S3.tolist(), first):
            for what, value in (("loss", lm_loss), ("balance loss", balance), ("gradient's norm", norm)):
                if not math.isfinite(value):
                    raise Diverged(
                        f"the {what} is {value} at step {step}; {self.files.last_state()}; a smaller "
                        "train.learning_rate or a longer train.warmup may help"
                    )
            progress.lm_sum += lm_loss
            progress.balance_sum += balance
            progress.summed += 1
        return numbers_S3[-1, 2].item()

    # ---- the loop

    def run(self, stop: Stop) -> Record:
        """Take all steps that are left, or those until a stop is asked for. Returns the "end" record."""
        self._tell(self._run_record())
        try:
            reason = self._steps(stop)
        except Diverged:
            self._tell(self._end_record("diverged"))
            raise
        end = self._end_record(reason) | {"signal": stop.signal if reason == "stopped" else None}
        self._tell(end)
        return end

    def _steps(self, stop: Stop) -> str:
        progress, run, steps = self.progress, self.settings.run, self.settings.train.steps

        def due(every: int) -> bool:
            return progress.step % every == 0 or progress.step == steps

        if progress.step == 0 and self.settings.model.start:
            self._evaluate()  # an export is never worse than what the run began with
        while progress.step < steps:
            begin = time.perf_counter()
            self._step()
            stopped = self.ranks.any(stop.asked)
            log, score, save = due(run.log_every) or progress.step == 1, due(run.eval_every), due(run.save_every)
            norm = self._read_losses() if log or score or save or stopped else math.nan
            record = self._train_record(norm) if log else None
            passed = time.perf_counter() - begin
            self.busy += passed
            progress.seconds += passed
            if record is not None:
                self._tell(self._with_speed(record))
            if score:
                self._evaluate()
            if save or stopped:
                self._save()
            if stopped and progress.step < steps:
                return "stopped"
        return "finished"

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        """Return the mean loss in nats a token over the held-out text, on all ranks together."""
        data, train, processes = self.settings.data, self.settings.train, self.ranks
        total = torch.zeros(2, dtype=torch.float64, device=processes.device)
        self.model.eval()
        for inputs, targets in self.corpus.heldout_batches(
            train.rows // (train.accumulate * processes.world),
            data.context,
            data.heldout_tokens,
            processes.rank,
            processes.world,
        ):
            targets = processes.put(targets)
            logits = self._logits(self.model, processes.put(inputs))
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            total += torch.stack([nats.double(), (targets != IGNORE).sum().double()])
        self.model.train()
        nats, count = processes.sum_(total).tolist()
        return nats / count

    def _evaluate(self) -> None:
        begin = time.perf_counter()
        loss = self._heldout_loss()
        bits = loss / math.log(2) * self.corpus.heldout_tokens_per_byte
        progress = self.progress
        best = progress.best_bits is None or bits < progress.best_bits
        if not math.isfinite(loss):
            start = self.settings.model.start
            where = f"at step {progress.step}" if progress.step else f"of model.start={start}, before the first step"
            raise Diverged(f"the held-out loss is {loss} {where}; {self.files.last_state()}")
        if best:
            progress.best_step, progress.best_bits = progress.step, bits
            run = self.settings.run
            with self.ranks.together(), self.files.writing("the export"):
                export(
                    self.model,
                    self.files.export,
                    self.companions,
                    layout=run.layout,
                    dtype=getattr(torch, run.export_dtype),
                    writes=self.ranks.first,
                )
        progress.seconds += time.perf_counter() - begin
        self._tell(
            {
                "kind": "eval",
                "step": progress.step,
                "heldout_loss": loss,
                "heldout_bits_per_byte": bits,
                "best": best,
            }
        )

    # ---- states and records

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.optimizer.tensors()
        for layer, bias in self.routers.items():
            yield f"bias/{layer}", bias

    def _save(self) -> None:
        with self.ranks.together():
            writer = Writer(self.files.states, self.progress.step, writes=self.ranks.first)
        with self.ranks.together():  # then the state is there for all
            writer.add(self._tensors())
            about = {
                "settings": self.settings.that_decide(),
                "corpus": self.corpus.fingerprint,
                "tokens": self.corpus.sha256,
                "tokenizer": hashlib.sha256(self.companions["tokenizer.json"]).hexdigest(),
                "progress": vars(self.progress),
                **self.files.metrics_so_far(),
            }
            path = writer.finish(about, self.settings.run.keep)
        self._tell({"kind": "saved", "step": self.progress.step, "path": str(path)})

    def _tell(self, record: Record) -> None:
        with self.ranks.together():
            if self.ranks.first:
                self.files.write(record)
                self.listener(record)

    def _run_record(self) -> Record:
        settings, corpus = self.settings, self.corpus
        return {
            "kind": "run",
            "step": self.progress.step,
            "steps": settings.train.steps,
            "parameters": self.parameters.total,
            "active_parameters": self.parameters.active,
            "k_e": self.K_e,
            "choices": self.K,
            "ffn_slots": self.E,
            "zero_slots": self.Z,
            "layers": len(self.routers),
            "device": device_name(str(self.ranks.device)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "world": self.ranks.world,
            "tokens_per_step": settings.train.rows * settings.data.context,
            "train_tokens": len(corpus.train),
            "heldout_tokens": len(corpus.heldout),
            "versions": versions(),
        }

    def _train_record(self, norm: float) -> Record:
        """Return all of the record but the speed; start new means."""
        progress, settings = self.progress, self.settings
        loss, balance = progress.lm_sum / progress.summed, progress.balance_sum / progress.summed
        progress.lm_sum, progress.balance_sum, progress.summed = 0.0, 0.0, 0
        return {
            "kind": "train",
            "step": progress.step,
            "tokens": progress.step * settings.train.rows * settings.data.context,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * self.corpus.train_tokens_per_byte,
            "balance_loss": balance,
            "learning_rate": settings.train.learning_rate * rate(settings.train, progress.step - 1),
            "grad_norm": norm,
            **routing_record(self.tally, self.routers, self.E),
        }

    def _with_speed(self, record: Record) -> Record:
        settings, steps = self.settings, self.progress.step - self.since
        speed = steps * settings.train.rows * settings.data.context / self.busy
        self.busy, self.since = 0.0, self.progress.step
        by_layer = record.pop("by_layer")
        return {**record, "tokens_per_s": speed, "by_layer": by_layer}

    def _end_record(self, reason: str) -> Record:
        progress = self.progress
        return {
            "kind": "end",
            "step": progress.step,
            "reason": reason,
            "seconds": progress.seconds,
            "best_step": progress.best_step,
            "best_heldout_bits_per_byte": progress.best_bits,
            "start_is_best": progress.best_step == 0,
            "export": str(self.files.export) if self.files.export.exists() else None,
        }
