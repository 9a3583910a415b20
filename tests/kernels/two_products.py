"""A kernel with two products in one loop, compiled for Hopper with a loop that may be empty and with one that is not:
prints, as JSON, whether its products wait for one another.

    python tests/kernels/two_products.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from macaron_ops.kernels.device import Launch  # noqa: E402
from macaron_ops.kernels.offline import compile_for, resources  # noqa: E402


@triton.jit
def two_products(x, w, v, h, y, F, EMPTY: tl.constexpr, D: tl.constexpr, BN: tl.constexpr):
    """y = sum over blocks of (x w) v, x (D, D), w (D, F), v (F, D); h = x w, (D, F)."""
    channels, columns = tl.arange(0, D), tl.arange(0, BN)
    square = channels[:, None] * D + channels[None, :]
    n, u = tl.load(x + square), tl.zeros((D, D), tl.float32)
    for start in range(0, F if EMPTY else tl.maximum(F, 1), BN):
        at = channels[:, None] * F + (start + columns)[None, :]
        block = tl.dot(n, tl.load(w + at)).to(tl.bfloat16)
        tl.store(h + at, block)
        u = tl.dot(block, tl.load(v + (start + columns)[:, None] * D + channels[None, :]), u)
    tl.store(y + square, u)


def main() -> None:
    x = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
    w = torch.empty(128, 512, dtype=torch.bfloat16, device="meta")
    found = {}
    for name, empty in {"may be empty": True, "once at least": False}.items():
        constants = {"EMPTY": empty, "D": 128, "BN": 64, "num_warps": 8, "num_stages": 3}
        launch = Launch(two_products, 1, (x, w, w.T, w, x, 512), constants)
        found[name] = resources(compile_for(launch, "sm90")).serialized
    print(json.dumps(found))


if __name__ == "__main__":
    main()
