"""What may be wrong with a folder, for fuzz_folders.py: one small piece of damage each, drawn by a generator."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NESTED: list = []
for _ in range(500):
    NESTED = [NESTED]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 7, 64, 10**9, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1e-300, 1e308,
    "", "x", "7", "\x1b[31mred\x1b[0m", "a\nb", "\u202eback", "a" * 3000, "\ud800", [], {}, [1], ["x", None], {"a": 1},
    {"x": {"y": []}}, NESTED, "/dev/zero", "../x", "float99", "bfloat16", "float16", "fp8",
]  # fmt: skip
# Keys that mean something to transformers, tokenizers, safetensors or models of the same family.
KEYS = [
    "_attn_implementation", "attn_implementation", "_experts_implementation", "auto_map", "architectures", "num_labels",
    "id2label", "text_config", "to_dict", "from_dict", "validate", "per_layer_config", "quantization_config", "dtype",
    "torch_dtype", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "num_hidden_layers",
    "num_local_experts", "intermediate_size", "oe_num_layers", "ngram_vocab_size_ratio", "attention_method", "use_mla",
    "zero_expert_type", "router_bias", "norm_topk_prob", "tie_word_embeddings", "attention_bias", "return_dict",
    "transformers_weights", "custom_generate", "name_or_path", "is_encoder_decoder", "pad_token_id", "eos_token_id",
    "max_position_embeddings", "truncation", "padding", "normalizer", "__metadata__", "__class__", "\x1b[2J",
    "k" * 5000,
]  # fmt: skip


class Canary:
    """Unpickling this leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


Draw = random.Random


def edit_value(content: Any, draw: Draw) -> None:
    """Change, remove, double or add one thing anywhere in parsed JSON, in place."""
    node, depth = content, 0
    while depth < 4 and draw.random() < 0.6:
        inside = [
            child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, dict | list)
        ]
        inside = [child for child in inside if child]
        if not inside:
            break
        node, depth = draw.choice(inside), depth + 1
    what = draw.choice(["set", "set", "set", "near", "remove", "add", "rename"])
    if isinstance(node, list):
        at = draw.randrange(len(node)) if node else 0
        if what == "remove" and node:
            node.pop(at)
        elif what == "add" or not node:
            node.insert(at, draw.choice(VALUES))
        else:
            node[at] = near(node[at], draw) if what == "near" else draw.choice(VALUES)
        return
    key = draw.choice(sorted(node)) if node else "x"
    if what == "remove":
        node.pop(key, None)
    elif what == "add":
        node[draw.choice(KEYS)] = draw.choice(VALUES)
    elif what == "rename" and key in node:
        node[draw.choice([key + "x", key.upper(), "\x1b]0;" + key, key * 50, *KEYS])] = node.pop(key)
    elif what == "near" and key in node:
        node[key] = near(node[key], draw)
    else:
        node[key] = draw.choice(VALUES)


