"""Starts kernels on a device that is not there, by :class:`Start` and as ``kernel[grid]``: both call the driver of
`libcuda.c`, which tells of each kernel what it was started with. Prints, as JSON, a round a start.

    python tests/kernels/start_offline.py             the kernels of one ffn_step
    python tests/kernels/start_offline.py --every     of every operator and dtype, which takes minutes
    python tests/kernels/start_offline.py --time      what a start takes the host, by either
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
import triton  # noqa: E402

STREAM, BAD_STREAM, CONTEXT_STREAM = 7, 13, 14  # libcuda.c refuses the second, the third without a context
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"


def build(folder: Path) -> ctypes.CDLL:
    """`libcuda.c`, loaded under the name by which the driver is asked for."""
    source, library = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*compiler, f"-I{NVIDIA / 'include'}", source, "-o", library], check=True)
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.take_record.restype = ctypes.c_char_p
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # Triton links against it
    return driver


def activate(stream: list[int]) -> None:
    """Triton's driver for NVIDIA's devices, an H100 as far as torch says."""
    torch._C._cuda_getCurrentRawStream = lambda device: stream[0]
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    driver.set_active(CudaDriver())


def launches(every: bool) -> list:
    """On tensors of the CPU, which nobody reads."""
    from macaron_ops.bench import kernel_calls
    from macaron_ops.kernels.device import recording
    from macaron_ops.kernels.ffn_step import forward
    from macaron_ops.reference.ffn_step import Options, Tensors

    if every:
        wanted = kernel_calls.Wanted()
        made = [each for calls in kernel_calls.OPERATORS.values() for each, _ in calls("sm90", wanted)]
        return [others(each) for each in made]
    shapes = (4096, 512), (1024, 512), 1024, (512, 1024), 512
    x, *tensors = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
    options = {"norm": "layer", "eps": 1e-5, "placement": "pre", "activation": "gelu", "step": 0.5}
    options |= {"residual_scale": 1.0, "dropout": 0.0, "activation_dropout": 0.0, "stream": 0}
    with recording("sm90", 132) as found:
        forward(x, Tensors(*tensors, None, None, None), Options(**options), "fast")
    return found


def _real(argument: object) -> object:
    """The same on the CPU, in memory that is not used: a plan's tensors are known by their places."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(argument, TensorDescriptor):
        again = object.__new__(TensorDescriptor)
        again.__dict__ = vars(argument) | {"base": _real(argument.base)}
        return again
    if isinstance(argument, torch.Tensor):
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)
    return argument


def given_to(launch) -> list[torch.Tensor]:
    given = [getattr(a, "base", a) if not isinstance(a, torch.Tensor) else a for a in launch.arguments]
    return [t for t in given if isinstance(t, torch.Tensor)]


def others(launch):
    """The same launch with other tensors."""
    return launch._replace(arguments=tuple(map(_real, launch.arguments)))


def rounds_of(each, device_calls, stream: list[int]) -> Iterator[dict]:
    """Of one launch: the first start, one with other tensors, one that a profiler is told of, one that is recorded, one
    that the driver refuses, and many by two threads."""
    from triton import knobs

    from macaron_ops.kernels.device import launch, recording
    from macaron_ops.kernels.start import Start

    def said() -> str:
        return device_calls.take_record().decode()

    device = torch.device("cpu")  # which needs no switch of the current one
    kernel, bindings, told = each.kernel, [], []
    start, run = Start(each, device), kernel.run
    kernel.run = lambda *arguments, **options: (bindings.append(1), run(*arguments, **options))[1]
    for name in ("first", "again", "hooked"):
        again = others(each)
        bindings.clear()
        if name == "hooked":
            knobs.runtime.launch_enter_hook.add(told.append)
        start(*given_to(again))
        row = {"round": name, "bound": len(bindings), "told": len(told), "packed": start._packed is not None}
        knobs.runtime.launch_enter_hook.remove(told.append)
        ours = said()
        launch(kernel, again.programs, device, *again.arguments, **again.constants)
        yield {**row, "ours": ours, "tritons": said()}
    kernel.run = run
    with recording("sm90", 132) as found:
        start(*given_to(again))
    yield {"round": "recorded", "recorded": len(found), "ours": said()}
    stream[0] = BAD_STREAM
    try:
        start(*given_to(again))
    except RuntimeError as error:
        yield {"round": "refused", "error": str(error)}
    stream[0] = CONTEXT_STREAM
    said()
    thread = threading.Thread(target=lambda: [start(*given_to(again)) for _ in range(2)])  # without a context at first
    thread.start()
    thread.join()
    yield {"round": "no context", "lines": len(said().splitlines())}
    stream[0] = STREAM

    def start_often(launch) -> None:
        for _ in range(100):
            start(*given_to(launch))

    two = again, others(each)
    threads = [threading.Thread(target=start_often, args=(each,)) for each in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = said().splitlines()
    for each in two:
        start(*given_to(each))
    yield {"round": "together", "lines": len(lines), "ours": sorted(set(lines)), "apart": sorted(said().splitlines())}


def seconds(each, device_calls) -> dict:
    """CPU time of a start by Triton's launcher and by ours, without what the driver takes."""
    from macaron_ops.bench.host import microseconds
    from macaron_ops.kernels.start import Start

    start, given = Start(each, torch.device("cpu")), given_to(each)
    device_calls.keep_record(0)
    start(*given)
    packed = microseconds(lambda: start(*given))
    start._packed = None
    tritons = microseconds(lambda: start(*given))
    device_calls.keep_record(1)
    descriptors = sum(hasattr(a, "base") for a in each.arguments if not isinstance(a, torch.Tensor))
    row = {"tensors": len(given), "descriptors": descriptors}
    return {**row, "us, Triton's": round(tritons, 1), "us, packed": round(packed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    stream = [STREAM]
    with tempfile.TemporaryDirectory() as folder:
        device_calls = build(Path(folder))
        activate(stream)
        for each in launches(options.every):
            for row in [seconds(each, device_calls)] if options.time else rounds_of(each, device_calls, stream):
                print(json.dumps({"kernel": each.kernel.__name__, **row}), flush=True)


if __name__ == "__main__":
    main()
