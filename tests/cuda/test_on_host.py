"""Claim: what runs CUDA kernels on the CPU (csrc/cuda/host) finds a barrier that is missing, one that not all threads
reach, and shared memory that is read before it is written; and it rounds as a GPU does. Every barrier of the package's
own kernels is left out once: no such mutant gives the same numbers in all orders of its threads."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from macaron_ops.reference.activation import activate

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
COMPILER = sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
ORDERS = ("forward", "backward", "in-turn", "3")
FLAGS = ["-std=c++17", "-DMACARON_OPS_CUDA_ON_HOST", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]


def compiled(source, folder, *flags, sources=ROOT / "csrc"):
    folder.mkdir(exist_ok=True)
    program = folder / f"{Path(source).stem}.out"
    subprocess.run([COMPILER, *FLAGS, *flags, f"-I{sources}", source, "-o", program], check=True)
    return program


def outcome(program, order, *arguments):
    """Exit status and what it printed."""
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, env={**os.environ, "MACARON_OPS_THREAD_ORDER": order}
    )
    return done.returncode, done.stdout


# -- small kernels ---------------------------------------------------------------------------------------------------

PROGRAM = """
#include "cuda/device.h"
#include <cstdio>
#include <cstdlib>
using namespace macaron_ops::cuda;
template <int WHICH>
void kernel(float* out) {
  float* shared = shared_memory<float>();
  const int i = int(threadIdx.x);
%s}
int main(int, char** arguments) {
  float out[96] = {};
  try {
    const Launch l{1, 96, 96 * sizeof(float), nullptr};
    switch (std::atoi(arguments[1])) {
%s    }
  } catch (const std::exception& error) {
    std::printf("%%s\\n", error.what());
    return 1;
  }
  for (float number : out) std::printf("%%g\\n", double(number));
}
"""
REVERSED = "".join(f"{95 - i}\n" for i in range(96))
ENDED = "a thread ended while others wait|after threads of its block have ended"
WRITTEN = "shared[i] = float(i); __syncthreads(); out[i] = shared[95 - i];"
KERNELS = {
    "sound": WRITTEN,
    "no barrier": "shared[i] = float(i); out[i] = shared[95 - i];",
    "one barrier": WRITTEN + "shared[i] = -1.f;",
    "two barriers": WRITTEN + "__syncthreads(); shared[i] = -1.f;",
    "some threads": "if (i < 40) __syncthreads();",
    "one thread left": "if (i == 7) return; __syncthreads();",
    "two places": "if (i < 32) __syncthreads();\nelse __syncthreads();",
    "half a warp": "if (i % 2) __syncwarp();",
    "two exchanges": "if (i % 2) __syncwarp();\nelse __syncwarp();",
    "two masks": "out[i] = __shfl_xor_sync(i % 32 == 3 ? 7u : ~0u, 1.f, 1);",
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """``kernel(name, order)``: exit status and output of one of ``KERNELS``."""
    folder = tmp_path_factory.mktemp("kernels")
    bodies = "".join(f"  if constexpr (WHICH == {i}) {{ {body} }}\n" for i, body in enumerate(KERNELS.values()))
    cases = "".join(f"      case {i}: launch(l, kernel<{i}>, &out[0]); break;\n" for i in range(len(KERNELS)))
    source = folder / "kernels.cpp"
    source.write_text(PROGRAM % (bodies, cases))
    program = compiled(source, folder)
    return lambda name, order: outcome(program, order, str(list(KERNELS).index(name)))


@pytest.mark.parametrize("name", ["sound", "two barriers"])
def test_a_sound_kernel_gives_the_same_in_every_order(name, kernel):
    assert {kernel(name, order) for order in ORDERS} == {(0, REVERSED)}


def test_a_missing_barrier_shows_in_every_order(kernel):
    assert all("nan" in kernel("no barrier", order)[1] for order in ORDERS)


def test_a_missing_barrier_between_reading_and_writing_again(kernel):
    assert {kernel("one barrier", order) for order in ORDERS} != {(0, REVERSED)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some threads", ENDED),
        ("one thread left", ENDED),
        ("two places", "threads of one block at different barriers"),
        ("half a warp", "a deadlock"),
        ("two exchanges", "lanes of one warp in different exchanges"),
        ("two masks", "different exchanges|not in its own mask"),
    ],
)
def test_threads_that_part(name, message, kernel):
    for order in ORDERS:
        status, text = kernel(name, order)
        assert status == 1 and re.search(message, text), text


def test_an_order_that_is_none(kernel):
    status, text = kernel("sound", "sideways")
    assert status == 1 and "MACARON_OPS_THREAD_ORDER=sideways: expected in-turn, forward, backward or a number" in text


# -- the package's kernels, each without one of its waits ------------------------------------------------------------

DRIVERS = {  # a source -> the programs that run kernels with its waits
    "rows.h": ("NORMALIZE_STEP", "NORM_ROWS"),
    "normalize_step.cu": ("NORMALIZE_STEP",),
    "norm_rows.cu": ("NORM_ROWS",),
    "ffn_step.cu": ("FFN_FORWARD",),
    "ffn_step_backward.cu": ("FFN_BACKWARD",),
    "sphere.h": ("SPHERE_FORWARD", "SPHERE_BACKWARD"),
    "sphere_attend_step.cu": ("SPHERE_FORWARD",),
    "sphere_attend_step_backward.cu": ("SPHERE_BACKWARD",),
}
MAIN = {
    "NORM_ROWS": "norm_rows.cu",
    "FFN_FORWARD": "ffn_step.cu",
    "FFN_BACKWARD": "ffn_step_backward.cu",
    "NORMALIZE_STEP": "normalize_step.cu",
    "SPHERE_FORWARD": "sphere_attend_step.cu",
    "SPHERE_BACKWARD": "sphere_attend_step_backward.cu",
}
# Barriers, waits for copies, and what makes one barrier a sum enough.
WAITS = re.compile(r"__syncthreads\(\);|copies_wait<1>\(\);|turn \^= 1;")
MUTANTS = [
    (name, i, driver)
    for name, drivers in DRIVERS.items()
    for i in range(len(WAITS.findall(CUDA.joinpath(name).read_text())))
    for driver in drivers
]
CHOICE = """
#include <cstdlib>
#include <string>
inline bool taken_out(const char* wait) {
  static const char* const chosen = std::getenv("MUTANT");
  return chosen != nullptr && std::string(chosen) == wait;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """``program(driver)``: what runs kernels, and leaves out the wait that the variable MUTANT names."""
    folder = tmp_path_factory.mktemp("mutants")
    sources = folder / "csrc"
    shutil.copytree(CUDA, sources / "cuda")
    (sources / "choice.h").write_text(CHOICE)
    for name in DRIVERS:
        places = itertools.count()
        text = WAITS.sub(
            lambda wait, name=name, places=places: f'if (!taken_out("{name} {next(places)}")) {wait[0]}',
            CUDA.joinpath(name).read_text(),
        )
        sources.joinpath("cuda", name).write_text(text)
    programs = {}

    def compile_once(driver):
        if driver not in programs:
            flags = [f"-D{driver}", f'-DSOURCE="cuda/{MAIN[driver]}"', "-include", sources / "choice.h"]
            programs[driver] = compiled(ROOT / "tests/cuda/operators.cpp", folder / driver, *flags, sources=sources)
        return programs[driver]

    return compile_once


def test_no_wait_is_overlooked():
    """Each source whose text waits has a program, and every wait of it is one of the mutants'."""
    named = re.compile(
        r"\b(?:__syncthreads\w*|__syncwarp|__barrier_sync|copies_wait<)|\b(?:bar|mbarrier|barrier)[.:]\w"
    )
    found = {}
    for source in (*CUDA.glob("*.h"), *CUDA.glob("*.cu")):
        text = re.sub(r"//.*", "", source.read_text())
        if source.name != "matrix.h" and named.search(text):  # which is where copies_wait is defined
            found[source.name] = len(named.findall(text))
    waits = {name: len(WAITS.findall(CUDA.joinpath(name).read_text())) for name in DRIVERS}
    turns = {"rows.h": 1}  # a choice between two halves of memory, that saves a barrier
    assert {name: count + turns.get(name, 0) for name, count in found.items()} == waits


@pytest.mark.parametrize("driver", MAIN)
def test_the_kernels_do_not_depend_on_the_order_of_their_threads(driver, program):
    ((status, text),) = {outcome(program(driver), order) for order in ORDERS}
    assert status == 0 and "nan" not in text


@pytest.mark.parametrize(("name", "index", "driver"), MUTANTS, ids=str)
def test_a_mutant_that_does_not_wait_is_found(name, index, driver, program, monkeypatch):
    sound = outcome(program(driver), "forward")
    monkeypatch.setenv("MUTANT", f"{name} {index}")
    assert any(outcome(program(driver), order) != sound for order in ORDERS)


# -- numbers ---------------------------------------------------------------------------------------------------------

CONVERSIONS = """
#include "cuda/device.h"
#include <cstdio>
using namespace macaron_ops::cuda;
int main() {  // bits of floats in, bits of their two roundings and of what these are as floats out
  uint32_t bits;
  while (std::fread(&bits, 4, 1, stdin) == 1) {
    const float value = cuda_on_host::of_bits(bits);
    const bf16 b = rounded<bf16>(value);
    const half h = rounded<half>(value);
    const uint32_t found[] = {b.bits, h.bits, cuda_on_host::bits_of(to_float(b)), cuda_on_host::bits_of(to_float(h))};
    std::fwrite(found, 4, 4, stdout);
  }
}
"""


def test_conversions(tmp_path):
    """As torch's, at every exponent and halfway between neighbours."""
    source = tmp_path / "conversions.cpp"
    source.write_text(CONVERSIONS)
    program = compiled(source, tmp_path)
    fractions = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF])
    bits = (torch.arange(256)[:, None] << 23 | fractions).flatten()
    bits = torch.cat([bits, bits | 1 << 31]).to(torch.uint32)
    values = bits.view(torch.float32)
    done = subprocess.run([program], input=bits.numpy().tobytes(), stdout=subprocess.PIPE, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.int32).view(-1, 4)
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = values.to(dtype)
        finite = ~expected.isnan()
        assert torch.equal(found[:, i][finite].to(torch.int16), expected.view(torch.int16)[finite])
        wide = found[:, 2 + i].contiguous().view(torch.float32)
        assert torch.equal(wide[finite], expected.float()[finite]) and wide[~finite].isnan().all()


