"""The model of a run: transformers' LongCat-Flash with zemoe's layers, made anew or from a checkpoint.

E FFN experts, Z zero experts, K choices, K_e FFN experts a token wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashForCausalLM
from transformers.utils import logging

from ..checkpoints.config import check_config
from ..checkpoints.fp8 import verify_any
from ..checkpoints.longcat import count_numbers
from ..integrations.transformers import applied, load_config, load_model
from ..machine import total_bytes
from ..regular_files import MOST_JSON_BYTES, kind_of, read_bytes
from .data import END_OF_TEXT
from .settings import ModelSettings, Settings, SettingsError

_PACKAGE = Path(__file__).parent.parent
# What else of a checkpoint folder goes into what is made of it.
_KEPT = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "NOTICE",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_BYTES_OF_MODULES = 200_000  # Python objects of a layer: 120,000 were measured


def start_folder(name: str) -> Path:
    """Return the checkpoint folder called `name`; "models/tiny" is the embedded one, where there is no other."""
    for folder in (Path(name), _PACKAGE / name):
        if kind_of(folder) == "a folder":
            return folder
    raise SettingsError(f"model.start must be a checkpoint folder, or models/tiny, got {name!r}")


def read_start(folder: Path) -> LongcatFlashConfig:
    """Return its config. Raises SettingsError if there is none that makes sense, or the weights don't agree with it."""
    try:
        verify_any(folder)
        return load_config(folder)
    except ValueError as error:
        raise SettingsError(f"model.start: {error}") from None


def new_config(model: ModelSettings, tokenizer: Any, context: int) -> LongcatFlashConfig:
    """Return the config of a new model for the tokens of `tokenizer`. Raises SettingsError for sizes that don't fit."""
    sizes = {name: value for name, value in vars(model).items() if name not in ("start", "tokenizer")}
    # For engines; transformers only hands them on.
    published: dict[str, Any] = {"zero_expert_type": "identity", "router_dtype": "float32"}
    published |= {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    try:
        config = LongcatFlashConfig(
            **(sizes | published | {"vocab_size": tokenizer.get_vocab_size()}),
            head_dim=model.qk_rope_head_dim,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
            pad_token_id=None,
            tie_word_embeddings=True,
        )
        check_config(_entries(config), "model")
    except StrictDataclassError as error:  # what transformers checks when it makes one
        raise SettingsError(f"model: {error.__cause__ or error}") from None
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return config


def check_fits(config: LongcatFlashConfig) -> None:
    """Raise SettingsError for a model that this machine has no memory for, before any is taken.

    Every process makes the weights in float32 before it shares them; each layer has modules beside them.
    """
    needs, there = 4 * count_numbers(_entries(config)) + _BYTES_OF_MODULES * config.num_layers, total_bytes()
    if there is not None and needs > there:
        raise SettingsError(
            f"model: {needs / 1e9:,.0f} GB of weights don't fit into this machine's memory of {there / 1e9:,.0f} GB; "
            "make model.num_layers, model.n_routed_experts or another size smaller, or begin with a smaller checkpoint"
        )


def _entries(config: LongcatFlashConfig) -> dict[str, Any]:
    return dict(vars(config), model_type=config.model_type)


def wanted_ffn_experts(config: LongcatFlashConfig, wanted: float) -> float:
    """K_e: `wanted`, or for 0 two thirds of K (all of K without zero experts); SettingsError if it can't be reached."""
    E, Z, K = config.n_routed_experts, config.zero_expert_num or 0, config.moe_topk
    if not Z:
        if wanted not in (0, K):
            raise SettingsError(f"train.ffn_experts must be 0 or K={K} without zero experts, got {wanted}")
        return float(K)
    least = max(K - Z, 0)
    budget = wanted or 2 * K / 3
    if not least < budget < K or budget > E:
        raise SettingsError(
            f"train.ffn_experts must be above {least} and below K={K}, and at most E={E}, got {wanted:g}"
            + ("" if wanted else f", which stands for {budget:g} here")
        )
    return budget


def end_of(config: LongcatFlashConfig) -> int | None:
    """Return the id that ends a text."""
    end: Any = config.eos_token_id
    return (end[0] if end else None) if isinstance(end, list) else end


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def build(config: LongcatFlashConfig, seed: int, start: Path | None) -> LongcatFlashForCausalLM:
    """Build a model in float32 on the CPU, in training mode: weights drawn from `seed`, or those of the folder `start`.

    Raises:
        SettingsError: for a checkpoint that is damaged, naming file and tensor.
    """
    if start is not None:
        try:
            with _no_progress_bar():
                return load_model(start, dtype=torch.float32).train()
        except (ValueError, OSError) as error:
            raise SettingsError(f"model.start: {error}") from None
    with torch.random.fork_rng(devices=[]), applied():
        torch.manual_seed(seed)
        return LongcatFlashForCausalLM(config).train()


def checkpoint_activations(model: LongcatFlashForCausalLM) -> None:
    """Keep what enters a layer and compute the rest again in backward; the kind that balance losses work with."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # the older one warns where there is this
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@dataclass(frozen=True)
class Parameters:
    """total: all numbers that are trained. active: those that a token which uses K_e FFN experts needs."""

    total: int
    active: int


def count_parameters(config: LongcatFlashConfig, ffn_experts: float) -> Parameters:
    """Count each shared parameter once, and no selection bias."""
    slots = config.n_routed_experts + (config.zero_expert_num or 0)
    total = count_numbers(_entries(config)) - config.num_layers * slots
    expert = 3 * config.hidden_size * config.expert_ffn_hidden_size
    return Parameters(total, round(total - config.num_layers * (config.n_routed_experts - ffn_experts) * expert))


def companions(settings: Settings, start: Path | None) -> dict[str, bytes]:
    """Return {name: content} of the files that belong beside weights, config and tokenizer.json."""
    if start is not None:
        templates = sorted(path.name for path in (start / _TEMPLATES).glob("*.jinja"))
        names = [*_KEPT, *(f"{_TEMPLATES}/{name}" for name in templates)]
        return {name: read_bytes(start / name, MOST_JSON_BYTES) for name in names if (start / name).is_file()}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": settings.data.context,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer_config.json": (json.dumps(about, indent=1) + "\n").encode()}
