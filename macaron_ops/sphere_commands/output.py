"""Where the commands write."""

from __future__ import annotations

from pathlib import Path

__all__ = ["output_file"]


def output_file(out: Path | None, name: str, goes_on: bool = False) -> Path:
    """The path of the file ``name`` in the folder asked for, or in a new one under results/, which is made now. A file
    of another run is not written over; where the command ``goes_on`` with one, it says itself whether it can."""
    from .. import cli
    from ..bench import session

    folder = cli._ask(session.UnwritableFolder, session.make_folder, out or session.default_folder(), True)
    if (folder / name).exists() and not goes_on:
        raise cli.UsageError(f"--out {folder}: already holds a {name}; choose another folder")
    return folder / name