LANES = """
#include "cuda/device.h"
#include "cuda/sm90/elements.h"
#include <cstdio>
using namespace macaron_ops::cuda;
constexpr int kNumbers = 32;
void kernel(float* out) {
  const int lane = int(threadIdx.x);
  float part[kNumbers], sums[kNumbers / 8];
  for (int i = 0; i < kNumbers; ++i) part[i] = float((lane * 37 + i * 11) % 64);
  sm90::add_lanes<8>(part, sums, lane / 4);
  for (int i = 0; i < kNumbers / 8; ++i) out[lane * (kNumbers / 8) + i] = sums[i];
}
int main() {
  float out[kWarp * kNumbers / 8];
  launch(Launch{1, kWarp, 0, nullptr}, kernel, static_cast<float*>(out));
  for (float number : out) std::printf("%g\\n", double(number));
}
"""


def test_sums_over_the_lanes_of_an_epilogue(tmp_path):
    """Of 8 lanes that hold the same columns, 4 apart, the i-th ends with the i-th eighth of the columns' sums."""
    tmp_path.joinpath("lanes.cpp").write_text(LANES)
    program = compiled(tmp_path / "lanes.cpp", tmp_path, "-O1")
    lane, column = torch.arange(32).view(8, 4, 1), torch.arange(32)
    sums = ((lane * 37 + column * 11) % 64).sum(0)  # (lane % 4, column)
    expected = sums.view(4, 8, 4).transpose(0, 1).flatten()  # (lane / 4, lane % 4, of the eighth)
    printed = "".join(f"{number}\n" for number in expected.tolist())
    assert [outcome(program, order) for order in ORDERS] == [(0, printed)] * len(ORDERS)


