"""The rooms kernels/ and bench/ install inside macaron_ops: from a wheel, from an sdist, and editable."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"macaron_ops": "macaron_ops", "kernels": "macaron_ops/kernels", "bench": "macaron_ops/bench"}
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md")
IMPORTS = "import macaron_ops, macaron_ops.kernels, macaron_ops.bench, macaron_ops.cli as cli"


def modules():
    """Where each Python file of the rooms must be installed."""
    return {
        f"{inside}/{path.relative_to(ROOT / room)}"
        for room, inside in ROOMS.items()
        for path in ROOT.joinpath(room).rglob("*.py")
    }


def python(*arguments, cwd):
    """What this Python prints when it is run with ``arguments`` in ``cwd``."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def pip(command, *arguments, cwd):
    """A build without a network, in this environment."""
    python("-m", "pip", command, "-q", "--no-build-isolation", "--no-deps", "--no-index", *arguments, cwd=cwd)


def build_wheel(tree, out):
    pip("wheel", "-w", out, ".", cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads: setuptools writes into the tree it builds."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if ROOT.joinpath(name).exists():
            shutil.copy(ROOT / name, tree)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    assert held == modules()


def test_wheel_holds_the_data_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "macaron_ops/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "/results/" in name]


def test_unpacked_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {IMPORTS}; print(cli.__file__)"
    assert Path(python("-P", "-c", script, cwd=tmp_path)) == tmp_path / "macaron_ops/cli.py"


def test_sdist_gives_the_same_wheel(tree, wheel, tmp_path):
    python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    python("-m", "tarfile", "-e", next(tmp_path.glob("*.tar.gz")), tmp_path, cwd=tree)
    again = build_wheel(next(tmp_path.glob("macaron*/")), tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_editable_install_sees_files_added_later(tree, tmp_path):
    pip("install", "--target", tmp_path, "-e", ".", cwd=tree)
    tree.joinpath("bench/added_later.py").touch()
    tree.joinpath("macaron_ops/room_added_later").mkdir()
    tree.joinpath("macaron_ops/room_added_later/__init__.py").touch()
    site_packages = sysconfig.get_path("purelib")
    script = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); sys.path.append({site_packages!r}); "
        "from macaron_ops import room_added_later; from macaron_ops.bench import added_later as last; "
        "print(last.__file__)"
    )
    # -S: without this environment's own editable install
    assert Path(python("-S", "-P", "-c", script, cwd=tmp_path)) == tree / "bench/added_later.py"
