"""What the steps found: results.json and report.html of all measurements, summary.json and summary.md of everything.

results.json is one document of bench.results: with the name that the summary gives it, it belongs into bench/results/.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .. import ceilings, goals, headlines, numbers, results, runner, session, table
from ..group import COMPILED, EAGER, OURS, PRODUCTS
from ..lines import aligned
from ..results import Row
from . import gpu_tests, record, sanitizer
from .record import Record


def write(folder: Path, records: Sequence[Record], here: dict[str, object], report: bool = False) -> None:
    """Writes all of it, the report only where `report`: its pictures take seconds."""
    document = merged(folder, records)
    if document:
        _replace(folder / results.FILE_NAME, json.dumps(document, indent=1, allow_nan=False) + "\n")
        if report:
            session.write_report(document, folder)
    else:
        for name in (results.FILE_NAME, session.REPORT):
            (folder / name).unlink(missing_ok=True)
    told = gather(folder, records, here, document)
    _replace(folder / "summary.json", json.dumps(told, indent=1) + "\n")
    _replace(folder / "summary.md", text(told) + "\n")


def merged(folder: Path, records: Sequence[Record]) -> dict[str, object] | None:
    """The measurements of the steps as one document; None where there are none."""
    by_step = {each.step: results.load(path) for each in records if (path := _results(folder, each)).exists()}
    parts = list(by_step.values())
    if not parts:
        return None
    whole = {name: parts[0][name] for name in results.HEADER_FIELDS}
    measured = [part["ceilings"] for part in parts if part["ceilings"]]
    whole["ceilings"] = measured[0] if measured else {}
    for other in measured[1:]:
        whole["ceilings"] = ceilings.better(whole["ceilings"], other)
    whole |= {
        "status": "complete" if all(part["status"] == "complete" for part in parts) else "interrupted",
        "command": "macaron-ops gpu-suite",
        "seconds": sum(part["seconds"] for part in parts),
        "options": {step: part["options"] for step, part in by_step.items()},
        "notes": list(dict.fromkeys(note for part in parts for note in part["notes"])),
        "rows": [row for part in parts for row in part["rows"]],
    }
    runner.set_shares(whole["rows"], whole["ceilings"])
    results.validate(whole)
    return whole


def gather(
    folder: Path, records: Sequence[Record], here: dict[str, object], document: dict[str, object] | None
) -> dict[str, object]:
    """Everything that summary.md tells, as data."""
    return {
        "device": here["device"],
        "environment": here,
        "steps": [asdict(each) for each in records],
        "tests": _tests(folder, records),
        "sanitizers": _sanitizers(folder, records),
        "ceilings": document and document["ceilings"],
        "goals": goals.told(document) if document else [],
        "headlines": headlines.headlines(document) if document else [],
        "measured": _measured(document["rows"]) if document else [],
        "refused_captures": _refused(document) if document else [],
        "to_commit": f"bench/results/{_name(here)}" if document and document["rows"] else None,
    }


def text(told: dict[str, object]) -> str:
    """summary.md, which is also what the command prints last."""
    device, versions = told["device"], told["environment"]["versions"]
    about = [device["name"], *(f"{name} {device[name]}" for name in ("driver", "cuda") if device.get(name))]
    about += [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    about += [f"{name} {told['environment'][name]}" for name in ("commit", "sources") if told["environment"][name]]
    parts = ["# macaron-ops gpu-suite", ", ".join(about), _table(told["steps"])]
    if told["ceilings"]:
        parts.append(f"Ceilings: {ceilings.told(told['ceilings'])}" + _clocks(told["ceilings"]))
    if told["tests"]:
        parts.append(_told_tests(told["tests"]))
    parts += told["sanitizers"]
    if told["measured"]:
        parts.append("## Measured\n\n" + "\n".join(f"    {line}" for line in aligned([_COLUMNS, *told["measured"]])))
    for title in ("goals", "headlines"):
        if told[title]:
            parts.append(f"## {title.capitalize()}\n\n" + "\n".join(f"- {line}" for line in told[title]))
    if told["refused_captures"]:
        lines = "\n".join(f"- {line}" for line in told["refused_captures"])
        parts.append(f"## Timed as launched, for these could not be captured\n\n{lines}")
    if told["to_commit"]:
        parts.append(f"To keep: cp {results.FILE_NAME} {told['to_commit']}")
    return "\n\n".join(parts)


_COLUMNS = ("measured", "time", f"over {EAGER}", f"over {COMPILED}", "of products", "of ceiling")


def _measured(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of each variant of ours: its time, its speed over the others of its group, its shares."""
    return [
        _cells(row, {other["variant"]: other["time"]["median"] for other in section if other["status"] == "ok"})
        for section in table.sections(rows)
        for row in section
        if row["variant"].startswith(OURS) and row["status"] == "ok"
    ]


