"""The rooms kernels/ and bench/ install inside macaron_ops, and so does the native library: from a wheel, from an
sdist, and editable."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for it")

ROOT = Path(__file__).parent.parent
ROOMS = {"macaron_ops": "macaron_ops", "kernels": "macaron_ops/kernels", "bench": "macaron_ops/bench"}
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "tools/build_native.py")
LIBRARY = "macaron_ops/native/libmacaron_ops_cpu.so"
RECORD = "macaron_ops/native/build.json"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
BUILDS = (
    sys.platform == "linux"
    and shutil.which(os.environ.get("CXX", "g++")) is not None
    and (shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)) is not None
    and os.environ.get("MACARON_OPS_BUILD", "cpu") == "cpu"
)
TRITON = importlib.util.find_spec("triton") is not None
SHIPPED = str(len(list(ROOT.glob("kernels/tuned/*.json")))) if TRITON else "none"
# How many tables of tiles an installed package finds.
TABLES = "from macaron_ops.kernels import tiles; print(len(tiles.tables()))" if TRITON else "print('none')"
IMPORTS = "import macaron_ops, macaron_ops.kernels, macaron_ops.bench, macaron_ops.cli as cli"


def modules():
    """Where each Python file of the rooms must be installed."""
    return {
        f"{inside}/{path.relative_to(ROOT / room)}"
        for room, inside in ROOMS.items()
        for path in ROOT.joinpath(room).rglob("*.py")
    }


def python(*arguments, cwd, **environment):
    """What this Python prints when it is run with ``arguments`` in ``cwd``."""
    environment = {"MACARON_OPS_BUILD": "cpu" if BUILDS else "none", **os.environ, **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def pip(command, *arguments, cwd, **environment):
    """A build without a network, in this environment."""
    offline = ("-q", "--no-build-isolation", "--no-deps", "--no-index")
    python("-m", "pip", command, *offline, *arguments, cwd=cwd, **environment)


def build_wheel(tree, out, **environment):
    pip("wheel", "-w", out, ".", cwd=tree, **environment)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads, for setuptools writes into the tree it builds; with what is compiled already."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        tree.joinpath(name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    for room in (*ROOMS, "csrc", "build/native"):
        if ROOT.joinpath(room).exists():
            ignored = shutil.ignore_patterns("__pycache__", "results", "libmacaron_ops_*.new")
            shutil.copytree(ROOT / room, tree / room, ignore=ignored)
    for name in (LIBRARY, RECORD):
        tree.joinpath(name).unlink(missing_ok=True)
    return tree


def test_a_checkout_works_without_an_installation():
    code = """
import sys
for hooks in (sys.meta_path, sys.path_hooks, sys.path):
    hooks[:] = [hook for hook in hooks if "editable" not in repr(hook).lower()]
sys.path.insert(0, sys.argv[1])
import macaron_ops, macaron_ops.kernels, macaron_ops.bench.suites
print(macaron_ops.kernels.__file__, macaron_ops.bench.__file__)
"""
    found = python("-c", code, ROOT, cwd=ROOT.parent).split()
    assert found == [str(ROOT / room / "__init__.py") for room in ("kernels", "bench")]


def test_a_checkout_beside_an_editable_install_of_another_keeps_its_own_rooms(tmp_path):
    """Finders of such an install come before Python's own, as setuptools puts them."""
    code = """
import importlib.util, sys
from pathlib import Path

class Another:
    @staticmethod
    def find_spec(name, path=None, target=None):
        room = name.removeprefix("macaron_ops.")
        if room in ("kernels", "bench"):
            return importlib.util.spec_from_file_location(name, Path(sys.argv[2], room, "__init__.py"))

sys.meta_path.insert(0, Another)
sys.path.insert(0, sys.argv[1])
import macaron_ops.kernels, macaron_ops.bench
print(macaron_ops.kernels.__file__, macaron_ops.bench.__file__)
"""
    for room in ("kernels", "bench"):
        tmp_path.joinpath(room).mkdir()
        tmp_path.joinpath(room, "__init__.py").touch()
    found = python("-c", code, ROOT, tmp_path, cwd=tmp_path).split()
    assert found == [str(ROOT / room / "__init__.py") for room in ("kernels", "bench")]


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
    tables = {f"macaron_ops/kernels/tuned/{path.name}" for path in ROOT.glob("kernels/tuned/*.json")}
    assert tables and tables <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "/results/" in name]
    assert RECORD in names and not [name for name in names if "csrc" in name or name.startswith("tools")]


@pytest.mark.skipif(not BUILDS, reason="needs a C++ compiler and ninja")
def test_wheel_carries_the_library_for_this_machine_and_every_python(wheel):
    assert wheel.name.endswith(f"-py3-none-{PLATFORM}.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY in archive.namelist()


def test_wheel_without_a_library_is_for_every_machine(tree, wheel, tmp_path):
    # after the other wheel, whose library is still in the build's folder
    plain = build_wheel(tree, tmp_path, MACARON_OPS_BUILD="none")
    assert plain.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(plain) as archive:
        assert RECORD in archive.namelist() and LIBRARY not in archive.namelist()


def test_unpacked_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    native = "from macaron_ops import native; print(native.library())"
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {IMPORTS}; print(cli.__file__); {native}; {TABLES}"
    cli, library, tables = python("-P", "-c", script, cwd=tmp_path).splitlines()
    assert Path(cli) == tmp_path / "macaron_ops/cli.py"
    assert library == (str(tmp_path / LIBRARY) if BUILDS else "None")
    assert tables == SHIPPED


def test_sdist_gives_the_same_wheel(tree, wheel, tmp_path):
    python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    python("-m", "tarfile", "-e", next(tmp_path.glob("*.tar.gz")), tmp_path, cwd=tree)
    unpacked = next(tmp_path.glob("macaron*/"))
    if BUILDS:  # from the same sources: there is nothing to compile again
        shutil.copytree(tree / "build/native", unpacked / "build/native")
    again = build_wheel(unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_editable_install_sees_files_added_later(tree, tmp_path):
    pip("install", "--target", tmp_path, "-e", ".", cwd=tree)
    assert tree.joinpath(LIBRARY).exists() == BUILDS and tree.joinpath(RECORD).exists()
    tree.joinpath("bench/added_later.py").touch()
    tree.joinpath("macaron_ops/room_added_later").mkdir()
    tree.joinpath("macaron_ops/room_added_later/__init__.py").touch()
    site_packages = sysconfig.get_path("purelib")
    script = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); sys.path.append({site_packages!r}); "
        "from macaron_ops import room_added_later; from macaron_ops.bench import added_later as last; "
        f"print(last.__file__); {TABLES}"
    )
    # -S: without this environment's own editable install
    added, tables = python("-S", "-P", "-c", script, cwd=tmp_path).splitlines()
    assert Path(added) == tree / "bench/added_later.py"
    assert tables == SHIPPED
