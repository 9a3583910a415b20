"""Several processes on the CPU that run one script together, each with its rank, their number and a folder."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_processes"]

ROOT = Path(__file__).parents[1]


def run_processes(script: str, world: int, folder: Path) -> dict[str, str]:
    """Runs ``script RANK WORLD FOLDER`` and reads the files that the processes wrote, by name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "rendezvous"}
