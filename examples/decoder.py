"""A small decoder-only transformer whose feed-forward halves are zemoe's MoE layers: `python examples/decoder.py`.

RMSNorm before each half, causal attention with rotary positions, a mixture of experts, a head tied to the embedding.
The one thing that ready-made decoders can't do is handed on here: a layer's routing logits go to the next layer, where
a router with a gating residual (MoE++) adds them to its own. A router without one never sees them. So the same fifty
lines carry a plain MoE, zero experts, and MoE++'s mix; which one is up to `make_moe`.

Run as a script it trains one of each on a toy language on the CPU, in seconds, steered to a budget of FFN experts.

B rows, L positions, T = B * L tokens, H hidden size, V vocabulary, D size of an attention head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zemoe
from zemoe import MoE, MoEConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of everything but the experts.

    heads divides hidden, and hidden / heads is even (rotary positions turn pairs). context: the most positions.
    """

    vocab_size: int = 8192
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 512
    rope_theta: float = 10000.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(f"hidden={self.hidden} must be heads={self.heads} times an even number")


def rope_table(length: int, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [length, size / 2]: position p turns pair i by p / theta^(2 i / size)."""
    frequencies = theta ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., L, D] with element i of its first half and of its second half turned as a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention: [B, L, H] to [B, L, H]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BLH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, H = x_BLH.shape
        q, k, v = self.qkv_proj(x_BLH).view(B, L, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, H))


class DecoderLayer(nn.Module):
    """Attention and MoE, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, moe: MoE) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-5)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden, eps=1e-5)
        self.moe = moe

    def forward(self, x_BLH: Tensor, cos: Tensor, sin: Tensor, prev_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream, and this layer's routing logits [T, A] for the next layer."""
        x_BLH = x_BLH + self.attention(self.attention_norm(x_BLH), cos, sin)
        takes_logits = self.moe.router.residual is not None
        y_BLH, routing = self.moe(self.moe_norm(x_BLH), prev_logits if takes_logits else None, return_routing=True)
        return x_BLH + y_BLH, routing.logits_TA


class Decoder(nn.Module):
    """Token ids [B, L] to logits [B, L, V].

    Args:
        config: DecoderConfig.
        make_moe: layer number -> MoE over hidden_size = config.hidden. With gating residuals all layers need the same
            number of slots; layer 0 has nothing to take over, and gating_residual=False saves it an unused parameter.
        seed: of the parameters; see `initialise`.

    `zemoe.observe(model)` collects the routing of every layer, for losses and statistics.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig, make_moe: Callable[[int], MoE], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, make_moe(number)) for number in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-5)
        cos, sin = rope_table(config.context, config.hidden // config.heads, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw each matrix from a stream of its own, made of the seed and its name.

        So models that differ in some parameters start equal in all others, and routers with more slots start with the
        same rows for the slots they share. What writes to the residual stream starts smaller, by the root of how many
        do. Norms, scales and gating residuals stay as they are made (1, 1 and 0).
        """
        writers = ("out_proj.weight", "moe.w2", "constant_value")
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.endswith("residual.weight"):
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            std = self.config.init_std
            if name.endswith(writers):
                std /= (2 * self.config.layers) ** 0.5
            for row in parameter:
                row.copy_(torch.randn(row.shape, generator=generator) * std)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Raises ValueError for rows longer than the context."""
        L, most = ids_BL.shape[1], self.config.context
        if most < L:
            raise ValueError(f"ids_BL must have at most context={most} positions, got {L}")
        x_BLH, cos, sin = self.embedding(ids_BL), self.cos[:L], self.sin[:L]
        logits_TA = None
        for layer in self.layers:
            x_BLH, logits_TA = layer(x_BLH, cos, sin, logits_TA)
        return F.linear(self.norm(x_BLH), self.embedding.weight)


# ---- a toy, to see it work ------------------------------------------------------------------------------------------


def plain(number: int) -> MoE:
    return MoE(MoEConfig(hidden_size=32, intermediate_size=32, num_experts=8, top_k=2, routed_scaling_factor=2.0))


def zero_experts(number: int) -> MoE:
    kinds = (("identity", 4),)
    config = MoEConfig(hidden_size=32, intermediate_size=32, num_experts=8, top_k=3, zero_expert_kinds=kinds)
    return MoE(config)


def moe_plus_plus(number: int) -> MoE:
    return MoE.moe_plus_plus(32, 32, 8, 3, zero=1, copy=1, constant=2, gating_residual=number > 0)


def toy_batch(step: int) -> Tensor:
    """Rows in which a number x is followed by (3 x + 1) modulo 61."""
    row = torch.randint(61, (16,), generator=torch.Generator().manual_seed(step))
    rows = [row]
    for _ in range(32):
        rows.append((3 * rows[-1] + 1) % 61)
    return torch.stack(rows, dim=1)


def train_toy(make_moe: Callable[[int], MoE], steps: int = 60, wanted: float = 2.0) -> tuple[float, float]:
    """(loss, FFN experts a token) after some steps with LongCat's balance loss and controller."""
    model = Decoder(DecoderConfig(vocab_size=64, hidden=32, layers=2, heads=2, context=32), make_moe)
    routers = [layer.moe.router for layer in model.layers]
    E, K = routers[0].config.num_experts, routers[0].config.top_k
    budget = {"num_experts": E, "ffn_experts_per_token": wanted}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss, used = torch.tensor(0.0), torch.tensor(0.0)
    with zemoe.observe(model) as seen:
        for step in range(steps):
            ids_BL = toy_batch(step)
            seen.clear()
            logits = model(ids_BL[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten())
            balance = sum(zemoe.balance.longcat_balance_loss(routing, **budget) for routing in seen.values())
            optimizer.zero_grad()
            (loss + 1e-3 * balance).backward()
            optimizer.step()
            all_counts = [zemoe.balance.slot_counts(r.topk_ids_TK, r.logits_TA.shape[1]) for r in seen.values()]
            for router, counts_A in zip(routers, all_counts, strict=True):
                zemoe.balance.update_longcat_bias_(
                    router.e_score_correction_bias, counts_A, top_k=K, rate=0.2, **budget
                )
            used = torch.stack([zemoe.balance.ffn_experts_per_token(counts, E, K) for counts in all_counts]).mean()
    return float(loss.detach()), float(used)


def main() -> None:
    torch.manual_seed(0)
    for name, make_moe in (("plain", plain), ("zero experts", zero_experts), ("MoE++", moe_plus_plus)):
        loss, used = train_toy(make_moe)
        print(f"{name:12}  loss {loss:.3f} nats (a blind guess: 4.159)  {used:.2f} FFN experts a token")


if __name__ == "__main__":
    main()
