"""Checkpoints: what is checked before loading, the layouts, streaming and saving. Damage is done to real files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.transformers_tiny import SIZES, tiny_model
from zemoe.checkpoints import longcat
from zemoe.checkpoints.files import INDEX_NAME, CheckpointError
from zemoe.checkpoints.longcat import (
    Manifest,
    expected_shapes,
    original_layout,
    transformers_layout,
    verify,
)

CONFIG = {**SIZES, "model_type": "longcat_flash", "architectures": ["LongcatFlashForCausalLM"]}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
LAYOUTS = ("original", "transformers", "packed")


def tensors_of(layout: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(CONFIG, layout)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """One file, or with two dicts of names two shards and an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}, {"zero_expert_num": 0}]
)
def test_expected_names_and_shapes_are_those_that_transformers_writes(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path / "default")
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    dead_rows = "original" if changes.get("zero_expert_num") == 0 else "transformers"
    for folder, layout in ((tmp_path / "default", dead_rows), (tmp_path / "packed", "packed")):
        written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
        assert written == expected_shapes(longcat.read_config(folder), layout)
        assert verify(folder).layout == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_manifest(tmp_path, layout):
    tensors = tensors_of(layout)
    for manifest in (verify(write(tmp_path / "one", tensors)), verify(write_shards(tmp_path / "two", tensors))):
        assert manifest.layout == layout
        assert manifest.config["n_routed_experts"] == 5
        assert manifest.num_parameters == sum(tensor.numel() for tensor in tensors.values())
        assert manifest.num_bytes == 2 * manifest.num_parameters
        assert {name: info.shape for name, info in manifest.tensors.items()} == expected_shapes(CONFIG, layout)
    assert manifest.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_only_headers_are_read(tmp_path):
    """16 GB of holes: reading them would take longer than the whole test file."""
    config = CONFIG | {"vocab_size": 64_000_000}
    header, end = {}, 0
    for name, shape in expected_shapes(config).items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert verify(tmp_path).num_bytes == end > 16e9


def test_what_belongs_beside_a_model_is_no_error(tmp_path):
    """Published models carry prediction layers, trainers leave optimizers: neither is part of the model."""
    tensors = tensors_of("original")
    extra = {"model.mtp.layers.0.eh_proj.weight": torch.zeros(2, 2), "model.rotary_emb.inv_freq": torch.zeros(4)}
    write(tmp_path, tensors | extra)
    torch.save({}, tmp_path / "optimizer.pt")
    manifest = verify(tmp_path)
    assert set(manifest.tensors) == set(tensors)
    assert set(dict(longcat.stream(manifest))) == set(tensors)


class Executed:
    """Unpickling this leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(kept))

    return edit


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def cut(keep: int) -> Callable[[Path], None]:
    """Cut the file to `keep` bytes, or by -keep bytes at its end."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:keep])

    return edit


