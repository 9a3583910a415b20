"""Make the virtual environment and install into it what constraints.txt pins. The Makefile runs this file.

usage: python3 tools/install.py VENV STAMP [argument of pip ...]

Any Python 3 runs this file. The environment gets $PYTHON, or else the first fitting Python that is found.
STAMP is written last: an environment without it was interrupted, and is made again from nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 14)  # the Pythons that every pin of constraints.txt supports
CANDIDATES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
PROBE = """
import importlib.util, json, os, sys, sysconfig
headers = os.path.join(sysconfig.get_paths()["include"], "Python.h")
missing = [module for module in ("venv", "ensurepip") if importlib.util.find_spec(module) is None]
print(json.dumps([sys.version_info[:3], missing, os.path.exists(headers)]))
"""


def stop(message):
    sys.exit("\nmacaron_ops cannot be set up here.\n\n" + message + "\n")


def probe(python):
    """(why ``python`` cannot be used or None, whether it comes with its C headers)."""
    try:
        answer = subprocess.check_output([python, "-c", PROBE], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "not found", False
    version, missing, headers = json.loads(answer.decode())
    dotted = ".".join(map(str, version))
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        return f"{dotted} is too {'old' if tuple(version[:2]) < OLDEST else 'new'}", headers
    if missing:
        return f"{dotted} lacks {' and '.join(missing)}", headers
    return None, headers


def choose_python():
    """The Python for the environment: where there is a choice, one whose C headers are there."""
    asked = os.environ.get("PYTHON")
    found = {python: probe(python) for python in ((asked,) if asked else CANDIDATES)}
    usable = [python for python, (reason, _) in found.items() if reason is None]
    if not usable:
        rows = "\n".join(f"  {python:<12} {reason}" for python, (reason, _) in found.items())
        stop(
            f"It needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]} with the modules venv and ensurepip:\n{rows}\n\n"
            "On Debian and Ubuntu:  apt install python3 python3-venv python3-dev\n"
            "Another Python:        make test PYTHON=/path/to/python3.12"
        )
    python = max(usable, key=lambda name: found[name][1])
    if not found[python][1]:
        print(
            f"note: {python} has no C headers (Python.h): what builds kernels with torch.compile or Triton\n"
            "      is skipped. On Debian and Ubuntu: apt install python3-dev"
        )
    return python


def check_compiler():
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        stop(
            f"It needs a C++ compiler, for the CPU kernels and for torch.compile: {compiler} is not there.\n\n"
            "On Debian and Ubuntu:  apt install g++\n"
            "Another compiler:      CXX=clang++ make test\n"
            "Without one:           pip install . installs the package, which then runs on PyTorch alone"
        )


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def status(log, site_packages):
    """What pip is doing, from what it has written so far and from the packages that are there."""
    install = re.search(r"^Installing collected packages: (.*)$", log, re.MULTILINE)
    if install:
        wanted = {canonical(name) for name in install.group(1).split(", ")}
        there = {canonical(path.name.split("-")[0]) for path in site_packages.glob("*.dist-info")}
        return f"installing: {len(wanted & there)} of {len(wanted)} packages"
    fetched = re.findall(r"^Collecting ([\w.-]+)", log, re.MULTILINE)
    if not fetched:
        return "starting pip"
    size = re.findall(r"^(?:Collecting|\s+Downloading) .*?(?:\((\d.*B)\))?$", log, re.MULTILINE)[-1]
    return f"fetching package {len(fetched)}: {fetched[-1]}" + (f", {size}" if size else "")


def pip_install(venv, arguments, **environment):
    """Run pip, showing one line of progress; all that pip says goes to VENV/install.log."""
    log = venv / "install.log"
    site_packages = next(venv.glob("lib/python*/site-packages"))
    command = [venv / "bin/python", "-m", "pip", "install", "--progress-bar=off"]
    start, shown = time.monotonic(), None
    with log.open("w") as out:
        pip = subprocess.Popen(
            [*map(str, command), *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        while pip.poll() is None:
            line = status(log.read_text(), site_packages)
            if sys.stdout.isatty():
                print(f"\r\033[K{line} ({time.monotonic() - start:.0f} s)", end="", flush=True)
            elif line != shown:
                print(line, flush=True)
            shown = line
            time.sleep(0.5)
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    if pip.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        stop(f"pip failed. The end of {log}:\n\n{tail}")


def main(venv, stamp, *pip_arguments):
    os.chdir(str(ROOT))
    venv, stamp = Path(venv), Path(stamp)
    python = choose_python()
    check_compiler()
    print(f"Setting up {venv.name} with {python}, from constraints.txt: once, a few minutes.", flush=True)
    start = time.monotonic()
    if stamp.exists():
        stamp.unlink()
    else:
        shutil.rmtree(str(venv), ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pins = ["-c", "constraints.txt", *pip_arguments]
    pip_install(venv, ["setuptools", "wheel", "ninja", *pins])
    # The native libraries come after it, from `make native`, which shows how far they are.
    pip_install(venv, ["--no-build-isolation", "-e", ".[bench,hf,dev]", *pins], MACARON_OPS_BUILD="none")
    stamp.touch()
    print(f"{venv.name} is ready ({time.monotonic() - start:.0f} s).", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the next make starts the set-up again")
