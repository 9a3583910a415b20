"""The results file: JSON with a versioned schema, whole and valid at every moment of a run.

A document is a header (options, environment, ceilings) and rows, one for each variant of each group, each with the raw
percentiles of its times. It is rewritten after every group through a temporary file and a rename, so what an
interruption leaves behind are the finished rows. docs of each field: `ROW_FIELDS` and `HEADER_FIELDS`. While a group is
measured its name is in `measuring`, so that what crashed or hung can be told from what was asked to stop.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path

SCHEMA = "macaron_ops.bench/1"
FILE_NAME = "results.json"
RUN_STATES = ("running", "complete", "interrupted")
ROW_STATES = ("ok", "wrong", "failed", "unavailable")

Row = dict[str, object]

HEADER_FIELDS = {
    "schema": (str, "this format and its version"),
    "status": (str, "running, complete or interrupted"),
    "command": (str, "what was asked for"),
    "started": (str, "UTC, ISO 8601"),
    "seconds": ((int, float), "wall time of the run so far"),
    "options": (dict, "effort, device, dtypes, seed, filter, ..."),
    "environment": (dict, "bench.environment.record"),
    "ceilings": (dict, "bench.ceilings.measure_ceilings"),
    "notes": (list, "what the run left out, in sentences"),
    "rows": (list, "one for each variant of each group"),
}
ROW_FIELDS = {
    "suite": (str, "layers, ops, model, schemes, sphere or ngpt"),
    "subject": (str, "the preset, operator or workload"),
    "shape": (dict, "the sizes that the subject was run with"),
    "dtype": (str, "float32, bfloat16, ..."),
    "pass": (str, "forward or forward+backward"),
    "variant": (str, "what ran, e.g. 'eager Strang'"),
    "status": (str, "ok; wrong: it computed another function and was not timed; failed; unavailable"),
    "reason": ((str, type(None)), "why it is not ok"),
    "seed": (int, "of the inputs and parameters"),
}
MEASURED_FIELDS = {
    "time": (dict, "seconds of one call: median, p20, p80, percentiles, rounds, calls_per_sample"),
    "tokens": (int, "tokens in one call"),
    "tokens_per_s": ((int, float), "tokens / median time"),
    "flops": ((int, type(None)), "useful operations in one call, bench.flops; null where the limit is memory"),
    "flops_per_s": ((int, float, type(None)), "flops / median time"),
    "share_of_gemm": ((int, float, type(None)), "flops_per_s / the GEMM rate measured in this run, same dtype"),
    "memory": ((dict, type(None)), "peak_bytes, activation_bytes, kept_bytes, method: bench.memory"),
    "speedup": ((dict, type(None)), "over: the denominator; median, p20, p80 of its time / this time, by round"),
    "check": ((dict, type(None)), "the tensor nearest to its tolerance: bench.correctness"),
    "extra": (dict, "what only this suite tells"),
}


class ResultsError(ValueError):
    """A file that is not a results file of this version, and where it departs from it."""


class Results:
    """The document of one run and the file it lives in."""

    def __init__(self, folder: Path, header: dict[str, object]) -> None:
        self.path = folder / FILE_NAME
        self._began = datetime.datetime.now(datetime.UTC)
        self._before = header.get("seconds", 0.0)  # of a run that this one goes on with
        self.document: dict[str, object] = {
            "schema": SCHEMA,
            "status": "running",
            "command": "",
            "started": self._began.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "options": {},
            "environment": {},
            "ceilings": {},
            "notes": [],
            "rows": [],
        } | header

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]

    def add(self, rows: list[Row]) -> None:
        """Appends finished rows and writes the file."""
        self.rows.extend(rows)
        self.write()

    def finish(self, status: str) -> None:
        self.document["status"] = status
        self.write()

    def write(self) -> None:
        elapsed = datetime.datetime.now(datetime.UTC) - self._began
        self.document["seconds"] = round(self._before + elapsed.total_seconds(), 1)
        validate(self.document)
        partial = self.path.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.document, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)


def load(path: Path) -> dict[str, object]:
    """The validated document at `path`, a results file or the folder that holds it."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except OSError as error:
        raise ResultsError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ResultsError(f"{file}: not JSON ({error})") from None
    try:
        validate(document)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None
    return document


def validate(document: object) -> None:
    """Raises ResultsError unless `document` is one of this schema; the message names the field."""
    if not isinstance(document, dict):
        raise ResultsError(f"expected a JSON object, got {type(document).__name__}")
    if document.get("schema") != SCHEMA:
        raise ResultsError(f"schema is {document.get('schema')!r}, expected {SCHEMA!r}")
    _check_fields(document, HEADER_FIELDS, "header")
    _check_choice(document, "status", RUN_STATES, "header")
    for index, row in enumerate(document["rows"]):
        where = f"rows[{index}]"
        if not isinstance(row, dict):
            raise ResultsError(f"{where}: expected an object, got {type(row).__name__}")
        _check_fields(row, ROW_FIELDS, where)
        _check_choice(row, "status", ROW_STATES, where)
        if row["status"] == "ok":
            _check_fields(row, MEASURED_FIELDS, where)
            _check_time(row["time"], where)
        elif not row["reason"]:
            raise ResultsError(f"{where}: status {row['status']!r} without a reason")


def key(row: Row) -> tuple[str, ...]:
    """What makes a row of one run and a row of another the same measurement."""
    shape = json.dumps(row["shape"], sort_keys=True)
    return (row["suite"], row["subject"], shape, row["dtype"], row["pass"], row["variant"])


def describe(row: Row) -> str:
    return f"{row['suite']} {row['subject']} {row['dtype']} {row['pass']} {row['variant']}"


def _check_fields(holder: dict[str, object], fields: dict[str, tuple], where: str) -> None:
    for name, (kind, meaning) in fields.items():
        if name not in holder:
            raise ResultsError(f"{where}: no field {name!r} ({meaning})")
        if not isinstance(holder[name], kind):
            raise ResultsError(f"{where}: field {name!r} is {holder[name]!r}, expected {kind}")


def _check_choice(holder: dict[str, object], name: str, choices: tuple[str, ...], where: str) -> None:
    if holder[name] not in choices:
        raise ResultsError(f"{where}: {name} is {holder[name]!r}, expected one of {', '.join(choices)}")


def _check_time(time: dict[str, object], where: str) -> None:
    for name in ("median", "p20", "p80"):
        value = time.get(name)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise ResultsError(f"{where}: time.{name} is {value!r}, expected seconds above zero")
