"""What is measured: each suite turns the options of a run into groups."""

from __future__ import annotations

from ..group import Group
from ..options import Options
from . import layers, model, ngpt, ops, schemes, sphere

SUITES = {
    "layers": layers.groups,
    "ops": ops.groups,
    "model": model.groups,
    "schemes": schemes.groups,
    "sphere": sphere.groups,
    "ngpt": ngpt.groups,
}


def groups(names: list[str], options: Options) -> list[Group]:
    return [group for name in names for group in SUITES[name](options)]
