"""The commands `macaron-ops sphere ...`, one file each. Arguments are read here; the work is done in the rooms."""

from __future__ import annotations

import argparse

from . import critical_points, phase_diagram, simulate, trajectories

__all__ = ["add"]

_EXAMPLES = """start with:
  macaron-ops sphere simulate --preset clustering
  macaron-ops sphere phase-diagram --preset quick
  macaron-ops sphere critical-points --preset circle
  macaron-ops sphere trajectories

docs/sphere.md has the equations, docs/sphere_analysis.md what was found."""


def add(commands: argparse._SubParsersAction) -> None:
    sphere = commands.add_parser(
        "sphere",
        help="Transformers as particles on the unit sphere",
        description="Transformers as interacting particles on the unit sphere: where they go, and where they end.",
        epilog=_EXAMPLES,
    )
    inside = sphere.add_subparsers(title="commands", dest="sphere_command", required=True, metavar="COMMAND")
    for module in (simulate, phase_diagram, critical_points, trajectories):
        module.add(inside)
