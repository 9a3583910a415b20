"""Times the CPU kernels' products against torch.mm: one thread, CPU time, medians of interleaved calls.

usage: python tools/time_products.py [instruction set] [rounds]

They are those of ffn_step's forward and backward passes, on operands as the kernels find them: panels, and weights
where nn.Linear keeps them; and one that stays in the L1 cache. Each is checked before it is timed.
"""

import ctypes
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import build_native
import torch
from torch import Tensor

PANEL = 32


class Product:
    """``ours()`` and ``theirs()`` compute the same numbers, ours in another order of dimensions (``found``)."""

    ours: Callable[[], None]
    theirs: Callable[[], Tensor]
    found: Tensor
    flop: int


def words(x: Tensor, kernels: ctypes.CDLL) -> Tensor:
    """Rows (lanes, k) as panels [lanes / 32][k / pair][32][pair] of what a product with weights of this dtype wants."""
    pair = kernels.elements_of_bf16_words() if x.dtype == torch.bfloat16 else 1
    x = x if pair > 1 else x.float()
    return x.view(-1, PANEL, x.shape[1] // pair, pair).transpose(1, 2).contiguous()


class WeightTimesTokens(Product):
    """y = x W^T of a weight (rows, k), or dx = dy W of a weight (k, rows)."""

    def __init__(self, kernels, tokens, k, rows, *, backward=False, dtype=torch.float32, times=1):
        w = torch.randn((k, rows) if backward else (rows, k)).to(dtype)
        x, y = torch.randn(tokens, k).to(dtype), torch.empty(tokens, rows, dtype=dtype)
        panels, out = words(x, kernels), torch.empty(tokens // PANEL, rows, PANEL)
        shape, narrow = (*(w.T if backward else w).stride(), rows, k, tokens), dtype == torch.bfloat16
        arguments = (pointer(w), narrow, *sizes(*shape), pointer(panels), pointer(out), *sizes(times))
        self.operands = w, panels  # of which C++ has the addresses
        self.ours = lambda: kernels.weight_times_tokens(*arguments)
        self.theirs = lambda: [torch.mm(x, w if backward else w.T, out=y) for _ in range(times)][-1]
        self.found, self.flop = out.transpose(1, 2), 2 * tokens * k * rows * times


class WeightGradient(Product):
    """dW = a^T b of a weight (features, width), or its transpose."""

    def __init__(self, kernels, tokens, features, width, *, transposed=False, dtype=torch.float32):
        a, b = torch.randn(tokens, features).to(dtype), torch.randn(tokens, width).to(dtype)
        narrow = dtype == torch.bfloat16
        elements = a if not narrow or kernels.elements_of_bf16_words() > 1 else a.float()
        panels = elements.view(-1, PANEL, features).transpose(1, 2).contiguous()
        columns = words(b.T.contiguous(), kernels)
        if transposed and kernels.transposed_gradient_wants_elements(narrow):
            columns = b.view(-1, PANEL, width).transpose(1, 2).contiguous()
        grad, y = (torch.empty((width, features) if transposed else (features, width), dtype=dtype) for _ in range(2))
        arguments = (
            pointer(panels), narrow, *sizes(features, width, tokens), transposed, pointer(columns), pointer(grad)
        )  # fmt: skip
        self.operands = panels, columns
        self.ours = lambda: kernels.weight_gradient(*arguments)
        self.theirs = lambda: torch.mm(*((b.T, a) if transposed else (a.T, b)), out=y)
        self.found, self.flop = grad, 2 * tokens * features * width


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in numbers]


def cases(kernels: ctypes.CDLL) -> dict[str, Product]:
    narrow = {"dtype": torch.bfloat16}
    return {
        "in the L1 cache: 32 tokens, 120 to 24 features": WeightTimesTokens(kernels, 32, 120, 24, times=500),
        "gradient of inputs, 4096 to 1024 (wmt-big)": WeightTimesTokens(kernels, 256, 4096, 1024, backward=True),
        "gradient of inputs, 3072 to 768 (bert-base)": WeightTimesTokens(kernels, 256, 3072, 768, backward=True),
        "gradient of weights, 512 x 2048 (wmt-base)": WeightGradient(kernels, 256, 2048, 512),
        "gradient of weights, 768 x 3072 (bert-base)": WeightGradient(kernels, 256, 3072, 768),
        "its transpose, as w_out's": WeightGradient(kernels, 256, 3072, 768, transposed=True),
        "forward, 512 to 1024 (iwslt)": WeightTimesTokens(kernels, 256, 512, 1024),
        "bf16: in the L1 cache, 480 to 32": WeightTimesTokens(kernels, 32, 480, 32, times=500, **narrow),
        "bf16: forward, 512 to 1024": WeightTimesTokens(kernels, 512, 512, 1024, **narrow),
        "bf16: forward, 1024 to 4096": WeightTimesTokens(kernels, 256, 1024, 4096, **narrow),
        "bf16: forward, 4096 to 1024": WeightTimesTokens(kernels, 256, 4096, 1024, **narrow),
        "bf16: forward, 144 to 576": WeightTimesTokens(kernels, 256, 144, 576, **narrow),
        "bf16: gradient of inputs, 1024 to 512": WeightTimesTokens(kernels, 512, 1024, 512, backward=True, **narrow),
        "bf16: gradient of inputs, 3072 to 768": WeightTimesTokens(kernels, 256, 3072, 768, backward=True, **narrow),
        "bf16: gradient of weights, 1024 x 512": WeightGradient(kernels, 256, 1024, 512, **narrow),
        "bf16: its transpose, as w_out's": WeightGradient(kernels, 256, 1024, 512, transposed=True, **narrow),
    }


def compiled(isa: str, folder: Path) -> ctypes.CDLL:
    """tools/products.cpp with the flags of an instruction set's kernels."""
    library = folder / "products.so"
    flags = (
        f"{build_native.LANGUAGE} -fvisibility=default -O3 {build_native.KERNELS} {build_native.ISAS['x86_64'][isa]}"
    )
    command = [*shlex.split(build_native.compiler()[0]), *flags.split(), f"-DMACARON_OPS_ISA={isa}", "-shared"]
    subprocess.run([*command, "tools/products.cpp", "-o", str(library)], cwd=build_native.ROOT, check=True)
    return ctypes.CDLL(str(library))


def check(product: Product) -> None:
    product.ours()
    expected = product.theirs()
    close = {"rtol": 0.02, "atol": 0.5} if expected.dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(product.found.reshape_as(expected).float(), expected.float(), **close)


def seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def main(isa: str = "avx2", rounds: str = "40") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, product in cases(compiled(isa, Path(folder))).items():
            check(product)
            times = [(seconds(product.ours), seconds(product.theirs)) for _ in range(int(rounds))]
            ours, theirs = (product.flop / 1e9 / statistics.median(of_one) for of_one in zip(*times, strict=True))
            print(f"{name:48}{ours / theirs:5.2f}x: {ours:4.0f} GFLOP/s, torch.mm {theirs:4.0f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
