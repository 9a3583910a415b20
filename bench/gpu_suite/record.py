"""What a step left behind: record.json in its folder, beside its log and its results."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import environment
from .steps import CHECKOUT, Step

FILE_NAME, LOG = "record.json", "log.txt"

DONE, FAILED = "done", "failed"  # failed: it ran to its end, and something in it was wrong
CUT, HUNG, CRASHED = "cut", "hung", "crashed"  # the next call goes on with it
SKIPPED, LEFT_OUT = "skipped", "left out"  # for want of time; for want of something
FINAL = (DONE, FAILED)
STATES = (*FINAL, CUT, HUNG, CRASHED, SKIPPED, LEFT_OUT)


@dataclass(frozen=True)
class Record:
    """`environment` is that of bench.environment with a digest of the tests; `seconds` over all calls; in `command` DIR
    stands for the step's folder, so that the folder can move."""

    step: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    exit_code: int | None = None
    environment: dict[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        partial = folder / f"{FILE_NAME}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(partial, folder / FILE_NAME)

    def why_old(self, command: list[str], now: dict[str, object]) -> str | None:
        """Why what it tells is no longer so; None where it is."""
        if self.command != command:
            return "its command was another"
        return "; ".join(environment.differences(now, self.environment)) or None


def load(folder: Path) -> Record | None:
    """The record in `folder`; None where there is none that can be read."""
    try:
        return Record(**json.loads((folder / FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def holds(found: Record, here: dict[str, object]) -> bool:
    """Whether it is of this device and software; what was not done holds always."""
    versions = {name: version for name, version in found.environment.get("versions", {}).items() if name != "tests"}
    return not found.environment or not environment.differences(here, found.environment | {"versions": versions})


def surroundings(step: Step, here: dict[str, object]) -> dict[str, object]:
    """`here`, with the digest of the tests among the versions of a step that reads them."""
    return here | {"versions": here["versions"] | {"tests": _tests()}} if step.reads_tests else here


def _tests() -> str:
    digest = hashlib.sha256()
    for path in sorted(CHECKOUT.joinpath("tests").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