def _cells(row: Row, times: dict[str, float]) -> tuple[str, ...]:
    """Layers are held against the first of their kind, the Lie-Trotter layer."""
    mine = row["time"]["median"]
    over = (next((time for name, time in times.items() if name.startswith(kind)), None) for kind in (EAGER, COMPILED))
    return (
        f"{row['subject']}, {row['pass']}, {row['dtype']}: {row['variant'].removeprefix(OURS).strip()}",
        numbers.seconds(mine),
        *(numbers.times(time / mine) if time else "-" for time in over),
        numbers.share(times[PRODUCTS] / mine if PRODUCTS in times else None),
        numbers.share(row["share_of_gemm"] or row["extra"].get("share_of_copy")),
    )


def exit_code(records: Sequence[Record]) -> int:
    """1 where a test or measurement was wrong, or a step crashed or hung; what there was no time for is no failure."""
    return int(any(each.status in (record.FAILED, record.CRASHED, record.HUNG) for each in records))


def _results(folder: Path, each: Record) -> Path:
    return folder / "steps" / each.step / results.FILE_NAME


def _tests(folder: Path, records: Sequence[Record]) -> dict[str, object] | None:
    paths = (folder / "steps" / each.step / gpu_tests.FILE_NAME for each in records)
    return next((json.loads(path.read_text()) for path in paths if path.exists()), None)


def _sanitizers(folder: Path, records: Sequence[Record]) -> list[str]:
    paths = (folder / "steps" / each.step / sanitizer.FILE_NAME for each in records)
    return [sanitizer.told(json.loads(path.read_text())) for path in paths if path.exists()]


def _refused(document: dict[str, object]) -> list[str]:
    rows = (row for row in document["rows"] if "replay_refused" in row["extra"])
    return [f"{results.describe(row)}: {row['extra']['replay_refused']}" for row in rows]


def _name(here: dict[str, object]) -> str:
    """As the files in bench/results/ are called."""
    kind = "gpu" if here["device_type"] == "cuda" else here["device_type"]
    device = re.sub(r"[^a-z0-9]+", "-", here["device"]["name"].lower()).strip("-")
    return f"{datetime.date.today()}-{kind}-{device}.json"


def _table(rows: Sequence[dict[str, object]]) -> str:
    cells = [("step", "status", "seconds")]
    cells += [(row["step"], row["status"], f"{row['seconds']:.0f}") for row in rows]
    reasons = (row["reason"] for row in rows)
    lines = (f"{line}  {reason}".rstrip() for line, reason in zip(aligned(cells), ("", *reasons), strict=True))
    return "\n".join(f"    {line}" for line in lines)


def _clocks(measured: dict[str, object]) -> str:
    loads = (rate.get("under_load") for rate in measured["gemm"].values())
    told = next((load for load in loads if load), None)
    return f"; during the products {', '.join(f'{name} {value}' for name, value in told.items())}" if told else ""


def _told_tests(tests: dict[str, object]) -> str:
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"Tests marked gpu: {counts}{', stopped before the end' if tests['interrupted'] else ''}"]
    lines += [f"- failed: {each['test']}: {each['why']}" for each in tests["failures"]]
    lines += [f"- left out: {each}" for each in tests["left_out"]]
    return "\n".join(lines)


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content)
    os.replace(partial, path)
