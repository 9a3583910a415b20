"""What the suite `schemes` finds out beside times: orders, errors, a real model, a training check.

A study turns the options of a run into numbers (JSON), and its numbers into a table; `pictures` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..options import Options
from . import constants, minilm, orders, training, work

Data = dict[str, object]
SUITE = "schemes"


@dataclass(frozen=True)
class Study:
    """`run(options)` measures; `table(data)` are rows of text, the header first; `text` says what holds."""

    name: str
    title: str
    text: str
    run: Callable[[Options], Data]
    table: Callable[[Data], list[tuple[str, ...]]]


STUDIES = tuple(
    Study(module.__name__.rpartition(".")[2], module.TITLE, module.TEXT, module.run, module.table)
    for module in (orders, work, constants, minilm, training)
)


def wanted(names: list[str], options: Options, before: dict[str, object]) -> list[Study]:
    """The studies of a run of these suites that an earlier one has not finished."""
    if SUITE not in names:
        return []
    return [study for study in STUDIES if options.wants(SUITE, study.name) and study.name not in before]


def found(document: dict[str, object]) -> Iterator[tuple[Study, Data]]:
    """What a results document has."""
    for study in STUDIES:
        data = document.get("studies", {}).get(study.name)
        if data is not None:
            yield study, data
