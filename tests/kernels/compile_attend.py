"""Compiles the kernels of ``attend_step`` for a GPU that is not there: prints a JSON object a kernel.

python tests/kernels/compile_attend.py some|all sm80 sm90 sm100 gfx942
"""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from macaron_ops.kernels.offline import compile_for, resources  # noqa: E402
from tests.kernels.tools import attend_arguments, launches_of_attend  # noqa: E402

# The others are those of ffn_step.
KERNELS = (
    "attention_forward_kernel",
    "attention_queries_kernel",
    "attention_keys_kernel",
    "mask_gradient_kernel",
    "position_forward_kernel",
    "position_backward_kernel",
    "delta_kernel",
    "spans_kernel",
)
PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}


def calls(architecture: str, everything: bool):
    """``(head_dim, dtype, options)``."""
    if everything:
        for head_dim in (16, 32, 64, 80, 128, 256):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                options = ({"mask": mask, "dropout": p} for mask in (None, (1, 1)) for p in (0.0, 0.1))
                yield from ((head_dim, dtype, {**chosen, "rotary": True}) for chosen in options)
    if everything or architecture == "sm90":
        yield 128, torch.bfloat16, {"mask": None, "rotary": True}
        yield 64, torch.bfloat16, {"mask": (4, 1), "causal": False, "hidden": True}
    yield 64, torch.bfloat16, {"mask": None}


def main(what: str, *architectures: str) -> None:
    seen = set()
    for architecture in architectures:
        for head_dim, dtype, options in calls(architecture, what == "all"):
            call = attend_arguments(1024, 8 * head_dim, 8, dtype, **options)
            forward, backward = launches_of_attend(*call, architecture, PROCESSORS[architecture])
            for launch in forward + backward:
                name, missing = launch.kernel.__name__, tuple(argument is None for argument in launch.arguments)
                constants = sorted((k, str(v)) for k, v in launch.constants.items())
                key = (architecture, name, dtype, missing, *constants)
                if key not in seen and name in KERNELS:
                    seen.add(key)
                    used = resources(compile_for(launch, architecture))._asdict()
                    said = {"architecture": architecture, "kernel": name, "dtype": str(dtype)}
                    print(json.dumps({**said, **launch.constants, **used}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
