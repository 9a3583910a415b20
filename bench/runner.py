"""One group after another: prepare, check, weigh, time, write. A variant that fails becomes a row that says why.

On CUDA a group is timed as launched and as replays of CUDA graphs, interleaved. Where all of its variants could be
captured the replays are its times, and what was launched is in `extra`; else the other way round.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from . import memory, timing
from .correctness import WrongResult
from .group import COMPILED, Group, Ready, Variant
from .options import Options
from .results import Results, Row, key

# For the estimate of the remaining time, until the run's own pace corrects it.
_FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 3e14}
_CALLS_BEFORE_TIMING = 8  # the check, its truth in float64, the weighing, the warm-up
_COMPILE_SECONDS = 15.0


class Progress(Protocol):
    """What watches a run; lines.Lines and console.Console show it to people."""

    def group(self, group: Group, names: Sequence[str]) -> None: ...
    def step(self, doing: str, share: float) -> None: ...
    def done(self, group: Group, rows: list[Row]) -> None: ...


@dataclass(frozen=True)
class Job:
    """A group and those of its variants that are wanted, its denominator always among them."""

    group: Group
    names: tuple[str, ...]

    def seconds(self, options: Options) -> float:
        """A guess at its wall time."""
        call = (self.group.flops or 0) / _FLOPS_PER_SECOND[options.device.type]
        timing = max(options.budget.seconds, budget(self.group, options).min_rounds * call)
        compiled = sum(COMPILED in name for name in self.names)
        return len(self.names) * (_CALLS_BEFORE_TIMING * call + timing) + compiled * _COMPILE_SECONDS


def budget(group: Group, options: Options) -> timing.Budget:
    """How long to look at a group."""
    fewest = min(group.min_rounds or options.budget.min_rounds, options.budget.min_rounds)
    return dataclasses.replace(options.budget, min_rounds=fewest)


class NothingMatches(ValueError):
    """No measurement matches the filters; the message lists what there is to choose from."""


def select(groups: Sequence[Group], options: Options) -> list[Job]:
    """The jobs that the filters leave."""
    jobs = []
    for group in groups:
        wanted = {name for name in group.names if options.wants(*group.words(name))}
        if wanted:
            names = tuple(name for name in group.names if name in wanted | {group.denominator})
            jobs.append(Job(group, names))
    if not jobs:
        raise NothingMatches(f"--filter {' '.join(options.filters)} matches nothing. It may match:\n{_choices(groups)}")
    return jobs


def remaining(jobs: Sequence[Job], rows: Sequence[Row], options: Options) -> list[Job]:
    """The jobs of which a row is missing."""
    there = {key(row) for row in rows}
    return [job for job in jobs if any(key(_header(job.group, name, options)) not in there for name in job.names)]


def given_up(job: Job, options: Options, reason: str) -> list[Row]:
    """The rows of a job that is not to be tried."""
    return [_header(job.group, name, options) | {"status": "failed", "reason": reason} for name in job.names]


def run(jobs: Sequence[Job], options: Options, results: Results, progress: Progress) -> None:
    """Runs the jobs in order; each one's rows are in the results file when the next begins."""
    ceilings = results.document["ceilings"]
    gc.freeze()  # else each collection between groups goes through all that is imported
    try:
        for job in jobs:
            results.document["measuring"] = job.group.name
            results.write()
            progress.group(job.group, job.names)
            rows = run_group(job, options, progress)
            set_shares(rows, ceilings)
            results.document["measuring"] = None
            results.add(rows)
            progress.done(job.group, rows)
            _be_sure_of(options.device)
    finally:
        gc.unfreeze()


class DeviceLost(RuntimeError):
    """A kernel's error has made the device useless to this process; the rows so far are written."""


