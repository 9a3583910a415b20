"""Compiles the kernels that the operators launch on a GPU, without one: prints a JSON object a kernel.

    python tests/kernels/compile_offline.py sm90 some|all

``all`` is every tile of the table in every dtype, with and without dropout (half an hour for four targets);
``some`` what one can wait for.
"""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from macaron_ops.kernels import normalize_step, sphere_attend_step  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.offline import compile_for, resources  # noqa: E402
from macaron_ops.reference.normalize_step import Options, Tensors  # noqa: E402
from macaron_ops.reference.sphere_attend_step import Options as SphereOptions  # noqa: E402
from macaron_ops.reference.sphere_attend_step import Tensors as SphereTensors  # noqa: E402
from tests.kernels.tools import ffn_arguments, launches_of_ffn  # noqa: E402

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
TALL, SMALL, NARROW = (16384, 1024, 4096), (1024, 512, 1024), (16384, 128, 512)
SHAPES = (TALL, (16384, 256, 1024), SMALL, NARROW, (1024, 64, 128), (64, 16384, 64))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def calls(architecture: str, everything: bool):
    """``(shape, dtype, activation, dropout)``."""
    if everything:
        for shape in SHAPES:
            for dtype in (BF16, FP16, FP32):
                for activation in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"):
                    yield from ((shape, dtype, activation, p) for p in (0.0, 0.1))
        return
    yield from [(TALL, BF16, "gelu", 0.0), (NARROW, BF16, "swiglu", 0.0)]
    if architecture == "sm90":
        yield from ((shape, BF16, "gelu", 0.0) for shape in SHAPES)
        yield from [(TALL, BF16, "swiglu", 0.0), (SMALL, BF16, "gelu", 0.1), (SMALL, FP32, "gelu", 0.0)]


def steps(architecture: str):
    """The launches of ``normalize_step``, with rows in registers and in blocks."""
    for width, dtype in ((3, FP32), (1024, BF16), (16384, BF16)):
        x = torch.empty((4096, width), dtype=dtype, device="meta")
        tensors, options = Tensors(x, torch.empty(width, device="meta")), Options(0.0, "tangent", 1e-12)
        with recording(architecture, PROCESSORS[architecture]) as found:
            normalize_step.forward(x, tensors, options, "fast")
            normalize_step.backward(x, (True, True, True), x, tensors, normalize_step.Saved(), options)
        yield from ((launch, dtype) for launch in found)


def particles(architecture: str, everything: bool):
    """The launches of ``sphere_attend_step``, of points among themselves."""
    calls = [(1 << 18, 3, FP32), (1 << 16, 64, BF16)]
    if everything:
        calls = [(n, d, t) for n in (1 << 18, 1 << 12) for d in (3, 8, 32, 64, 128, 256) for t in (BF16, FP16, FP32)]
    elif architecture == "sm90":
        calls += [(1 << 16, 256, BF16), (1 << 12, 8, FP32), (1 << 12, 64, FP32)]
    for n, width, dtype in calls:
        x = torch.empty((n, width), dtype=dtype, device="meta")
        tensors = SphereTensors(None, None, None, None, None)
        options = SphereOptions(0.3, 4.0, "softmax", "tangent", everything, 1e-12)
        with recording(architecture, PROCESSORS[architecture]) as found:
            _, saved = sphere_attend_step.forward(x, tensors, options, "fast")
            sphere_attend_step.backward(x, (True, *(False,) * 5), x, tensors, saved, options)
        yield from ((launch, dtype) for launch in found)


def launches(architecture: str, everything: bool):
    for shape, dtype, activation, p in calls(architecture, everything):
        options = {"placement": "post"} if activation == "swiglu" else {}
        arguments = ffn_arguments(*shape, dtype, activation, dropout=p, **options)
        for found in launches_of_ffn(*arguments, architecture, PROCESSORS[architecture]):
            yield from ((launch, dtype) for launch in found)
    yield from steps(architecture)
    yield from particles(architecture, everything)


def main(architecture: str, what: str) -> None:
    seen = set()
    for launch, dtype in launches(architecture, what == "all"):
        missing = tuple(argument is None for argument in launch.arguments)
        key = (launch.kernel.__name__, dtype, missing, *sorted((k, str(v)) for k, v in launch.constants.items()))
        if key not in seen:
            seen.add(key)
            used = resources(compile_for(launch, architecture))._asdict()
            said = {"kernel": launch.kernel.__name__, "dtype": str(dtype), **launch.constants, **used}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
