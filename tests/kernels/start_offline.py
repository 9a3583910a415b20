"""Starts a kernel on a device that is not there, by :class:`Start` and as ``kernel[grid]``, a few times each: prints
what the compiled kernel's launcher is given every time, and how often Triton bound the arguments for it, as JSON.

    python tests/kernels/start_offline.py
"""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from macaron_ops.kernels.device import Launch, Start, launch, recording  # noqa: E402
from macaron_ops.kernels.norm_rows import norm_forward  # noqa: E402

starts = []


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, kernel, shared, device):
        return "module", f"function of {name}", 32, 0, 1024

    def unload_module(self, module):
        pass


class Driver:
    """What Triton asks of a device, an H100 whose launches are noted."""

    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def launcher_cls(self, source, metadata):
        def run(*arguments):
            starts.append([_said(a) for a in arguments])

        return run


def _said(argument) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    plain = argument is None or isinstance(argument, (int, float, str, tuple))
    return argument if plain else type(argument).__name__


def main() -> None:
    driver.set_active(Driver())
    constants = {"D": 256, "NORM": "layer", "ROWS": 8, "BLOCK": 256, "ALIGN": 8, "num_warps": 4}
    device = torch.device("cpu")  # which needs no switch of torch's current device
    start, bindings = Start(Launch(norm_forward, 2, (), constants), device), []
    run = norm_forward.run
    norm_forward.run = lambda *arguments, **options: (bindings.append(1), run(*arguments, **options))[1]
    rounds = []
    for i in range(3):
        tensors = torch.empty(16, 256), torch.empty(256), None, torch.empty(16, 256), None
        arguments = (*tensors, 1e-5, 16, 1, 256, 0)
        if i == 2:
            knobs.runtime.launch_enter_hook.add(print)
        before = len(bindings)
        start(*arguments)
        bound = len(bindings) - before
        with recording("sm90", 132) as launches:
            start(*arguments)
        launch(norm_forward, 2, device, *arguments, **constants)
        rounds.append({"bound": bound, "recorded": len(launches), "starts": starts[-2:], "all": len(starts)})
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