ACTIVATIONS = """
#include "cuda/activation16.h"
#include <cstdio>
using namespace macaron_ops::cuda;
int main(int, char** arguments) {  // floats in; their activation, once more from the backward pass, and its slope out
  float z;
  while (std::fread(&z, 4, 1, stdin) == 1) {
    with_activation(Activation(arguments[1][0] - '0'), [&](auto activation) {
      float slope;
      const float h = activate16<decltype(activation)::value>(z);
      const float again = activate16<decltype(activation)::value>(z, 1.f, slope);
      const float found[] = {h, again, slope};
      std::fwrite(found, 4, 3, stdout);
    });
  }
}
"""


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    folder.joinpath("activations.cpp").write_text(ACTIVATIONS)
    return compiled(folder / "activations.cpp", folder, "-O1")


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_16_bits(name, activations):
    """Of every bfloat16: within 2^-20 of max(1, |z|), of what is rounded to 2^-11 at best; NaN where eager has it."""
    z = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).double()
    z = z[~(z.abs() > 1e18) | z.isinf() | z.isnan()].requires_grad_()  # z^3 is finite in float32
    exact = activate(z, name)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    index = str(["relu", "gelu", "gelu_tanh", "silu"].index(name))
    numbers = z.detach().float().numpy().tobytes()
    done = subprocess.run([activations, index], input=numbers, stdout=subprocess.PIPE, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(-1, 3).double()
    finite = z.detach().isfinite()
    bound = 2**-20 * z.detach().abs().clamp(min=1)[finite]
    for i, expected in enumerate((exact.detach(), exact.detach(), slope)):
        error = (found[finite, i] - expected[finite]).abs()
        assert (error <= bound).all(), (z[finite][error > bound], error[error > bound])
        assert found[z.isnan(), i].isnan().all() or (name == "relu" and i == 2)
        assert (found[z == float("inf"), i] == expected[z == float("inf")]).all() or i == 2
