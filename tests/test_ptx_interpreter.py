"""The PTX interpreter on its own: small kernels in PTX or CUDA C++, against numpy, and errors that it must find."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import ptx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
compiler = __import__("compile")
sys.path.pop(0)

HEADER = ".version 8.8\n.target sm_61\n.address_size 64\n"
DECLARATIONS = """
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<16>; .reg .f64 %d<4>;
"""


def kernel(body: str, parameters: int = 1, shared: int = 0) -> ptx.Module:
    """A kernel k(u64 pointer, ...) whose %rd1, %rd2, ... are its parameters, %r1 the thread and %rd10 4 times that."""
    names = [f".param .u64 k_{i}" for i in range(parameters)]
    loads = "".join(f"ld.param.u64 %rd{i + 1}, [k_{i}];\n" for i in range(parameters))
    declared = f".shared .align 4 .b8 buffer[{shared}];\n" if shared else ""
    start = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd10, %r1, 4;\n"
    return ptx.parse(
        f"{HEADER}.visible .entry k({', '.join(names)})\n{{{DECLARATIONS}{declared}{loads}{start}{body}\nret;\n}}"
    )


def launch(module: ptx.Module, *arrays: np.ndarray, threads: int = 32, blocks: int = 1) -> ptx.Counts:
    """Runs the module's only kernel on the arrays."""
    memory = ptx.GlobalMemory()
    arguments = [memory.add_array(f"array {i}", array).to_bytes(8, "little") for i, array in enumerate(arrays)]
    (name,) = module.kernels
    return ptx.run(module, name, ptx.Geometry((blocks, 1, 1), (threads, 1, 1)), arguments, memory)


def each(body: str, *inputs: np.ndarray, result: str = "u32", threads: int | None = None) -> np.ndarray:
    """One result a thread, from %r20 (or %f10), with input i in %r{i + 2} (or %f{i + 1})."""
    threads = threads or (len(inputs[0]) if inputs else 32)
    source, target = "", {"u32": "%r20", "f32": "%f10"}[result]
    for i, array in enumerate(inputs):
        register = f"%f{i + 1}" if array.dtype == np.float32 else f"%r{i + 2}"
        kind = "f32" if array.dtype == np.float32 else "u32"
        source += f"add.s64 %rd11, %rd{i + 2}, %rd10;\nld.global.{kind} {register}, [%rd11];\n"
    out = np.zeros(threads, {"u32": np.uint32, "f32": np.float32}[result])
    module = kernel(
        f"{source}{body}\nadd.s64 %rd12, %rd1, %rd10;\nst.global.{result} [%rd12], {target};", 1 + len(inputs)
    )
    launch(module, out, *inputs, threads=threads)
    return out


def random_bits(count: int, seed: int) -> np.ndarray:
    """Any 32-bit patterns, with the ones that bite in front."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    bits[:8] = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001, 31, 32]
    return bits


LANES = np.arange(32, dtype=np.uint32)


# Divergence


def test_divergent_branches_meet_again():
    body = """
    and.b32 %r5, %r1, 1;
    setp.eq.s32 %p1, %r5, 0;
    @%p1 bra $even;
    add.s32 %r20, %r1, 100;
    bra $end;
$even:
    mul.lo.s32 %r20, %r1, 3;
$end:
    activemask.b32 %r6;
    add.s32 %r20, %r20, %r6;
    """
    assert np.array_equal(each(body), np.where(LANES % 2 == 0, LANES * 3, LANES + 100) - np.uint32(1))


def test_loops_of_different_length_meet_again():
    body = """
    mov.u32 %r20, 0;
    mov.u32 %r5, 0;
$loop:
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra $end;
    add.s32 %r20, %r20, %r5;
    add.s32 %r5, %r5, 1;
    bra.uni $loop;
