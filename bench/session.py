"""One benchmark run from its options to its report."""

from __future__ import annotations

import datetime
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import ceilings, environment, headlines, report, runner, studies, suites
from .compare import Comparison, compare
from .lines import Lines, aligned
from .options import DTYPES, Options
from .results import FILE_NAME, Results, load
from .runner import DeviceLost, Job, NothingMatches

__all__ = [
    "DeviceLost",
    "NothingMatches",
    "Outcome",
    "UnwritableFolder",
    "default_folder",
    "earlier",
    "make_folder",
    "plan",
    "remaining",
    "run",
    "write_report",
]

REPORT = "report.html"
UNSTEADY = 0.1  # a relative difference of the two measurements of a ceiling that a reader should know of


class UnwritableFolder(ValueError):
    """The output folder cannot be used; said before anything runs."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: its document and files, and the comparison if one was asked for."""

    document: dict[str, object]
    results: Path
    report: Path | None
    comparison: Comparison | None

    @property
    def failed(self) -> bool:
        return any(row["status"] in ("wrong", "failed") for row in self.document["rows"])


def default_folder() -> Path:
    return Path("results") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")


def make_folder(folder: Path, resume: bool = False) -> Path:
    """The folder, made and proved writable. Raises UnwritableFolder, also where it holds another run's results, unless
    this one is to go on with them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnwritableFolder(f"--out {folder}: cannot be written ({error.strerror or error})") from None
    if (folder / FILE_NAME).exists() and not resume:
        raise UnwritableFolder(f"--out {folder}: already holds a {FILE_NAME}; choose another folder")
    return folder


def earlier(folder: Path, options: Options) -> dict[str, object]:
    """What an earlier run with the same options, on the same device with the same software, left in `folder`; empty
    where there was none. Raises UnwritableFolder where one was, but not the same."""
    if not (folder / FILE_NAME).exists():
        return {}
    document = load(folder)
    different = environment.differences(environment.record(options.device), document["environment"])
    if any(document["options"].get(name) != value for name, value in options.as_json().items()):
        different.append("it had other options")
    if different:
        raise UnwritableFolder(f"--out {folder}: a run that cannot be gone on with: {'; '.join(different)}")
    kept = {
        name: document[name]
        for name in ("rows", "ceilings", "notes", "started", "seconds", "studies")
        if name in document
    }
    # A run that could still write told that it was interrupted. This one crashed or hung, and would again.
    return kept | ({"measuring": document.get("measuring")} if document["status"] == "running" else {})


def plan(names: Sequence[str], options: Options) -> list[Job]:
    """What a run of the named suites will measure. Raises NothingMatches if the filters leave nothing, no study
    either."""
    try:
        return runner.select(suites.groups(list(names), options), options)
    except NothingMatches:
        if studies.wanted(list(names), options, {}):
            return []
        raise


def run(
    names: Sequence[str],
    jobs: Sequence[Job],
    options: Options,
    folder: Path,
    old: dict[str, object] | None = None,
    command: str = "",
    before: dict[str, object] | None = None,
) -> Outcome:
    """Runs the planned jobs into `folder`, but for those of which it has the rows from `before`. KeyboardInterrupt and
    DeviceLost pass through; the finished rows are in the file."""
    before = before or {}
    torch.manual_seed(options.seed)
    dtypes = [DTYPES[name] for name in options.dtypes]
    header = {
        "command": command,
        "options": options.as_json() | {"suites": list(names)},
        "environment": environment.record(options.device),
        "notes": _notes(options),
    } | before
    results = Results(folder, header)
    for job in runner.remaining(jobs, results.rows, options):
        if job.group.name == before.get("measuring"):
            results.add(runner.given_up(job, options, "the process that measured it before crashed or hung in it"))
    jobs = runner.remaining(jobs, results.rows, options)
    results.write()
    try:
        with _progress(jobs, options) as console:
            device = header["environment"]["device"]["name"]
            console.say(f"macaron_ops bench {' '.join(names)} on {device}, writing to {folder}/")
            first = results.document["ceilings"] = ceilings.measure_ceilings(options.device, dtypes, options.seed)
            console.say(f"ceilings: {ceilings.told(first)}")
            results.write()
            runner.run(jobs, options, results, console)
            _study(studies.wanted(list(names), options, before.get("studies", {})), options, results, console)
            last = ceilings.measure_ceilings(options.device, dtypes, options.seed)
        results.document["ceilings"] = ceilings.better(ceilings.better(first, last), before.get("ceilings") or first)
        runner.set_shares(results.rows, results.document["ceilings"])
        results.document["notes"] += _unsteady(first, last)
    except BaseException:
        results.finish("interrupted")
        raise
    results.finish("complete")
    comparison = compare(results.document, old) if old else None
    written = write_report(results.document, folder, comparison)
    return Outcome(results.document, results.path, written, comparison)


def write_report(document: dict[str, object], folder: Path, comparison: Comparison | None = None) -> Path:
    """Plots and report.html of a results document."""
    if report.can_draw():
        from . import plots

        plots.write_all(document, folder / "plots")
    path = folder / REPORT
    path.write_text(report.render(document, headlines.headlines(document), comparison))
    return path


def remaining(jobs: Sequence[Job], before: dict[str, object], options: Options) -> list[Job]:
    """The jobs that the run before did not finish."""
    return runner.remaining(jobs, before.get("rows", ()), options)


def _study(wanted: Sequence[studies.Study], options: Options, results: Results, console: Lines) -> None:
    """One study after another; each one's numbers are in the results file when the next begins."""
    found = results.document.setdefault("studies", {}) if wanted else {}
    for study in wanted:
        console.say(f"{study.title} ...")
        found[study.name] = study.run(options)
        results.write()
        console.say("\n".join([*aligned(study.table(found[study.name])), ""]))


def _progress(jobs: Sequence[Job], options: Options) -> Lines:
    """A bar and colours in a terminal, if rich is installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines(jobs, options)
    from .console import Console

    return Console(jobs, options)


def _notes(options: Options) -> list[str]:
    notes = []
    if options.effort == "quick":
        compiled = ", ".join(suites.layers.QUICK_COMPILES)
        notes.append(
            f"A quick run has the smallest batches, {' and '.join(options.dtypes)} alone, half a second for each "
            f"variant, torch.compile at {compiled} alone, operators at few presets and macaron_ops without its "
            "reference backend where it has another; leave --quick out for the rest."
        )
    if not options.compile:
        notes.append("torch.compile was left out (--no-compile).")
    load = environment.load_average()
    if load and load > 0.5 and options.device.type == "cpu":  # a GPU's times are not the host's
        notes.append(f"When the run began, {load:.1f} other programs were running: expect wide percentiles.")
    if options.filters:
        notes.append(f"Only measurements that match {', '.join(options.filters)} were taken, and their denominators.")
    return notes


def _unsteady(first: dict[str, object], last: dict[str, object]) -> list[str]:
    difference = ceilings.disagreement(first, last)
    if difference < UNSTEADY:
        return []
    return [
        f"The ceilings measured before and after the run differ by {100 * difference:.0f}%: the machine was not steady "
        "(other programs, or changing clocks). Ratios are taken within rounds and suffer less than times do. The "
        "report uses the better ceiling; the tables in the terminal had the first."
    ]
