"""What the compiled loops become on other CPUs than this one: AVX2, AVX-512 and arm64, as far as LLVM alone can tell.

Their vectors are spelt out in LLVM's terms, which knows every CPU; what numba makes of Python is the same everywhere.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("numba")

import numba
from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target

from zemoe.kernels.cpu import choices, loops

CPU: Any = cpu_target
MULTIPLY: Any = loops._multiply
LARGEST: Any = choices.largest

AVX2 = "x86_64-unknown-linux-gnu", "haswell", "+avx2,+fma,+f16c"
AVX512 = "x86_64-unknown-linux-gnu", "skylake-avx512", "+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx2,+fma,+f16c"
GRAVITON = "aarch64-unknown-linux-gnu", "neoverse-n1", "+neon"
APPLE = "arm64-apple-macosx", "apple-m1", "+neon"

VECTOR, INT = types.Array(types.float32, 1, "C"), types.int64
FLOATS, BFLOATS = (types.Array(number, 3, "C") for number in (types.float32, types.uint16))
TURN = (VECTOR, INT, INT, VECTOR, INT, INT)


def tile(weight: types.Type) -> tuple[types.Type, ...]:
    """The arguments of `_tile`."""
    return weight, INT, INT, INT, INT, INT, VECTOR, INT, INT, INT, VECTOR, INT


def assembly(intrinsic: Any, arguments: tuple[types.Type, ...], target: tuple[str, str, str]) -> str:
    """Of a function that does nothing else, optimized for the target as numba does it for its own."""
    triple, cpu, features = target
    context = CPU.target_context
    signature, generate = intrinsic._defn(None, *arguments)
    module = ir.Module()
    form = ir.FunctionType(ir.VoidType(), [context.get_value_type(argument) for argument in arguments])
    function = ir.Function(module, form, "function")
    builder = ir.IRBuilder(function.append_basic_block())
    generate(context, builder, signature, function.args)
    builder.ret_void()

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    module.triple, module.data_layout = triple, str(machine.target_data)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def use(target: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loops take the vectors that they would take there."""
    vector, most = loops._vector_lanes(target[2])
    monkeypatch.setattr(loops, "_VECTOR", vector)
    monkeypatch.setattr(loops, "_MOST_LANES", most)


def multiplications(text: str, register: str) -> int:
    """How many instructions multiply and add whole registers."""
    return len(re.findall(rf"^\s+(?:vfmadd\S+|fmla\S*)\s[^\n]*{register}", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("target", "vector", "most", "register", "wanted"),
    [
        # Sums of 8 and 16 lanes for each of ROWS rows: one register and two of AVX2, twice as many on arm64.
        (AVX2, 8, 16, "%ymm", 3),
        (GRAVITON, 8, 16, r"v\d+\.4s", 6),
        (APPLE, 8, 16, r"v\d+", 6),
        # Of 8 to 64 lanes, 0 to 4 registers and half of one in every other.
        (AVX512, 16, 64, "%zmm", 0 + 1 + 1 + 2 + 2 + 3 + 3 + 4),
    ],
    ids=["avx2", "graviton", "apple", "avx512"],
)
@pytest.mark.parametrize("weight", [FLOATS, BFLOATS], ids=["float32", "bfloat16"])
def test_tile(weight, target, vector, most, register, wanted, monkeypatch):
    use(target, monkeypatch)
    assert (vector, most) == (loops._VECTOR, loops._MOST_LANES)
    text = assembly(loops._tile, tile(weight), target)
    assert multiplications(text, register) >= wanted * loops.ROWS
    assert ("zmm" in text) == (target is AVX512)
    assert "prefetch" in text or "prfm" in text
    if target is AVX2 and weight is BFLOATS:  # the mask of the upper halves takes the sixteenth register: one sum moves
        return
    for block in re.split(r"^\S+:", text, flags=re.MULTILINE):  # no sum leaves the registers while it is added to
        if "vfmadd" in block or "fmla" in block:
            assert not re.search(r"mm\d+[^\n]*\(%rsp\)|\(%rsp\)[^\n]*mm\d+|q\d+[^\n]*\[sp", block)


@pytest.mark.parametrize("target", [AVX2, AVX512, GRAVITON, APPLE], ids=["avx2", "avx512", "graviton", "apple"])
def test_turn(target, monkeypatch):
    use(target, monkeypatch)
    text = assembly(loops._turn, TURN, target)
    assert "zmm" not in text and len(text.splitlines()) < 200


def test_vectors_of_features():
    assert loops._vector_lanes("") == loops._vector_lanes("+avx2,-avx512vl,+fma") == (8, 16)
    assert loops._vector_lanes("+avx2,+avx512vl") == (16, 64)
    assert loops._vector_lanes("+avx512vlx") == (8, 16)


def test_no_vector_that_numba_was_not_given():
    """Of the loops as this process has them. `make test-avx2` restricts numba to AVX2 on a machine that has more."""
    features = CPU.target_context.codegen().magic_tuple()[2].split(",")
    loop: Any = numba.njit(fastmath=loops._FAST)(MULTIPLY.py_func)
    for weight in (FLOATS, BFLOATS):
        loop.compile((weight, INT, INT, INT, VECTOR, INT, INT, VECTOR, INT))
    sort: Any = numba.njit(LARGEST.py_func)
    matrix = types.Array(types.float32, 2, "C")
    sort.compile((matrix, matrix, types.boolean, types.Array(types.int64, 2, "C"), INT, INT))
    for text in [*loop.inspect_asm().values(), *sort.inspect_asm().values()]:
        assert "+avx512vl" in features or "zmm" not in text
    assert any("zmm" in text for text in loop.inspect_asm().values()) == ("+avx512vl" in features)
