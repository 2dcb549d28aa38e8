"""Trains one arm with one seed. On a GPU a whole step, optimizer included, is one CUDA graph.

B rows, L positions, T = B * L tokens, E FFN experts, A slots, K choices, M layers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from arms import ARMS, Settings, build_model
from torch import Tensor

from tiny_model import IGNORE, Corpus
from zemoe import observe
from zemoe.balance import longcat_balance_loss, slot_counts, update_longcat_bias_

WARM_STEPS = 3  # that run launch by launch before a graph is captured: kernels get compiled, workspaces made
BLOCK = 50  # steps between two looks at the clock


class Training:
    """A model, its optimizer and its batches. Close it before the next one: a graph holds its memory.

    Args:
        graph: capture the step; CUDA only.
    """

    def __init__(self, settings: Settings, arm_name: str, seed: int, corpus: Corpus, device: torch.device, graph: bool):
        self.settings, self.arm, self.seed, self.corpus, self.device = settings, ARMS[arm_name], seed, corpus, device
        self.captures = graph
        self.model = build_model(settings, self.arm, seed, corpus.manifest["vocab_size"]).to(device)
        self.routers = [layer.moe.router for layer in self.model.layers]
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.learning_rate = torch.zeros((), device=device)  # a graph reads it anew at each replay
        cuda = device.type == "cuda"
        rules = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True, "capturable": cuda}
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, **rules)
        shape = (settings.batch_rows, settings.context)
        self.x_BL = torch.zeros(shape, dtype=torch.int64, device=device)
        self.y_BL = torch.zeros(shape, dtype=torch.int64, device=device)
        self.history = torch.zeros(settings.steps, 3 + 2 * settings.layers, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.epoch_rows: tuple[int, tuple[Tensor, Tensor]] | None = None
        self.contexts = ExitStack()
        self.synchronize()  # what was made so far was made on another stream
        # Everything, capture included, on one stream of its own: then no graph has to wait for another stream.
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.contexts.enter_context(nullcontext() if self.stream is None else torch.cuda.stream(self.stream))
        self.seen = self.contexts.enter_context(observe(self.model))
        self.wanted = {"num_experts": settings.experts, "ffn_experts_per_token": float(self.arm.ffn_target)}

    def close(self) -> None:
        """Give back the memory and the hooks."""
        self.synchronize()
        self.contexts.close()
        self.seen.clear()
        self.outputs = self.graph = self.epoch_rows = None
        del self.model, self.optimizer, self.parameters, self.routers
        gc.collect()  # modules and hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def autocast(self) -> torch.autocast:
        """bfloat16 products on a GPU, float32 on a CPU; no cache of casts, which a graph could not renew."""
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)

    def losses(self, x_BL: Tensor, y_BL: Tensor) -> Tensor:
        """Nats of each target [T], 0 where there is nothing to score; the routing is in `seen` afterwards."""
        self.seen.clear()
        with self.autocast():
            logits = self.model(x_BL)
        return F.cross_entropy(logits.float().flatten(0, 1), y_BL.flatten(), ignore_index=IGNORE, reduction="none")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Depends on seed and step alone, not on the arm."""
        rows, context = self.settings.batch_rows, self.settings.context
        epoch, index = divmod(step, self.corpus.rows_an_epoch(context) // rows)
        if self.epoch_rows is None or self.epoch_rows[0] != epoch:
            self.epoch_rows = epoch, self.corpus.train_rows(context, self.seed, epoch)
        part = slice(index * rows, (index + 1) * rows)
        return self.epoch_rows[1][0][part], self.epoch_rows[1][1][part]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Forward, backward and optimizer on the batch in the buffers: (what `history` keeps, counts [M, A])."""
        self.optimizer.zero_grad(set_to_none=True)
        nats_T = self.losses(self.x_BL, self.y_BL)
        loss = nats_T.sum() / (self.y_BL != IGNORE).sum()
        routings = list(self.seen.values())
        balance = torch.stack([longcat_balance_loss(routing, **self.wanted) for routing in routings]).mean()
        (loss + self.settings.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            A = self.settings.slots(self.arm)
            counts_MA = torch.stack([slot_counts(routing.topk_ids_TK, A) for routing in routings])
            ffn_MT = torch.stack([(r.topk_ids_TK < self.settings.experts).sum(-1) for r in routings]).float()
            numbers = torch.stack([loss.detach(), balance.detach(), norm])
            return torch.cat([numbers, ffn_MT.mean(1), ffn_MT.std(1)]), counts_MA

    def step(self, step: int) -> None:
        """One step of the optimizer and one of the bias controller."""
        x_BL, y_BL = self.batch(step)
        self.x_BL.copy_(x_BL)
        self.y_BL.copy_(y_BL)
        self.learning_rate.fill_(self.settings.learning_rate * self.settings.rate(step))
        if not self.captures or step < WARM_STEPS:
            self.outputs = self.compute()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.outputs = self.compute()
            self.graph.replay()
        assert self.outputs is not None
        numbers, counts_MA = self.outputs
        self.history[step].copy_(numbers)
        self.steer(counts_MA, self.settings.bias_rate * self.settings.cosine(step))

    def steer(self, counts_MA: Tensor, rate: float) -> None:
        """The LongCat controller, in every arm: for a plain one it spreads the load, with K_e = K."""
        for router, counts_A in zip(self.routers, counts_MA, strict=True):
            bias_A = router.e_score_correction_bias
            update_longcat_bias_(bias_A, counts_A, top_k=self.settings.choices(self.arm), rate=rate, **self.wanted)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Move the bias alone, by the same controller, until K_e holds on the validation text.

        A model has seen its training text, so that K_e there need not be K_e on text that is new to it.
        """
        inputs_RL, targets_RL = self.corpus.fixed_rows("val", self.settings.context)
        x, y = inputs_RL.split(self.settings.batch_rows), targets_RL.split(self.settings.batch_rows)
        A = self.settings.slots(self.arm)
        for number in range(self.settings.calibration):
            x_BL, y_BL = x[number % len(x)], y[number % len(y)]
            self.losses(x_BL, y_BL)
            scored_T = y_BL.flatten() != IGNORE
            counts = [slot_counts(routing.topk_ids_TK, A, scored_T) for routing in self.seen.values()]
            self.steer(torch.stack(counts), self.settings.bias_rate * (1 - number / self.settings.calibration))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def train(self, validate: Callable[[int], None], advance: Callable[[int], None]) -> list[float]:
        """All steps; `validate(step)` ten times. Milliseconds a step of every block of steps, validation left out.

        Raises:
            RuntimeError: when the loss is not finite.
        """
        settings, milliseconds, begin = self.settings, [], 0
        milestones = {round(settings.steps * (i + 1) / 10) for i in range(10)}
        self.synchronize()
        clock = time.perf_counter()
        for step in range(settings.steps):
            self.step(step)
            done = step + 1
            if done % BLOCK and done not in milestones and done != WARM_STEPS + 1:
                continue
            self.synchronize()
            now = time.perf_counter()
            if done > WARM_STEPS + 1 or not self.captures:  # else it holds compiling and the capture
                milliseconds.append((now - clock) * 1e3 / (done - begin))
            advance(done - begin)
            loss = float(self.history[step, 0])
            if not math.isfinite(loss):
                raise RuntimeError(f"step {done}: the loss is {loss}")
            if done in milestones:
                validate(done)
                self.synchronize()
            clock, begin = time.perf_counter(), done
        return milliseconds

    def curve(self, points: int = 50) -> dict[str, Any]:
        """Means over equal stretches of the training steps, plain numbers."""
        stretches = [part for part in self.history.tensor_split(points) if len(part)]
        means = torch.stack([part.mean(0) for part in stretches]).double().tolist()
        ends = torch.tensor([len(part) for part in stretches]).cumsum(0).tolist()
        M = self.settings.layers
        return {
            "step": ends,
            "loss": [row[0] for row in means],
            "balance_loss": [row[1] for row in means],
            "grad_norm": [row[2] for row in means],
            "ffn_by_layer": [row[3 : 3 + M] for row in means],
            "ffn_std_by_layer": [row[3 + M :] for row in means],
        }