def _be_sure_of(device: torch.device) -> None:
    """After an illegal access every call of CUDA fails, after a capture that failed torch's allocator does, until the
    process ends."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(f"the device is lost to this process: {_told(error)}") from None


def set_shares(rows: Sequence[Row], ceilings: dict[str, object]) -> None:
    """Writes each row's shares of the ceilings; anew once the run's ceilings are final."""
    for row in rows:
        if row["status"] != "ok":
            continue
        if row["flops_per_s"]:
            row["share_of_gemm"] = row["flops_per_s"] / ceilings["gemm"][row["dtype"]]["flops_per_s"]
        if "bytes" in row["extra"]:
            row["extra"]["bytes_per_s"] = row["extra"]["bytes"] / row["time"]["median"]
            row["extra"]["share_of_copy"] = row["extra"]["bytes_per_s"] / ceilings["copy"]["bytes_per_s"]


def run_group(job: Job, options: Options, progress: Progress) -> list[Row]:
    """The rows of one group; what fails outside of a variant, in making the inputs or in timing, fails the group."""
    group, device = job.group, options.device
    rows: dict[str, Row] = {}
    ready: dict[str, Ready] = {}
    replays: dict[str, timing.Call] = {}
    try:
        for index, variant in enumerate(group.build(job.names)):
            progress.step(variant.name, 0.5 * index / len(job.names))
            rows[variant.name] = _header(group, variant.name, options)
            prepared = _prepare(variant, rows[variant.name], device)
            if prepared is not None:
                ready[variant.name] = prepared
                if device.type == "cuda":
                    replays |= _replay(variant, prepared, rows[variant.name], device)
        if ready:
            launches = {name: prepared.call for name, prepared in ready.items()}
            timings = timing.measure(
                launches | {_replay_name(name): call for name, call in replays.items()},
                timing.clock_for(device),
                budget(group, options),
                lambda share: progress.step("timing", 0.5 + 0.5 * share),
            )
            launched = {name: timings[name] for name in ready}
            replayed = {name: timings[_replay_name(name)].of_each(ready[name].turns) for name in replays}
            # A group is told one way, so that its ratios compare like with like.
            told, beside = (replayed, launched) if len(replayed) == len(launched) else (launched, replayed)
            method = timing.GRAPH if told is replayed else timing.clock_for(device).method
            for name in ready:
                if name in beside:
                    rows[name]["extra"]["launched" if told is replayed else "replay"] = beside[name].as_json()
                rows[name] |= _measured(group, name, told, method)
    except Exception as error:
        for name in job.names:
            row = rows.setdefault(name, _header(group, name, options))
            if row["status"] == "ok":
                row |= {"status": "failed", "reason": _told(error)}
    finally:
        ready.clear()
        replays.clear()
        torch._dynamo.reset()
        gc.collect()
    return list(rows.values())


def _prepare(variant: Variant, row: Row, device: torch.device) -> Ready | None:
    """Prepares, checks and weighs one variant; what goes wrong is written into the row."""
    from macaron_ops import BackendError

    try:
        ready = variant.prepare()
        found = ready.call()
        row["check"] = variant.check(found) if variant.check else None
        del found
        row["memory"] = memory.weigh(ready.call, ready.forward, device) if variant.measures_memory else None
        if variant.keeps and ready.forward:
            row["memory"]["kept_by_formula"] = variant.keeps
    except WrongResult as error:
        row |= {"status": "wrong", "reason": str(error)}
    except BackendError as error:
        row |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # whatever a variant raises is its own row's fault, not the run's
        row |= {"status": "failed", "reason": _told(error)}
    else:
        return ready
    return None


def _replay(variant: Variant, ready: Ready, row: Row, device: torch.device) -> dict[str, timing.Call]:
    """The same calls as the replay of a CUDA graph, under the variant's name, where they can be captured."""
    if not variant.capturable:
        row["extra"]["replay_refused"] = "it cannot be captured in a CUDA graph"
        return {}
    try:
        return {variant.name: timing.replay(ready.call, device, ready.turns)}
    except Exception as error:  # some variants cannot be captured; the row says so
        row["extra"]["replay_refused"] = _told(error.__context__ or error)  # the end of the capture fails as well
        return {}


def _replay_name(name: str) -> str:
    return f"{name}, replayed"


def _header(group: Group, name: str, options: Options) -> Row:
    return {
        "suite": group.suite,
        "subject": group.subject,
        "shape": group.shape,
        "dtype": group.dtype,
        "pass": group.direction,
        "variant": name,
        "status": "ok",
        "reason": None,
        "seed": options.seed,
        "extra": dict(group.extra) | ({"bytes": group.bytes} if group.bytes else {}),
    }


def _measured(
    group: Group,
    name: str,
    timings: dict[str, timing.Timing],
    method: str,
) -> Row:
    taken = timings[name]
    over = timings.get(group.denominator)
    rate = group.flops / taken.median if group.flops else None
    return {
        "time": taken.as_json() | {"method": method},
        "tokens": group.tokens,
        "tokens_per_s": group.tokens / taken.median,
        "flops": group.flops,
        "flops_per_s": rate,
        "share_of_gemm": None,
        "speedup": {"over": group.denominator, **timing.speedup(taken, over)} if over else None,
    }


def _choices(groups: Sequence[Group]) -> str:
    """What a filter may name, one line a kind."""
    kinds = ("suite", "subject", "dtype", "pass", "variant")
    words = [group.words(name) for group in groups for name in group.names]
    columns = (dict.fromkeys(column) for column in zip(*words, strict=True))
    return "\n".join(f"  {kind}: {', '.join(column)}" for kind, column in zip(kinds, columns, strict=True))


def _told(error: Exception) -> str:
    """The kind of error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else 'no message'}"
