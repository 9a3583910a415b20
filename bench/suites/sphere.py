"""Particles as the laboratory moves them: a row of the phase diagram, and a step of as many as fit.

The whole diagram is 90 such rows (`macaron-ops sphere phase-diagram`). The eager row is the same in plain PyTorch: the
steps of every start until the end, all products looked at after each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from macaron_ops.sphere.measures import uniform
from macaron_ops.sphere.phase_diagram import PUBLISHED, times_to_cluster

from .. import eager
from ..correctness import WrongResult
from ..group import EAGER, OURS, Group, Ready, Variant, backend_names, on_backend
from ..options import DTYPES, Options
from . import ops

DTYPE = "float32"
PUBLISHED_DTYPE = f"{EAGER} float64"  # the precision of the published diagram
_RULE = "the same time, to a step, for 99% of the starts"
_BETAS = {"quick": (4.0,), "normal": (0.5, 4.0), "full": (0.5, 2.0, 4.0, 9.0)}
_STEPS = {"quick": 10, "normal": 30, "full": 300}  # of the published 300
_BATCH = {"quick": 256, "normal": PUBLISHED["batch"], "full": PUBLISHED["batch"]}
_MANY = {"quick": (), "normal": (100_000,), "full": (100_000, 1_000_000)}


def groups(options: Options) -> list[Group]:
    if DTYPE not in options.dtypes:
        return []
    rows = [_row(beta, options) for beta in _BETAS[options.effort]]
    steps = [ops.group(ops.many_case(n), DTYPE, "forward", options) for n in _MANY[options.effort]]
    return rows + [dataclasses.replace(step, suite="sphere", min_rounds=1) for step in steps]


def _row(beta: float, options: Options) -> Group:
    batch, n, d, steps = _BATCH[options.effort], PUBLISHED["n"], PUBLISHED["d"], _STEPS[options.effort]
    return Group(
        suite="sphere",
        subject=f"phase diagram, beta {beta:g}",
        shape={"batch": batch, "particles": n, "dimension": d, "beta": beta, "steps": steps},
        dtype=DTYPE,
        direction="forward",
        tokens=batch * n * steps,
        flops=None,
        denominator=EAGER,
        names=(EAGER, PUBLISHED_DTYPE, *(f"{OURS} {name}" for name in backend_names(options))),
        build=partial(_build, beta, (batch, n, d), steps, options),
        min_rounds=5,
    )


def _build(
    beta: float, size: tuple[int, int, int], steps: int, options: Options, names: Sequence[str]
) -> Iterable[Variant]:
    batch, n, d = size
    generator = torch.Generator().manual_seed(options.seed)
    x = uniform(n, d, batch=(batch,), generator=generator).to(options.device)
    step, close = PUBLISHED["step"], PUBLISHED["close"]
    timing = {"beta": beta, "t": steps * step, "step": step, "close": close}

    @cache
    def truth() -> Tensor:
        return eager.times_to_cluster(x, **timing)

    def prepare(name: str) -> Ready:
        if name == PUBLISHED_DTYPE:
            return Ready(lambda: (eager.times_to_cluster(x, **timing),))
        narrow = x.to(DTYPES[DTYPE])
        if name == EAGER:
            return Ready(lambda: (eager.times_to_cluster(narrow, **timing),))
        moved = on_backend(name.removeprefix(OURS).strip(), lambda: times_to_cluster(narrow, **timing))
        return Ready(lambda: (moved(),))

    for name in names:
        yield Variant(name, partial(prepare, name), lambda found: _check(found[0], truth(), step))


def _check(found: Tensor, truth: Tensor, step: float) -> dict[str, object]:
    same = (found == truth) | ((found - truth).abs() < 1.5 * step)
    off = 1.0 - same.double().mean().item()
    if not off <= 0.01:
        raise WrongResult(f"arrivals differ for {off:.1%} of the starts ({_RULE})")
    return {"rule": _RULE, "tensor": "arrivals", "error": off, "allowed": 0.01}