def near(value: Any, draw: Draw) -> Any:
    """Something like it: the number beside, another type, a text with a letter more."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([value + 1, value - 1, -value, 2 * value, float(value), str(value), 10**9 * (value or 1)])
    if isinstance(value, float):
        return draw.choice([value * 2, -value, 0.0, 1 / value if value else 1e300, str(value)])
    if isinstance(value, str):
        return draw.choice([value + "x", value[:-1], value.upper(), [value], value + "\0"])
    return draw.choice(VALUES)


def damage_text(raw: bytes, draw: Draw) -> bytes:
    """JSON that is damaged as text."""
    at = draw.randrange(len(raw) + 1)
    brace = raw.find(b"{") + 1
    return draw.choice(
        [
            b"\xef\xbb\xbf" + raw, raw[:at], b"", b"\0" * 100, raw + b"x", raw + b"\n  ", raw.decode().encode("utf-16"),
            raw[:at] + b"\xff" + raw[at:], b"[" * 10**5 + b"]" * 10**5, b'{"a":' * 500 + b"1" + b"}" * 500, b"[]", b"3",
            raw[:brace] + b'"hidden_size": 8, "hidden_size": 9, "model": 1,' + raw[brace:], b" " * 40_000_000,
            raw.replace(b": ", b": NaN, ", 1), b"9" * 10_000, b'"' + b"\\ud800" + b'"', b"null",
        ]
    )  # fmt: skip


def mutate_json(path: Path, draw: Draw) -> None:
    raw = path.read_bytes()
    if draw.random() < 0.2:
        path.write_bytes(damage_text(raw, draw))
        return
    content = json.loads(raw)
    edit_value(content, draw)
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def mutate_lines(path: Path, draw: Draw) -> None:
    """metrics.jsonl: one line of it."""
    lines = path.read_bytes().split(b"\n")
    at = draw.randrange(len(lines))
    if draw.random() < 0.3 or not lines[at]:
        lines[at] = damage_text(lines[at] or b"{}", draw)
    else:
        record = json.loads(lines[at])
        edit_value(record, draw)
        lines[at] = json.dumps(record).encode()
    path.write_bytes(b"\n".join(lines))


def mutate_safetensors(path: Path, draw: Draw) -> None:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    what = draw.choice(["header", "header", "header", "entry", "overlap", "name", "data", "text", "length", "size"])
    if what in ("data", "size", "length"):
        at = draw.randrange(end, len(raw)) if len(raw) > end else 0
        choices = {
            "data": [
                raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :],
                raw[:at] + b"\xff" * (len(raw) - at),
            ],
            "size": [raw[:at], raw + b"\0", raw[: end - 1], raw[:4], b"", raw + raw],
            "length": [(2**n).to_bytes(8, "little") + raw[8:] for n in (0, 20, 26, 40, 63)],
        }
        path.write_bytes(draw.choice(choices[what]))
        return
    header = json.loads(raw[8:end])
    names = sorted(set(header) - {"__metadata__"})
    name, other = draw.choice(names), draw.choice(names)
    if what == "header":
        edit_value(header, draw)
    elif what == "entry":
        entry = header[name]
        entry[draw.choice(sorted(entry))] = draw.choice(
            [*VALUES, "F64", "I8", "F16", ["BF16"], [1, 2], [0, 4], [-4, 0]]
        )
    elif what == "overlap":
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif what == "name":
        header[draw.choice(["\x1b[31mx", "model.extra", name + "\n", "x" * 30_000, name.upper(), "model.mtp.x"])] = (
            header.pop(name)
        )
    text = json.dumps(header).encode()
    if what == "text":
        text = damage_text(text, draw)[: 10**6]
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def replace_by_another_kind(path: Path, draw: Draw) -> None:
    target = path.parent / "target"

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))  # the whole path may be too long for a socket

    kinds: list[Callable[[Path], object]] = [
        os.mkfifo, Path.mkdir, listening, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("/dev/full"),
        lambda p: p.symlink_to(p.name), lambda p: p.symlink_to(target), lambda p: p.symlink_to("/"), lambda p: None,
    ]  # fmt: skip
    path.unlink()
    draw.choice(kinds)(path)


def replace_by_pickle(path: Path, draw: Draw) -> None:
    trap = {"model.norm.weight": Canary(path.parent / "executed")}
    if draw.random() < 0.5:
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol=draw.choice([2, 4, 5])))


def add_a_file(path: Path, draw: Draw) -> None:
    """Beside `path`: pickles, code that transformers would run if it was told to trust it, adapters, odd names."""
    folder, trace = path.parent, path.parent / "executed"
    code = f"open({str(trace)!r}, 'w').close()\n"
    what = draw.choice(["pickle", "code", "generate", "adapter", "name", "extra"])
    if what == "pickle":
        name = draw.choice(["pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt", "adapter_model.bin"])
        torch.save({"x": Canary(trace)}, folder / name)
    elif what == "code":
        (folder / "modeling_longcat.py").write_text(code)
        config = folder / "config.json"
        if config.exists():
            about = json.loads(config.read_text())
            names = {"AutoConfig": "modeling_longcat.C", "AutoModelForCausalLM": "modeling_longcat.M"}
            config.write_text(json.dumps(about | {"auto_map": names}))
    elif what == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
    elif what == "adapter":
        (folder / "adapter_config.json").write_text(draw.choice(["{}", "[", '{"base_model_name_or_path": "x"}']))
    elif what == "name":
        (folder / "\x1b[31m").mkdir()
    else:
        (folder / "model-extra.safetensors").write_bytes(b"\0" * 20)


TOML_VALUES = [
    "1979-05-27T07:32:00Z", "07:32:00", "nan", "-inf", "1e400", "0x7fffffffffffffff", "9" * 5000, "[]", "[[1], {}]",
    "{ a = 1 }", '""', '"\\u0000"', '"\\u001b[31m"', "true", "-1", "0", "0.5", "1e-300", "2147483647", "1e30", "[1]",
    "[" * 3000, "{a=" * 3000, '"' * 3, '"' + "x" * 5000 + '"', "1_000", "+5", "3.0", "10000000", '"float16"',
]  # fmt: skip
TOML_LINES = [
    "[train]", "[[train]]", "[train.steps]", "train = 3", "[extra]", "[model]\nmodel.x = 1", '"\\u001b[2J" = 1', "= 3",
    "[run]\nout = 'x'", "['\u202e']", "a.b.c.d = 1", "[" + "a." * 2000 + "b]", "# \x00", "\r", "['k']\nk.k = {}",
]  # fmt: skip


def mutate_toml(path: Path, draw: Draw) -> None:
    lines = path.read_text().splitlines()
    at, what = draw.randrange(len(lines)), draw.choice(["value", "value", "value", "line", "double", "rename", "text"])
    key, equals, _ = lines[at].partition(" = ")
    if what == "text":
        path.write_bytes(damage_text(path.read_bytes(), draw))
        return
    if what == "value" and equals:
        lines[at] = f"{key} = {draw.choice(TOML_VALUES)}"
    elif what == "double":
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif what == "rename":
        lines[at] = draw.choice([key.upper(), key + "x", "x" * 3000, "layers"]) + lines[at][len(key) :]
    else:
        lines.insert(at, draw.choice(TOML_LINES))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mutate_text(path: Path, draw: Draw) -> None:
    raw = path.read_bytes()
    at = draw.randrange(len(raw))
    path.write_bytes(
        draw.choice(
            [
                b"", b" \n", b"\xff\xfe", raw[:at], raw[:at] + b"\xff" + raw[at:], b"\0" * 3000,
                b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r\n"), b"a" * 5000, "é🙂\u202e".encode() * 900,
                b"\x1b[31m" * 900,
            ]
        )
    )  # fmt: skip


def mutate(path: Path, draw: Draw) -> str:
    """Damage `path`, or what is beside it; what was done, in words."""
    fitting: Callable[[Path, Draw], None] = mutate_text
    if path.suffix == ".safetensors":
        fitting = mutate_safetensors
    elif path.suffix == ".json":
        fitting = mutate_json
    elif path.suffix == ".jsonl":
        fitting = mutate_lines
    elif path.suffix == ".toml":
        fitting = mutate_toml
    kind = draw.choices([fitting, replace_by_another_kind, replace_by_pickle, add_a_file], [12, 2, 1, 1])[0]
    kind(path, draw)
    return f"{kind.__name__} {path.name}"