def edit_header(tensor: str = EXPERT, **changes: object) -> Callable[[Path], None]:
    """Change what the header says of one tensor, and nothing else."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header[tensor] = {key: value for key, value in (header[tensor] | changes).items() if value != "absent"}
        changed = json.dumps(header, separators=(",", ":")).encode()
        (folder / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + raw[end:])

    return edit


def replace_by_pickle(name: str, protocol: int | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        trap = Executed(folder / "executed")
        if protocol is None:
            torch.save({"model.norm.weight": trap}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps({"model.norm.weight": trap}, protocol=protocol))

    return edit


def edit_text(name: str, old: bytes, new: bytes, count: int = -1) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new, count))


def put_in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


NESTED: list = []
for _ in range(500):
    NESTED = [NESTED]

DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "no such file"]),
    "config cut short": (lambda f: (f / "config.json").write_text('{"model_type": "longcat'), ["config.json", "JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json", "JSON"]),
    "other model": (edit_config(model_type="mixtral"), ["config.json", "model_type", "'mixtral'", "longcat_flash"]),
    "no hidden size": (edit_config(hidden_size="absent"), ["config.json", "hidden_size", "None"]),
    "hidden size is text": (edit_config(hidden_size="32"), ["hidden_size", "'32'"]),
    "true layers": (edit_config(num_layers=True), ["num_layers", "True"]),
    "negative zero experts": (edit_config(zero_expert_num=-1), ["zero_expert_num", "-1"]),
    "too many choices": (edit_config(moe_topk=9), ["moe_topk", "8", "9"]),
    "odd rotary size": (edit_config(qk_rope_head_dim=7), ["qk_rope_head_dim", "even"]),
    "other head size": (edit_config(qk_head_dim=17), ["qk_head_dim", "16"]),
    "infinite scale": (edit_config(routed_scaling_factor=float("inf")), ["config.json", "Infinity is no JSON"]),
    "scale beyond every float": (edit_text("config.json", b": 1.5", b": 1e999"), ["routed_scaling_factor", "finite"]),
    "byte order mark": (edit_text("config.json", b"{", b"\xef\xbb\xbf{", 1), ["config.json", "byte order mark"]),
    "a key twice": (
        edit_text("config.json", b"{", b'{"hidden_size": 8, ', 1),
        ["config.json", "'hidden_size' is there twice"],
    ),
    "nested": (edit_config(text=NESTED), ["config.json", "nested more than 64 deep"]),
    "nested beyond the parser": (
        lambda f: (f / "config.json").write_text("[" * 100_000 + "]" * 100_000),
        ["config.json", "nested more than 64 deep"],
    ),
    "config is a pipe": (put_in_place("config.json", os.mkfifo), ["config.json", "a pipe, not a regular file"]),
    "config without an end": (put_in_place("config.json", to_zero), ["config.json", "a device, not a regular file"]),
    "config is a folder": (put_in_place("config.json", Path.mkdir), ["config.json", "a folder, not a regular file"]),
    "config of 40 MB": (
        lambda f: (f / "config.json").write_bytes(b" " * 40_000_000),
        ["config.json", "more than 33,554,432 bytes"],
    ),
    "weights are a pipe": (put_in_place("model.safetensors", os.mkfifo), ["model.safetensors", "a pipe"]),
    "weights without an end": (put_in_place("model.safetensors", to_zero), ["model.safetensors", "a device"]),
    "zero experts of another kind": (edit_config(zero_expert_type="drop"), ["zero_expert_type", "identity", "drop"]),
    "router bias": (edit_config(router_bias=True), ["router_bias"]),
    "unscaled attention": (edit_config(mla_scale_q_lora=False), ["mla_scale_q_lora"]),
    "quantized": (edit_config(quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
    "config of a wider model": (
        edit_config(expert_ffn_hidden_size=25),
        ["model.safetensors", "experts.0.gate_proj.weight", "[24, 32]", "[25, 32]"],
    ),
    "config of a deeper model": (edit_config(num_layers=3), ["model.safetensors", "model.layers.2.", "missing"]),
    "config of a shallower model": (edit_config(num_layers=1), ["model.safetensors", "model.layers.1.", "not part"]),
    "config with fewer experts": (edit_config(n_routed_experts=4), ["router.classifier.weight", "[8, 32]", "[7, 32]"]),
    "config with one kind mixed up": (
        edit_config(n_routed_experts=4, zero_expert_num=4),
        ["model.safetensors", "experts.5.gate_proj.weight", "missing"],
    ),
    "tensor missing": (edit_tensors(lambda t: t.pop(EXPERT)), ["model.safetensors", EXPERT, "missing"]),
    "tensor misshapen": (
        edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()})),
        ["model.safetensors", EXPERT, "[32, 24]", "[24, 32]"],
    ),
    "tensor of integers": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].int()})), [EXPERT, "I32", "BF16"]),
    "tensor too many": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), ["model.safetensors", "extra"]),
    "tensor whose name a terminal obeys": (
        edit_tensors(lambda t: t.update({"\x1b[2Jred\x1b]0;title\x07": torch.zeros(1)})),
        ["model.safetensors: tensor \\x1b[2Jred\\x1b]0;title\\x07 F32 [1] is not part"],
    ),
    "tensor with a name of 30,000 letters": (
        edit_tensors(lambda t: t.update({"a" * 30_000: torch.zeros(1)})),
        ["model.safetensors: tensor aaa", "is not part of this config.json"],
    ),
    "no correction bias": (
        edit_tensors(lambda t: t.pop("model.layers.0.mlp.router.e_score_correction_bias")),
        ["model.layers.0.mlp.router.e_score_correction_bias", "missing"],
    ),
    "data cut by a byte": (cut(-1), ["model.safetensors", "tensor ", "truncated"]),
    "data cut in half": (cut(40_000), ["model.safetensors", "tensor ", "truncated"]),
    "header cut": (cut(100), ["model.safetensors", "truncated"]),
    "seven bytes": (cut(7), ["model.safetensors", "truncated"]),
    "empty file": (cut(0), ["model.safetensors", "truncated"]),
    "bytes behind the end": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"\0\0"),
        ["model.safetensors", "bytes of data"],
    ),
    "header with another dtype": (
        edit_header(dtype="F32"),
        ["model.safetensors", EXPERT, "3072 bytes", "data_offsets"],
    ),
    "header with unknown dtype": (edit_header(dtype="F3"), [EXPERT, "unknown dtype 'F3'"]),
    "header with a negative size": (edit_header(shape=[-24, -32]), [EXPERT, "[-24, -32]"]),
    "header with a number that only Python reads": (
        edit_header(more=10**400),
        ["model.safetensors", "number out of range"],
    ),
    "header whose dtype is a list": (edit_header(dtype=["BF16"]), [EXPERT, "unknown dtype ['BF16']"]),
    "header where two tensors share bytes": (
        edit_header(data_offsets=[0, 1536]),
        ["model.safetensors", "offset for tensor"],
    ),
    "header nested": (edit_header(more=NESTED), ["model.safetensors", "nested more than 64 deep"]),
    "header with numbers for metadata": (edit_header("__metadata__", format=1), ["__metadata__", "strings"]),
    "header without offsets": (edit_header(data_offsets="absent"), [EXPERT, "data_offsets None"]),
    "header with offsets of text": (edit_header(data_offsets=["0", "1"]), [EXPERT, "data_offsets"]),
    "header with offsets before the data": (edit_header(data_offsets=[-1536, 0]), [EXPERT, "-1536"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "no such file"]),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        ["model.safetensors"],
    ),
    "pickled .bin": (replace_by_pickle("pytorch_model.bin", None), ["pytorch_model.bin", "pickled", "refused|never"]),
    "pickled .pt": (replace_by_pickle("model.pt", 2), ["model.pt", "pickled"]),
    "torch.save under another name": (replace_by_pickle("model.safetensors", None), ["model.safetensors", "pickled"]),
    "pickle 2 under another name": (replace_by_pickle("model.safetensors", 2), ["model.safetensors", "pickled"]),
    "pickle 5 under another name": (replace_by_pickle("model.safetensors", 5), ["model.safetensors", "pickled"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_runs(tmp_path, damage):
    write(tmp_path, tensors_of("original"))
    assert verify(tmp_path).layout == "original"
    edit, words = DAMAGE[damage]
    edit(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert len(message) <= 500 and message.isprintable()
    for word in words:
        assert any(option in message for option in word.split("|")), message
    assert not (tmp_path / "executed").exists()


def edit_index(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        edit(index)
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return apply


def put_twice(folder: Path) -> None:
    first, second = (load_file(folder / f"model-0000{i}-of-00002.safetensors") for i in (1, 2))
    name = next(iter(first))
    save_file(second | {name: first[name]}, folder / "model-00002-of-00002.safetensors")


SHARD_DAMAGE = {
    "shard missing": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002-of-00002.safetensors", "No such file"],
    ),
    "index cut short": (lambda f: (f / INDEX_NAME).write_text('{"weight'), [INDEX_NAME, "JSON"]),
    "index without a map": (
        edit_index(lambda i: i.pop("weight_map")),
        [INDEX_NAME, "weight_map"],
    ),
    "index without metadata": (edit_index(lambda i: i.pop("metadata")), [INDEX_NAME, "metadata"]),
    "index whose metadata is a list": (edit_index(lambda i: i.update(metadata=[])), ["index.json", "metadata"]),
    "tensor not in the index": (edit_index(lambda i: i["weight_map"].pop(EXPERT)), [EXPERT, INDEX_NAME]),
    "index promises too much": (
        edit_index(lambda i: i["weight_map"].update(more="model-00001-of-00002.safetensors")),
        ["model-00001-of-00002.safetensors", "tensor more", "missing"],
    ),
    "index leads outside": (
        edit_index(lambda i: i["weight_map"].update({EXPERT: "../model-00001-of-00002.safetensors"})),
        [INDEX_NAME, EXPERT, "../"],
    ),
    "index names a pickle": (
        edit_index(lambda i: i["weight_map"].update({EXPERT: "pytorch_model.bin"})),
        [INDEX_NAME, EXPERT, "pytorch_model.bin"],
    ),
    "tensor in two files": (put_twice, ["model-00002-of-00002.safetensors", "also in model-00001"]),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards_are_named(tmp_path, damage):
    write_shards(tmp_path, tensors_of("original"))
    verify(tmp_path)
    edit, words = SHARD_DAMAGE[damage]
    edit(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: missing"):
        verify(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.gguf: a file, expected a checkpoint folder"):
        verify(tmp_path / "model.gguf")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stream_gives_every_tensor_as_it_is(tmp_path, layout):
    tensors = tensors_of(layout)
    streamed = dict(longcat.stream(write_shards(tmp_path, tensors)))
    assert streamed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(streamed[name], tensor)


@pytest.mark.parametrize("source", LAYOUTS)
def test_layouts_map_to_each_other(source):
    tensors = tensors_of(source)
    original = dict(original_layout(tensors.items(), 5))
    assert {name: tuple(tensor.shape) for name, tensor in original.items()} == expected_shapes(CONFIG)
    prefix = "model.layers.1.mlp.experts."
    if source == "packed":
        assert torch.equal(original[f"{prefix}3.gate_proj.weight"], tensors[f"{prefix}gate_up_proj"][3, :24])
        assert torch.equal(original[EXPERT], tensors[f"{prefix}gate_up_proj"][3, 24:])
        assert torch.equal(original[f"{prefix}4.down_proj.weight"], tensors[f"{prefix}down_proj"][4])
    else:
        assert all(tensor is tensors[name] for name, tensor in original.items())
    dead = dict(transformers_layout(tensors.items(), 5, 3))
    assert {name: tuple(tensor.shape) for name, tensor in dead.items()} == expected_shapes(CONFIG, "transformers")
    assert not dead[f"{prefix}7.up_proj.weight"].any()
    assert all(torch.equal(dead[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_save_original_layout(tmp_path, source, max_shard_bytes):
    folder = write(tmp_path / "source", tensors_of(source))
    saved = longcat.save_original_layout(longcat.stream(folder), tmp_path / "saved", CONFIG, max_shard_bytes)
    assert isinstance(saved, Manifest)
    assert saved.layout == "original"
    assert (len(saved.files) == 1) == (max_shard_bytes == 10**9)
    largest = max(info.num_bytes for info in saved.tensors.values())
    for file in saved.files:
        size = sum(info.num_bytes for info in saved.tensors.values() if info.file == file)
        assert size <= max(max_shard_bytes, largest)
    expected = dict(original_layout(tensors_of(source).items(), 5))
    for name, tensor in longcat.stream(saved):
        assert torch.equal(tensor, expected[name])


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path):
    def interrupted():
        for name, tensor in tensors_of("original").items():
            if "layers.1" in name:
                raise KeyboardInterrupt
            yield name, tensor

    with pytest.raises(KeyboardInterrupt):
        longcat.save_original_layout(interrupted(), tmp_path, CONFIG, 10_000)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="no such file"):
        verify(tmp_path)


def test_save_refuses_a_used_folder_and_a_config_that_cannot_be(tmp_path):
    write(tmp_path, tensors_of("original"))
    with pytest.raises(ValueError, match=r"must not hold weights yet.*model\.safetensors"):
        longcat.save_original_layout([], tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="hidden_size"):
        longcat.save_original_layout([], tmp_path / "new", CONFIG | {"hidden_size": 0})
    assert not (tmp_path / "new").exists()
