"""What is compared: eight arms that spend the same FFN compute within a group, and all that they share.

H hidden size, I expert width, E FFN experts, Z zero-computation experts, A = E + Z slots, K choices, K_e FFN experts
a token.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from decoder import Decoder, DecoderConfig
from zemoe import MoE, MoEConfig

# The weight with which a chosen expert starts where scores are not renormalised; the scaling factor makes it so.
FIRST_WEIGHT = 0.25


class Arm(NamedTuple):
    """label: for people. ffn_target: K_e. plain: the arm with as much compute and without zero experts.

    zero: "" for none, the kind of all Z experts, or "moe++" for its mix with gating residuals.
    """

    label: str
    ffn_target: int
    zero: str
    plain: str


ARMS = {
    "plain4": Arm("plain top-4", 4, "", "plain4"),
    "identity4": Arm("identity, K_e = 4", 4, "identity", "plain4"),
    "null4": Arm("null, K_e = 4", 4, "zero", "plain4"),
    "moepp4": Arm("MoE++ mix, K_e = 4", 4, "moe++", "plain4"),
    "plain3": Arm("plain top-3", 3, "", "plain3"),
    "identity3": Arm("identity, K_e = 3", 3, "identity", "plain3"),
    "plain5": Arm("plain top-5", 5, "", "plain5"),
    "identity5": Arm("identity, K_e = 5", 5, "identity", "plain5"),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, but for arm and seed. Equal in all arms.

    steps: of the optimizer. context: positions a row. batch_rows: rows a step. balance: coefficient of the group loss.
    bias_rate: mu of the bias controller at the peak of the schedule. calibration: controller updates after training.
    """

    steps: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    experts: int = 16
    zero_experts: int = 8
    top_k: int = 6
    expert_width: int = 128
    context: int = 512
    batch_rows: int = 32
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    balance: float = 1e-3
    bias_rate: float = 0.2
    calibration: int = 100
    backend: str | None = None

    def cosine(self, step: int) -> float:
        """1 until the warm-up is over, then a cosine down to 5 % at the last step: the bias controller's schedule."""
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    def rate(self, step: int) -> float:
        """The learning rate's schedule, from step 0: as `cosine`, with a linear warm-up."""
        return min(1.0, (step + 1) / max(1, self.warmup)) * self.cosine(step)

    def slots(self, arm: Arm) -> int:
        """A."""
        return self.experts + (self.zero_experts if arm.zero else 0)

    def choices(self, arm: Arm) -> int:
        """K."""
        return self.top_k if arm.zero else arm.ffn_target

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mix(total: int) -> dict[str, int]:
    """MoE++'s zero, copy and constant experts of its 7B model, 1 : 1 : 2."""
    return {"zero": total // 4, "copy": total // 4, "constant": total - 2 * (total // 4)}


def make_moe(settings: Settings, arm: Arm, number: int) -> MoE:
    """The MoE of layer `number`."""
    sizes = {
        "hidden_size": settings.width,
        "intermediate_size": settings.expert_width,
        "num_experts": settings.experts,
        "top_k": settings.choices(arm),
    }
    if arm.zero == "moe++":  # its own rule: the weights of what was chosen, less zero experts, sum to 1
        counts = mix(settings.zero_experts)
        return MoE.moe_plus_plus(**sizes, **counts, gating_residual=number > 0, backend=settings.backend)
    config = MoEConfig(
        **sizes,
        zero_expert_kinds=((arm.zero, settings.zero_experts),) if arm.zero else (),
        routed_scaling_factor=FIRST_WEIGHT * settings.slots(arm),
    )
    return MoE(config, backend=settings.backend)


def build_model(settings: Settings, arm: Arm, seed: int, vocab_size: int) -> Decoder:
    """The model of an arm. With one seed, parameters of the same name and shape start equal in all arms."""
    config = DecoderConfig(vocab_size, settings.width, settings.layers, settings.heads, settings.context)
    return Decoder(config, lambda number: make_moe(settings, arm, number), seed)
