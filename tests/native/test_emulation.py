"""Claim: csrc/emulated computes what Intel's manual says of an instruction, the same bits as a machine that has it."""

import ctypes
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.native.compiled import COMPILER, compiled, machine_has

pytestmark = pytest.mark.skipif(not COMPILER or not machine_has("avx2"), reason="needs a C++ compiler and AVX2")
SOURCE = Path(__file__).with_name("avx512_instructions.cpp")
INF, NAN, MOST, TINY, LEAST = math.inf, math.nan, 3.4028235e38, 2.0**-126, 2.0**-149


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return compiled(SOURCE, "avx512_bf16", tmp_path_factory.mktemp("emulated"), emulated=True)


def call(library, name, *inputs):
    """``name`` on any multiple of 16 numbers."""
    found = np.empty(len(inputs[0]), np.float32)
    for i in range(0, len(found), 16):
        parts = [a[i * len(a) // len(found) :] for a in (*inputs, found)]
        getattr(library, name)(*(ctypes.c_void_p(part.ctypes.data) for part in parts))
    return found


def rounded(value: Fraction) -> float:
    """The nearest float32, of two the even one."""
    if value == 0:
        return 0.0
    exponent = math.frexp(value.numerator / value.denominator)[1] - 1
    ulp = Fraction(2) ** max(exponent - 23, -149)
    whole = round(value / ulp) * ulp
    return math.copysign(INF, whole) if abs(whole) >= 2**128 else float(whole)


def floats(rng, count):
    """Random float32 of every size, denormal ones among them, infinities and NaN."""
    drawn = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    drawn[::7] = rng.choice(np.float32([0, -0.0, INF, -INF, NAN, LEAST, -TINY, MOST, 0.5, -0.5, 1.5]), drawn[::7].shape)
    return drawn


def bf16(rng, count, exponents):
    sign, exponent = rng.integers(0, 2, count), rng.integers(*exponents, count)
    return (sign << 15 | exponent << 7 | rng.integers(0, 128, count)).astype(np.uint16)


def widened(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


def test_scalef(emulated):
    """x 2^floor(n), rounded once; the manual's table of special cases."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(320) * 2.0 ** rng.integers(-140, 120, 320)).astype(np.float32)
    n = (rng.standard_normal(320) * rng.choice([1, 20, 100], 320)).astype(np.float32)
    expected = [rounded(Fraction(float(a)) * Fraction(2) ** math.floor(b)) for a, b in zip(x, n, strict=True)]
    assert (call(emulated, "scalef", x, n) == np.float32(expected)).all()
    table = [
        (NAN, 1, NAN), (NAN, NAN, NAN), (NAN, INF, INF), (NAN, -INF, 0), (INF, NAN, NAN), (INF, INF, INF),
        (INF, -INF, NAN), (-INF, -5, -INF), (0, INF, NAN), (0, -INF, 0), (0, NAN, NAN), (3, NAN, NAN),
        (-3, INF, -INF), (3, -INF, 0), (LEAST, 149.5, 1), (1, -149.5, 0),
    ]  # fmt: skip
    x, n, expected = (np.float32(column) for column in zip(*table, strict=True))
    np.testing.assert_array_equal(call(emulated, "scalef", x, n), expected)


@pytest.mark.parametrize(("name", "whole"), [("rest_of_nearest", np.rint), ("rest_of_lower", np.floor)])
def test_reduce(emulated, name, whole):
    """x minus a whole number, rounded as that is where it is not exact (1 is too much for 1 - 2^-149), 0 of an
    infinity."""
    x = floats(np.random.default_rng(1), 1600)
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isinf(x), 0, x - whole(x))
        downwards = (whole is np.floor) & (expected.astype(float) + whole(x) > x)
    expected[downwards] = np.nextafter(expected[downwards], np.float32(0))
    np.testing.assert_array_equal(call(emulated, name, x), expected)


def test_dot_of_pairs(emulated):
    """Two fused multiply-adds, upper elements first, to nearest even; denormal numbers are zeros, in and out."""
    rng = np.random.default_rng(2)

    def flushed(value):
        return value if abs(value) >= TINY else 0.0

    for size, exponents in ((0, (110, 140)), (-120, (50, 80)), (-126, (60, 68)), (0, (0, 8)), (125, (185, 195))):
        a, b = bf16(rng, 320, exponents), bf16(rng, 320, exponents)
        total = (rng.standard_normal(160) * 2.0**size).astype(np.float32)
        expected = [flushed(float(s)) for s in total]
        for half in (1, 0):
            for j, (x, y) in enumerate(zip(widened(a)[half::2], widened(b)[half::2], strict=True)):
                exact = Fraction(flushed(float(x))) * Fraction(flushed(float(y)))
                expected[j] = (
                    flushed(rounded(exact + Fraction(expected[j]))) if math.isfinite(expected[j]) else expected[j]
                )
        np.testing.assert_array_equal(call(emulated, "dot", total, a, b), np.float32(expected))


@pytest.mark.parametrize("mask", [0, 1, 0b111, 0x7FFF, 0xFFFF])
def test_masks(emulated, mask):
    """Lanes that a mask leaves out are read as zeros and not written."""
    rng = np.random.default_rng(3)
    x, halves = floats(rng, 16), bf16(rng, 16, (0, 255))
    lanes = np.arange(16) < mask.bit_length()
    found = np.full(16, 7, np.float32), np.full(16, 7, np.uint16), np.full(16, 7, np.uint32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, halves, *found)]
    emulated.part(*pointers[:2], ctypes.c_uint32(mask), *pointers[2:])
    for array, whole in zip(found, (x, x.view(np.uint32).astype(np.uint16), halves.astype(np.uint32)), strict=True):
        np.testing.assert_array_equal(array, np.where(lanes, whole, 7))


@pytest.mark.skipif(not machine_has("avx512_bf16"), reason="needs a CPU with AVX512-BF16")
def test_the_machine_agrees(emulated, tmp_path):
    machine = compiled(SOURCE, "avx512_bf16", tmp_path, emulated=False)
    rng = np.random.default_rng(4)
    x, n = floats(rng, 16000), floats(rng, 16000)
    a, b = bf16(rng, 32000, (0, 256)), bf16(rng, 32000, (0, 256))
    calls = [("scalef", x, n), ("rest_of_nearest", x), ("rest_of_lower", x), ("dot", x, a, b)]
    for name, *inputs in calls:
        np.testing.assert_array_equal(call(machine, name, *inputs), call(emulated, name, *inputs), err_msg=name)