$end:
    activemask.b32 %r6;
    setp.ne.s32 %p2, %r6, -1;
    @%p2 mov.u32 %r20, 12345;
    """
    assert np.array_equal(each(body), LANES * (np.maximum(LANES, 1) - 1) // 2)


def test_a_guard_leaves_other_lanes_as_they_were():
    body = "mov.u32 %r20, 7;\nsetp.lt.u32 %p1, %r1, 5;\n@!%p1 mov.u32 %r20, 9;"
    assert np.array_equal(each(body), np.where(LANES < 5, 7, 9))


def test_lanes_may_leave_one_by_one():
    out = np.zeros(64, np.uint32)
    body = """
    setp.gt.u32 %p1, %r1, 40;
    @%p1 exit;
    add.s64 %rd11, %rd1, %rd10;
    st.global.u32 [%rd11], 1;
    """
    launch(kernel(body), out, threads=64)
    assert np.array_equal(out, np.arange(64) <= 40)


# Barriers and shared memory

REVERSE = """
    mov.u32 %r2, buffer;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.u32 [%r4], %r1;
    {barrier}
    sub.s32 %r5, {last}, %r1;
    shl.b32 %r5, %r5, 2;
    add.s32 %r5, %r2, %r5;
    ld.shared.u32 %r20, [%r5];
    add.s64 %rd11, %rd1, %rd10;
    st.global.u32 [%rd11], %r20;
"""


def test_a_barrier_orders_shared_memory_in_every_block():
    out = np.zeros(128, np.uint32)
    counts = launch(kernel(REVERSE.format(barrier="bar.sync 0;", last=127), shared=512), out, threads=128, blocks=3)
    assert np.array_equal(out, np.arange(128)[::-1])
    assert counts.barriers == 3
    assert counts.bank_conflicts == 0


def test_without_the_barrier_there_is_a_race():
    with pytest.raises(ptx.PtxError, match=r"line \d+.*race in shared memory.*block \(0, 0, 0\), thread"):
        launch(kernel(REVERSE.format(barrier="", last=127), shared=512), np.zeros(128, np.uint32), threads=128)


def test_a_warp_barrier_orders_a_warp_and_no_more():
    barrier = "bar.warp.sync -1;"
    out = np.zeros(32, np.uint32)
    launch(kernel(REVERSE.format(barrier=barrier, last=31), shared=128), out, threads=32)
    assert np.array_equal(out, LANES[::-1])
    with pytest.raises(ptx.PtxError, match="race in shared memory"):
        launch(kernel(REVERSE.format(barrier=barrier, last=63), shared=256), np.zeros(64, np.uint32), threads=64)


def test_a_store_after_others_have_read_is_a_race():
    body = """
    mov.u32 %r2, buffer;
    setp.eq.s32 %p1, %r1, 0;
    @%p1 st.shared.u32 [%r2], 1;
    bar.sync 0;
    ld.shared.u32 %r3, [%r2];
    {barrier}
    @%p1 st.shared.u32 [%r2], %r3;
    """
    launch(kernel(body.format(barrier="bar.sync 0;"), shared=4), np.zeros(1, np.uint32), threads=64)
    with pytest.raises(ptx.PtxError, match="race in shared memory: this store and a load by several threads"):
        launch(kernel(body.format(barrier=""), shared=4), np.zeros(1, np.uint32), threads=64)


def test_two_stores_to_one_place_are_a_race():
    body = "mov.u32 %r2, buffer;\nst.shared.u32 [%r2], %r1;"
    with pytest.raises(ptx.PtxError, match="two threads store to one byte"):
        launch(kernel(body, shared=4), np.zeros(1, np.uint32))


def test_a_load_of_shared_memory_that_nobody_wrote_is_found():
    body = "mov.u32 %r2, buffer;\nsetp.lt.u32 %p1, %r1, 31;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r3, %r2, %r3;\n"
    body += "@%p1 st.shared.u32 [%r3], %r1;\nbar.sync 0;\nld.shared.u32 %r4, [%r3];"
    with pytest.raises(ptx.PtxError, match=r"shared memory at 124 that nobody wrote; .* thread \(31, 0, 0\)"):
        launch(kernel(body, shared=128), np.zeros(1, np.uint32))


def test_shared_memory_has_bounds():
    body = "mov.u32 %r2, buffer;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r3, %r2, %r3;\nst.shared.u32 [%r3], %r1;"
    with pytest.raises(ptx.PtxError, match="shared memory out of bounds: at byte 64 of 64"):
        launch(kernel(body, shared=64), np.zeros(1, np.uint32))


def test_a_barrier_that_splits_a_warp_is_found():
    body = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $skip;\nbar.sync 0;\n$skip:\n"
    with pytest.raises(ptx.PtxError, match="barrier in divergent code"):
        launch(kernel(body), np.zeros(1, np.uint32))


def test_threads_that_left_do_not_hold_a_barrier():
    body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 exit;\nbar.sync 0;\nadd.s64 %rd11, %rd1, %rd10;\nst.global.u32 [%rd11], 1;"
    out = np.zeros(64, np.uint32)
    launch(kernel(body), out, threads=64)
    assert out.sum() == 32


@pytest.mark.parametrize(("stride", "conflicts"), [(4, 0), (8, 1), (128, 31), (132, 0), (0, 0)])
def test_bank_conflicts(stride, conflicts):
    size = max(4, 31 * stride + 4)
    body = f"mov.u32 %r2, buffer;\nsetp.eq.s32 %p1, %r1, 0;\nmad.lo.s32 %r3, %r1, {stride}, %r2;\n"
    body += (
        "st.shared.u32 [%r3], %r1;"
        if stride
        else "@%p1 st.shared.u32 [%r2], 5;\nbar.sync 0;\nld.shared.u32 %r4, [%r2];"
    )
    assert launch(kernel(body, shared=size), np.zeros(1, np.uint32)).bank_conflicts == conflicts


# Global memory


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_of_a_warp(stride, sectors):
    data = np.zeros(1024, np.uint32)
    first = -data.ctypes.data % 32 // 4
    data = data[first : first + 512]
    body = f"mul.wide.u32 %rd11, %r1, {stride};\nadd.s64 %rd11, %rd1, %rd11;\nld.global.u32 %r2, [%rd11];"
    counts = launch(kernel(body), data)
    assert (counts.loaded_sectors, counts.distinct_loaded_sectors, counts.loaded_bytes) == (sectors, sectors, 128)


def test_global_memory_has_bounds():
    body = "add.s64 %rd11, %rd1, %rd10;\nst.global.u32 [%rd11+4], %r1;"
    with pytest.raises(ptx.PtxError, match=r"at byte 128 of array 0, which has 128 bytes; .*thread \(31, 0, 0\)"):
        launch(kernel(body), np.zeros(32, np.uint32))


def test_misaligned_accesses_are_found():
    body = "add.s64 %rd11, %rd1, %rd10;\nld.global.v2.u32 {%r2, %r3}, [%rd11];"
    with pytest.raises(ptx.PtxError, match="load of 8 bytes is misaligned"):
        launch(kernel(body), np.zeros(64, np.uint64))


def test_vectors_and_narrow_types():
    data = np.arange(128, dtype=np.uint32) * 0x01010101
    out = np.zeros(128, np.uint32)
    body = """
    mul.wide.u32 %rd11, %r1, 16;
    add.s64 %rd12, %rd2, %rd11;
    ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd12];
    ld.global.s8 %r6, [%rd12+3];
    ld.global.u16 %h1, [%rd12];
    cvt.u32.u16 %r7, %h1;
    add.s64 %rd12, %rd1, %rd11;
    st.global.v4.u32 [%rd12], {%r5, %r6, %r7, %r2};
    st.global.u8 [%rd12+12], %r3;
    """
    launch(kernel(body, 2), out, data)
    words = data.reshape(32, 4)
    expected = np.stack(
        [
            words[:, 3],
            (words[:, 0] >> 24).astype(np.int8).astype(np.int32).view(np.uint32),
            words[:, 0] & 0xFFFF,
            words[:, 0] & 0xFFFFFF00 | words[:, 1] & 0xFF,
        ],
        axis=1,
    )
    assert np.array_equal(out.reshape(32, 4), expected)


# Exchanges in a warp


@pytest.mark.parametrize(
    ("mode", "distance", "clamp", "expected"),
    [
        ("bfly", 5, 31, LANES ^ 5),
        ("up", 3, 0, np.maximum(LANES.astype(int) - 3, np.where(LANES < 3, LANES, 0))),
        ("down", 3, 31, np.where(LANES + 3 > 31, LANES, LANES + 3)),
        ("idx", 9, 31, np.full(32, 9)),
        ("down", 3, 0x181F, np.where(LANES % 8 + 3 > 7, LANES, LANES + 3)),  # segments of 8 lanes
        ("idx", 9, 0x181F, LANES // 8 * 8 + 1),
    ],
)
def test_shuffles(mode, distance, clamp, expected):
    assert np.array_equal(each(f"shfl.sync.{mode}.b32 %r20|%p1, %r1, {distance}, {clamp}, -1;"), expected)


def test_a_shuffle_says_whether_its_source_is_in_range():
    body = "shfl.sync.down.b32 %r5|%p1, %r1, 4, 31, -1;\nselp.b32 %r20, 1, 0, %p1;"
    assert np.array_equal(each(body), LANES <= 27)


@pytest.mark.parametrize("exchange", ["shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "vote.sync.ballot.b32 %r5, %p1, -1;"])
def test_exchanges_in_divergent_code_are_found(exchange):
    body = f"setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $skip;\n{exchange}\n$skip:\n"
    with pytest.raises(ptx.PtxError, match="the warp is split"):
        launch(kernel(body), np.zeros(1, np.uint32))


def test_a_shuffle_from_a_lane_that_left_is_found():
    body = "setp.gt.u32 %p1, %r1, 15;\n@%p1 exit;\nshfl.sync.bfly.b32 %r5, %r1, 16, 31, -1;"
    with pytest.raises(ptx.PtxError, match="reads from a lane that is not active"):
        launch(kernel(body), np.zeros(1, np.uint32))


def test_votes():
    odd = "and.b32 %r5, %r1, 1;\nsetp.eq.s32 %p1, %r5, 1;\n"
    assert np.array_equal(each(odd + "vote.sync.ballot.b32 %r20, %p1, -1;"), np.full(32, 0xAAAAAAAA))
    for mode, expected in (("any", 1), ("all", 0), ("uni", 0)):
        body = f"{odd}vote.sync.{mode}.pred %p2, %p1, -1;\nselp.u32 %r20, 1, 0, %p2;"
        assert np.array_equal(each(body), np.full(32, expected)), mode


# Arithmetic


@pytest.mark.parametrize("types", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dp4a(types):
    a, b, c = (random_bits(256, seed) for seed in range(3))
    a_bytes, b_bytes = (
        x.view(np.int8 if kind == "s32" else np.uint8).reshape(-1, 4).astype(np.int64)
        for x, kind in zip((a, b), types.split("."))
    )
    expected = (c.view(np.int32) + (a_bytes * b_bytes).sum(1)).astype(np.uint32)
    assert np.array_equal(each(f"dp4a.{types} %r20, %r2, %r3, %r4;", a, b, c), expected)


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32).astype(np.int64)


INTEGER = {
    "add.s32": lambda a, b: signed(a) + signed(b),
    "sub.s32": lambda a, b: signed(a) - signed(b),
    "mul.lo.s32": lambda a, b: signed(a) * signed(b),
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32": lambda a, b: a.astype(np.uint64) * b >> np.uint64(32),
    "div.s32": lambda a, b: np.trunc(signed(a) / signed(b)).astype(np.int64),
    "rem.s32": lambda a, b: np.fmod(signed(a), signed(b)),
    "div.u32": lambda a, b: a // b,
    "rem.u32": lambda a, b: a % b,
    "min.s32": lambda a, b: np.minimum(signed(a), signed(b)),
    "max.u32": np.maximum,
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
    "shl.b32": lambda a, b: np.where(b > 31, 0, a.astype(np.int64) << (b & 31).astype(np.int64)),
    "shr.u32": lambda a, b: np.where(b > 31, 0, a >> (b & 31)),
    "shr.s32": lambda a, b: signed(a) >> np.minimum(b, 31).astype(np.int64),
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integer_arithmetic(opcode):
    a, b = random_bits(512, 3), random_bits(512, 4)
    b[100:200] %= 40
    b[b == 0] = 1
    expected = INTEGER[opcode](a, b).astype(np.int64).astype(np.uint32)
    assert np.array_equal(each(f"{opcode} %r20, %r2, %r3;", a, b), expected)


def test_bit_fields():
    a = random_bits(256, 5)
    assert np.array_equal(each("bfe.u32 %r20, %r2, 5, 9;", a), a >> 5 & 0x1FF)
    assert np.array_equal(each("bfe.s32 %r20, %r2, 5, 9;", a), (a.view(np.int32) << 18 >> 23).view(np.uint32))
    assert np.array_equal(each("bfi.b32 %r20, %r2, -1, 8, 4;", a), (a & 15) << 8 | 0xFFFFF0FF)
    assert np.array_equal(each("prmt.b32 %r20, %r2, 0, 0x0123;", a), a.byteswap())
    assert np.array_equal(each("popc.b32 %r20, %r2;", a), [bin(x).count("1") for x in a.tolist()])
    assert np.array_equal(each("clz.b32 %r20, %r2;", a), [32 - x.bit_length() for x in a.tolist()])
    assert np.array_equal(each("brev.b32 %r20, %r2;", a), [int(f"{x:032b}"[::-1], 2) for x in a.tolist()])
    b, c = random_bits(256, 6), random_bits(256, 7)
    assert np.array_equal(each("lop3.b32 %r20, %r2, %r3, %r4, 0xE8;", a, b, c), (a & b) | (a & c) | (b & c))
    assert np.array_equal(each("shf.l.wrap.b32 %r20, %r2, %r3, 7;", a, b), b << 7 | a >> 25)


def test_packing_and_unpacking():
    a = random_bits(64, 8)
    body = "mov.b32 {%h1, %h2}, %r2;\nmov.b32 %r20, {%h2, %h1};"
    assert np.array_equal(each(body, a), a << 16 | a >> 16)
    body = "mov.b64 %rd5, {%r2, %r1};\nmov.b64 {%r6, %r7}, %rd5;\nadd.s32 %r20, %r6, %r7;"
    assert np.array_equal(each(body, a), a + np.arange(64, dtype=np.uint32))


def floats(count: int, seed: int) -> np.ndarray:
    """Floats of every size, and special values."""
    values = random_bits(count, seed).view(np.float32).copy()
    values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 2.0**-149, 3.4e38, -1.5, 65504.0]
    return values


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)])
    )


@pytest.mark.parametrize("opcode", ["add.f32", "sub.f32", "mul.f32", "div.rn.f32", "min.f32", "max.f32"])
def test_float_arithmetic(opcode):
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "min": np.fmin,
        "max": np.fmax,
    }
    a, b = floats(1024, 9), floats(1024, 10)[::-1].copy()
    with np.errstate(all="ignore"):
        expected = functions[opcode.split(".")[0]](a, b)
    assert same(each(f"{opcode} %f10, %f1, %f2;", a, b, result="f32"), expected)


def test_fma_rounds_once():
    from fractions import Fraction

    rng = np.random.default_rng(11)
    a, b = (rng.standard_normal(512).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b) * (1 + rng.integers(0, 3, 512) * 2.0**-24)).astype(np.float32)
    # The exact value is 2^-70 short of halfway between two floats, which float64 cannot tell: rounding twice goes up.
    a[0], b[0], c[0] = 1 + 2.0**-23, 2.0**-24 * (1 - 2.0**-23), 1 + 2.0**-23
    assert np.float32(np.float64(a[0]) * b[0] + c[0]) == np.float32(1 + 2.0**-22)
    got = each("fma.rn.f32 %f10, %f1, %f2, %f3;", a, b, c, result="f32")
    for x, y, z, result in zip(a, b, c, got):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(result)) - exact)
        for neighbour in np.nextafter(result, np.float32([-np.inf, np.inf])):
            assert error <= abs(Fraction(float(neighbour)) - exact)


def test_conversions_to_and_from_half_round_to_nearest_even():
    halves = np.arange(1 << 16, dtype=np.uint32)
    back = each("cvt.u16.u32 %h1, %r2;\ncvt.f32.f16 %f10, %h1;", halves[::64].copy(), result="f32")
    assert same(back, halves[::64].astype(np.uint16).view(np.float16).astype(np.float32))
    x = floats(1024, 12)
    x[10:500] = np.random.default_rng(13).standard_normal(490) * 1000
    x[500:504] = [65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5]  # the last that rounds down, to infinity, ties to even
    got = each("cvt.rn.f16.f32 %h1, %f1;\ncvt.u32.u16 %r20, %h1;", x).astype(np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        assert same(got, x.astype(np.float16))


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_conversions_to_integers(mode, function):
    x = np.float32([0.5, 1.5, -0.5, -2.5, 7.9, -7.9, 2.0**31, -(2.0**31), 1e20, -1e20, np.inf, np.nan])
    with np.errstate(all="ignore"):
        expected = np.where(np.isnan(x), 0, np.clip(function(x.astype(np.float64)), -(2.0**31), 2.0**31 - 1))
    assert np.array_equal(each(f"cvt.{mode}.s32.f32 %r20, %f1;", x).view(np.int32), expected.astype(np.int32))


def test_directed_rounding():
    x = np.float32([1 + 2.0**-20, -1 - 2.0**-20, 1.0, 2.0**-30, -(2.0**-30), 7e4, -7e4])
    tiny, largest = 2.0**-24, 65504.0
    expected = {
        "rz": [1, -1, 1, 0, -0.0, largest, -largest],
        "rm": [1, -1 - 2.0**-10, 1, 0, -tiny, largest, -np.inf],
        "rp": [1 + 2.0**-10, -1, 1, tiny, -0.0, np.inf, -largest],
    }
    for mode, values in expected.items():
        got = each(f"cvt.{mode}.f16.f32 %h1, %f1;\ncvt.u32.u16 %r20, %h1;", x).astype(np.uint16).view(np.float16)
        assert same(got, np.float16(values)), mode


@pytest.mark.parametrize(
    ("compare", "expected"),
    [("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 0, 1]), ("neu", [1, 1, 0, 1]), ("ne", [1, 1, 0, 0]), ("nan", [0, 0, 0, 1])],
)
def test_comparisons_with_nan(compare, expected):
    a, b = np.float32([1, 2, 3, np.nan]), np.float32([2, 1, 3, 1])
    body = f"setp.{compare}.f32 %p1, %f1, %f2;\nselp.b32 %r20, 1, 0, %p1;"
    assert np.array_equal(each(body, a, b), expected)


def test_a_comparison_combines_with_a_predicate():
    body = """
    setp.lt.u32 %p1, %r1, 8;
    setp.gt.and.u32 %p2|%p3, %r1, 3, %p1;
    selp.b32 %r5, 1, 0, %p2;
    selp.b32 %r20, 2, %r5, %p3;
    """
    assert np.array_equal(each(body), np.where(LANES < 8, np.where(LANES > 3, 1, 2), 0))


# What is not understood is an error that names it


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sad.s32 %r2, %r1, %r1, %r1;", "opcode sad is not understood"),
        ("add.cc.u32 %r2, %r1, %r1;", r"modifier \.cc"),
        ("add.rz.f32 %f2, 0f3F800000, 0f3F800000;", r"modifier \.rz"),
        ("mov.u32 %r2, %clock;", "special register %clock"),
        ("add.s32 %r3, %r1, %r2;", "register %r2 is read before it is written"),
        ("bar.sync 1;", "only barrier 0"),
    ],
)
def test_what_is_not_understood_is_named(body, message):
    with pytest.raises(ptx.PtxError, match=message):
        launch(kernel(body), np.zeros(1, np.uint32))


def test_arguments_and_limits_are_checked():
    module = kernel("")
    with pytest.raises(ptx.PtxError, match=r"arguments of \[4\] bytes, but its parameters have \[8\]"):
        ptx.run(module, "k", ptx.Geometry((1, 1, 1), (32, 1, 1)), [b"1234"], ptx.GlobalMemory())
    with pytest.raises(ptx.PtxError, match="49156 bytes of shared memory"):
        launch(kernel("", shared=49156), np.zeros(1, np.uint32))
    with pytest.raises(ptx.PtxError, match="a block of 1056 threads"):
        launch(module, np.zeros(1, np.uint32), threads=1056)


# CUDA C++ through NVRTC

SOURCE = r"""
extern "C" __global__ void __launch_bounds__(96) block_sums(const float* x, float* sums, int n) {
  __shared__ float partial[96];
  float local[4];
  for (int i = 0; i < 4; ++i) local[(i + threadIdx.x) % 4] = x[(blockIdx.x * 96 + threadIdx.x) * 4 % n + i] * i;
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += expf(local[i]) + sqrtf(fabsf(local[3 - i]));
  partial[threadIdx.x] = sum;
  for (int half = 48; half >= 3; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0] + partial[1] + partial[2];
}
"""


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory):
    try:
        compiler.Nvrtc()
    except compiler.CompileError as error:
        pytest.skip(str(error))
    return compiler


def compiled(nvrtc, folder: Path, source: str) -> list[Path]:
    (folder / "k.cu").write_text(source)
    return nvrtc.compile_file(folder / "k.cu", folder / "out")


def test_compiled_kernel_with_local_memory_barriers_and_exp(nvrtc, tmp_path):
    _, image, _ = compiled(nvrtc, tmp_path, SOURCE)
    x = np.random.default_rng(14).standard_normal(4 * 96 * 5).astype(np.float32)
    sums = np.full(5, np.nan, np.float32)
    memory = ptx.GlobalMemory()
    pointers = [memory.add_array("x", x, writable=False), memory.add_array("sums", sums)]
    arguments = [*(p.to_bytes(8, "little") for p in pointers), x.size.to_bytes(4, "little")]
    ptx.run(ptx.load(image), "block_sums", ptx.Geometry((5, 1, 1), (96, 1, 1)), arguments, memory)
    scaled = x.astype(np.float64).reshape(5, 96, 4) * np.arange(4)
    expected = (np.exp(scaled) + np.sqrt(np.abs(scaled))).sum(axis=(1, 2))
    assert np.allclose(sums, expected, rtol=1e-6)


def test_compilation_is_reproducible_and_reports_resources(nvrtc, tmp_path):
    import json

    first, second = tmp_path / "first", tmp_path / "second"
    contents = []
    for folder in (first, second):
        folder.mkdir()
        contents.append([path.read_bytes() for path in compiled(nvrtc, folder, SOURCE)])
    assert contents[0] == contents[1]
    report = json.loads(contents[0][2])["block_sums"]
    assert report["shared_bytes"] == 384
    assert 0 < report["registers"] <= 255
    assert [p["size"] for p in report["parameters"]] == [8, 8, 4]


def test_compilation_errors_name_the_file_and_the_line(nvrtc, tmp_path):
    with pytest.raises(nvrtc.CompileError, match=r"k\.cu does not compile[\s\S]*k\.cu\(2\): error"):
        compiled(nvrtc, tmp_path, 'extern "C" __global__ void k() {\n  int x = nothing;\n}\n')
    (tmp_path / "k.cu").write_text('#include "missing.cuh"\n')
    with pytest.raises(nvrtc.CompileError, match=r"missing\.cuh"):
        nvrtc.headers_of(tmp_path / "k.cu")
