"""The products of the wide FFN by CUTLASS, each with every tile and turn that the library has, against cuBLAS's.

    python -m macaron_ops.bench.ffn_tiles [FOLDER]       FOLDER/tiles.json, and a line for each on the terminal

What it is for: `variant` of macaron_ops/native/cuda/wide_ffn.py. Every tile's numbers are checked against those
of the first before they are timed. A ratio is the time of cuBLAS's bare product of the same operands over ours with its
epilogue, round by round: at 1 the epilogue costs nothing. On a GPU a call is a CUDA graph's replay. Operands stay in
the cache if they fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from macaron_ops.native.cuda import library, wide_ffn

from . import environment, timing

FILE_NAME = "tiles.json"
# (rows, D, F): a wide FFN of 16,384 tokens, narrower ones, and few tokens.
SHAPES = ((16384, 1024, 4096), (16384, 768, 1536), (16384, 512, 1024), (512, 1024, 4096))
ACTIVATIONS = ("relu", "gelu")
TILES = range(4)  # csrc/cuda/sm90/product.h
SWIZZLES = (1, 4, 8)
CUBLAS = "cuBLAS"
_BUDGET = timing.Budget(seconds=0.1, min_rounds=5, sample_seconds=0.003)


def products(rows: int, width: int, hidden: int, activation: str, device: torch.device) -> Iterator[tuple]:
    """(name, call of a tile and turn, bare product), as a training step makes them in bfloat16."""
    generator = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).bfloat16()

    x, h, z, dy = randn(rows, width), randn(rows, hidden), randn(rows, hidden), randn(rows, width)
    w_in, b_in = randn(hidden, width, scale=width**-0.5), randn(hidden)
    w_out, b_out = randn(width, hidden, scale=hidden**-0.5), randn(width)
    index, keeps = wide_ffn.ACTIVATIONS.index(activation), activation != "relu"
    ops = torch.ops.macaron_ops_cuda
    yield "hidden", lambda *tile: ops.ffn_hidden(x, w_in, b_in, index, keeps, *tile), lambda: x @ w_in.T
    if activation == ACTIVATIONS[0]:  # it has none
        yield "residual", lambda *tile: (ops.ffn_residual(h, w_out, b_out, x, 1.0, 0.5, *tile),), lambda: h @ w_out.T
    yield (
        "backward",
        lambda *tile: ops.ffn_hidden_backward(dy, w_out, z, index, 0.5, keeps, True, *tile),
        lambda: dy @ w_out,
    )


def measured(name: str, call: Callable[..., tuple[Tensor, ...]], bare: Callable[[], Tensor], device: torch.device):
    """{variant: median seconds, ratio}, the fastest first.

    Raises:
        AssertionError: a tile's numbers are not those of the first.
    """
    choices = {f"tile {tile}, turn {turn}": (tile, turn) for tile in TILES for turn in SWIZZLES}
    expected = call(0, 1)[:2]  # the sums of rows are each tile's own
    for variant, choice in choices.items():
        for ours, first in zip(call(*choice)[:2], expected, strict=True):
            if not torch.allclose(ours, first, rtol=2**-7, atol=2**-7):  # an ulp, where sums are added in another order
                raise AssertionError(f"{name}, {variant}: not the numbers of tile 0")
    calls: dict[str, timing.Call] = {variant: (lambda c=choice: call(*c)) for variant, choice in choices.items()}
    calls[CUBLAS] = bare
    if device.type == "cuda":
        calls = {variant: timing.replay(one, device) for variant, one in calls.items()}
    times = timing.measure(calls, timing.clock_for(device), _BUDGET)
    rows = {
        variant: {"median": t.median, "ratio": timing.speedup(t, times[CUBLAS])["median"]}
        for variant, t in times.items()
    }
    return dict(sorted(rows.items(), key=lambda row: row[1]["median"]))


def run(folder: Path | None, device: torch.device, shapes=SHAPES) -> dict[str, object]:
    """The document: ``environment``, and ``products`` with the times of each."""
    found: list[dict[str, object]] = []
    document = {"environment": environment.record(device), "products": found}
    for rows, width, hidden in shapes:
        for activation in ACTIVATIONS:
            for name, call, bare in products(rows, width, hidden, activation, device):
                out, depth = (width, hidden) if name == "residual" else (hidden, width)
                chosen = "tile {}, turn {}".format(*wide_ffn.variant(name, rows, out, depth, activation))
                times = measured(name, call, bare, device)
                shape = {"product": name, "activation": activation, "rows": rows, "width": width, "hidden": hidden}
                found.append({**shape, "chosen": chosen, "times": times})
                best = next(variant for variant in times if variant != CUBLAS)
                told = (f"{v}: {1e6 * times[v]['median']:.1f} us, {times[v]['ratio']:.3f}" for v in (best, chosen))
                what = f"{name} {activation} {rows} x {width} x {hidden}"
                print(f"{what}: best {' | chosen '.join(told)} of {CUBLAS}'s rate")
                if folder is not None:
                    (folder / FILE_NAME).write_text(json.dumps(document, indent=1) + "\n")
    return document


def why_not() -> str | None:
    """Why there is nothing to time in this process."""
    if reason := library.why_not_loaded():
        return reason
    return library.why_not_wgmma(torch.device("cuda")) if torch.cuda.is_available() else None


def main(folder: str | None = None) -> int:
    if reason := why_not():
        print(f"the products by CUTLASS do not run here: {reason}", file=sys.stderr)
        return 2
    run(folder and Path(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
