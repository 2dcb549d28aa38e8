"""A small random LongCat-Flash with the head sizes that vLLM's CPU attention takes, and what transformers makes of it.

Run in the engine's environment (`make test-vllm`): everything here is float32 and greedy, but one checkpoint in FP8.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, PreTrainedTokenizerFast

from helpers.vllm_fp8 import BLOCK, in_blocks
from zemoe.checkpoints.longcat import save_original_layout

# H = 224 is no multiple of 256, but of 32, which vLLM's own experts ask for; E = 6, Z = 5 and K = 4 differ, so that a
# mix-up shows; two layers: one may be wrong.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 224,
    "num_layers": 2,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 4,
    "n_routed_experts": 6,
    "zero_expert_num": 5,
    "expert_ffn_hidden_size": 40,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.06,
}
# Blocks of FP8 divide these.
FP8_SIZES = {"hidden_size": 256, "expert_ffn_hidden_size": 128}
FP8_CONFIG = {
    "dtype": "bfloat16",
    "disable_quant_module": ["self_attn", "mlps"],
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
# What vLLM asks for and transformers has no field for.
ENGINE = {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
NEW_TOKENS = 16
LENGTHS = [1, 2, 3, 5, 8, 13, 17, 21, 30, 33, 40, 47, 55, 63, 64, 65, 71, 80, 97, 110, 127, 128, 150, 200]


def tiny_model(**changes: int) -> LongcatFlashForCausalLM:
    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(LongcatFlashConfig(**SIZES | changes))
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        router = layer.mlp.router
        weight, bias = router.classifier.weight.data, router.e_score_correction_bias
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.05)
        for name in ("gate_up_proj", "down_proj"):  # loud experts, so that a wrong one changes the text
            getattr(layer.mlp.experts, name).data.mul_(2.5)
    return model.float().eval()


def prompts() -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(3, SIZES["vocab_size"]) for _ in range(length)] for length in LENGTHS]


@dataclass(frozen=True)
class Expected:
    """Greedy tokens of each prompt, and the smallest gap between the best and the second best logit on the way."""

    tokens: list[list[int]]
    margin: float


@torch.inference_mode()
def expected(model: LongcatFlashForCausalLM, asked: list[list[int]], new_tokens: int = NEW_TOKENS) -> Expected:
    """By transformers' own layers, one prompt at a time."""
    tokens, margin = [], float("inf")
    for prompt in asked:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        best = torch.stack([logits[0] for logits in out.logits]).topk(2).values
        margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
    return Expected(tokens, margin)


def write_draft_checkpoint(folder: Path, model: LongcatFlashForCausalLM) -> Path:
    """With a layer for multi-token prediction, whose draft of the next token is the token before: seldom right."""
    write_checkpoint(folder, model)
    tensors = load_file(folder / "model.safetensors")
    H, intermediate = SIZES["hidden_size"], SIZES["ffn_hidden_size"]
    layer = "model.mtp.layers.0."
    norms = ("enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm")
    draft = {f"{layer}{name}.weight": torch.ones(H) for name in norms}
    draft |= {
        f"{layer}eh_proj.weight": torch.cat([torch.zeros(H, H), torch.eye(H)], dim=1),
        f"{layer}transformer_layer.mlp.gate_proj.weight": torch.zeros(intermediate, H),
        f"{layer}transformer_layer.mlp.up_proj.weight": torch.zeros(intermediate, H),
        f"{layer}transformer_layer.mlp.down_proj.weight": torch.zeros(H, intermediate),
        "model.mtp.norm.weight": torch.ones(H),
        "model.mtp.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    for name, tensor in tensors.items():
        if ".layers.0.self_attn.0." in name:
            filled = 0 if "o_proj" in name else 1 if tensor.ndim == 1 else tensor
            draft[layer + "self_attn." + name.split(".self_attn.0.")[1]] = torch.zeros_like(tensor) + filled
    save_file(tensors | draft, folder / "model.safetensors")
    return folder


def fp8_model() -> LongcatFlashForCausalLM:
    """What a checkpoint in FP8 stands for: the experts in FP8 in blocks, all else but the router in bfloat16."""
    model = tiny_model(**FP8_SIZES)
    for name, parameter in model.named_parameters():
        for weight in parameter.data if ".mlp.experts." in name else ():
            weight.copy_(in_blocks(weight)[2])
        if ".mlp." not in name:
            parameter.data.copy_(parameter.data.bfloat16())
    return model


def write_fp8_checkpoint(folder: Path, model: LongcatFlashForCausalLM) -> Path:
    """In the layout in which the models are published: a weight's scales are in a tensor beside it."""
    write_checkpoint(folder, model)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".mlp.experts." in name:
            tensors[name], tensors[f"{name}_scale_inv"], _ = in_blocks(tensor)
        else:
            tensors[name] = tensor if ".mlp." in name else tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FP8_CONFIG))
    return folder


@torch.inference_mode()
def first_log_probabilities(model: LongcatFlashForCausalLM, asked: list[list[int]]) -> torch.Tensor:
    """Of the first new token of each prompt, [prompts, vocabulary]."""
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in asked])


def write_tokenizer(folder: Path) -> None:
    """Words t0, t1, ..., so that text shows the tokens."""
    words = {f"t{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )


def write_checkpoint(folder: Path, model: LongcatFlashForCausalLM, *, dead_rows: bool = False) -> Path:
    """In the layout in which the models are published, or in transformers' own, with tensors for the zero experts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string()) | ENGINE
    config |= {"architectures": ["LongcatFlashForCausalLM"], "dtype": "float32"}
    if dead_rows:
        model.save_pretrained(folder)
    else:
        save_original_layout(model.state_dict().items(), folder, config)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder
