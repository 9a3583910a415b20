"""Claim: `macaron-ops tune` checks every tile before it times it, replaces the present one only past the noise, stops
in time with what it has, goes on where it stopped, and what it writes is what the launchers then take."""

import dataclasses
import itertools
import json

import pytest
import torch

import macaron_ops
from macaron_ops import cli

TRITON = macaron_ops.backends()["triton"]
if not TRITON.usable:
    pytest.skip(f"triton: {TRITON.reason}", allow_module_level=True)

from macaron_ops.bench.correctness import WrongResult  # noqa: E402
from macaron_ops.bench.kernel_calls import PROCESSORS  # noqa: E402
from macaron_ops.bench.timing import Budget  # noqa: E402
from macaron_ops.bench.tuning import search, session, work  # noqa: E402
from macaron_ops.bench.tuning.candidates import candidates  # noqa: E402
from macaron_ops.bench.tuning.journal import Journal, Unusable, default_path  # noqa: E402
from macaron_ops.bench.tuning.search import Effort, NotTaken, present_tile  # noqa: E402
from macaron_ops.bench.tuning.work import Problem, Work  # noqa: E402
from macaron_ops.kernels import tiles  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.offline import SHARED_MEMORY  # noqa: E402

CPU = torch.device("cpu")
PROBLEM = Problem("linear", "bfloat16", 40, 48, 160)
LOOK = Budget(seconds=1.0, min_rounds=3, max_rounds=3, sample_seconds=1e-9, warmup_calls=1)
EFFORT = Effort(LOOK, LOOK, finalists=2, at_once=2)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tiles are the interpreter's")


class FakeClock:
    """A tile takes its ``seconds`` in turn, else 3 s; the kernel itself is not run again."""

    warmup_seconds = 0.0

    def __init__(self, **seconds):
        self.seconds = {name: itertools.cycle(values) for name, values in seconds.items()}
        self.timed = []

    def sample(self, call, calls):
        self.timed.append(call.tile)
        return next(self.seconds.get(f"BM{call.tile.BM}BK{call.tile.BK}", itertools.repeat(3.0)))

    def now(self):
        return 0.0


class Watch:
    def __init__(self):
        self.said = []

    def problem(self, index, problem): ...
    def step(self, doing, share):
        assert 0 <= share <= 1

    def say(self, line):
        self.said.append(line)


def find(clock, problem=PROBLEM, **options):
    return search.search(problem, CPU, clock, EFFORT, **options)


def test_every_product_but_few_can_be_tuned():
    assert set(work.PRODUCTS) == set(tiles.PRODUCTS) - {"few"}


@pytest.mark.parametrize("product", work.PRODUCTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_product_keeps_the_rule_and_a_wrong_result_does_not(product, dtype):
    """Each product's launcher takes the tile that is tried, and computes what its definition says."""
    this = Work.of(Problem(product, dtype, 24, 16, 40), CPU)
    yardstick = this.yardstick()
    tile = present_tile(Problem(product, dtype, 24, 16, 40), CPU)._replace(BM=32)
    results = search.Attempt(this, product, tile)()
    yardstick.check(results)
    with pytest.raises(WrongResult):
        yardstick.check([results[0] + 0.1, *results[1:]])


def test_the_faster_tile_replaces_the_present_one():
    outcome = find(FakeClock(BM32BK128=[1.0], BM32BK256=[2.0]))
    assert (outcome.tile.BM, outcome.tile.BK) == (32, 128)
    assert outcome.speedup == 3.0 and outcome.complete and outcome.tried == 3


def test_within_the_noise_the_present_tile_stays():
    """The other is faster by its median, but their middle parts touch."""
    outcome = find(FakeClock(BM32BK128=[2.0, 3.5, 2.8]))
    assert outcome.tile == outcome.present == present_tile(PROBLEM, CPU)
    assert min(outcome.timings, key=lambda t: outcome.timings[t].median) != outcome.present


def test_on_a_gpu_operands_are_read_from_memory(monkeypatch):
    """A replay holds a call for each copy of the operands, and its time is divided by them; the operands of no two
    calls that follow one another are the same memory."""
    read, captured = [], []

    def replay(call, device, calls=1):
        before = len(read)
        for _ in range(calls):
            call()
        captured.append(read[before:])
        return call

    class Clock(FakeClock):
        def sample(self, call, calls):
            return 6.0

    def noted(self):
        read.append(self.inputs[0].data_ptr())
        assert torch.equal(self.inputs[0], first.inputs[0])

    first = Work.of(PROBLEM, CPU)
    monkeypatch.setattr(search, "replay", replay)
    monkeypatch.setattr(Work, "__call__", noted)
    tile = present_tile(PROBLEM, CPU)
    works = [first, first.copy(), first.copy()]
    found = search._timings([tile, tile._replace(BM=32)], works, PROBLEM, torch.device("cuda"), Clock(), LOOK)
    assert [len(set(each)) for each in captured] == [3, 3]
    assert [timing.median for timing in found.values()] == [2.0, 2.0]


def test_every_look_has_as_many_copies_as_fill_the_cache(monkeypatch):
    looks, timings = [], search._timings

    def noted(tiles, works, *arguments):
        looks.append(len(works))
        assert all(work.nbytes == works[0].nbytes == sum(t.nbytes for t in work.inputs) for work in works)
        return timings(tiles, works[:1], *arguments)

    monkeypatch.setattr(search, "copies", lambda nbytes, device: 3)
    monkeypatch.setattr(search, "_timings", noted)
    find(FakeClock(BM32BK128=[1.0]))
    assert looks == [3] * 3


def test_a_wrong_tile_is_out_before_it_is_timed(monkeypatch):
    run = Work.__call__

    def wrong(self):
        found = run(self)
        return (found[0] + 1,) if tiles._using["linear"].BM == 32 else found

    monkeypatch.setattr(Work, "__call__", wrong)
    clock = FakeClock(BM32BK128=[1.0], BM32BK256=[1.0])
    outcome = find(clock)
    assert outcome.out == {"wrong": 2} and outcome.tile.BM == 64
    assert all(tile.BM == 64 for tile in clock.timed)


def test_a_shape_that_goes_another_way_is_not_tuned():
    """The sum of a few tokens is cut in parts: the tile of "linear" is not asked for."""
    with pytest.raises(NotTaken, match="cut in parts"):
        find(FakeClock(), Problem("linear", "bfloat16", 8, 64, 2048))


def kernel_uses(product):
    """The distinct uses of the product's kernel that are compiled beside the one that is timed."""
    problem = Problem(product, "bfloat16", 16384, 1024, 4096)
    tile = tiles.Tile(128, 128, 64, 8, 3)
    with tiles.using(product, tile), recording("sm90", 132) as launches:
        for use in work.other_uses(problem):
            use()
    launches = [x for x in launches if x.kernel.__name__ != "sums_kernel"]  # it ends a sum over rows, by no tile
    assert all(x.constants["BM"] == 128 and x.constants["BN"] == 128 for x in launches)
    return [(x.constants.get("ACTIVATION"), x.constants.get("GATED"), x.constants["DROP"]) for x in launches]


def test_the_uses_that_share_a_tile():
    """Each activation, with dropout and without; the second product forward and a product of the backward pass."""
    plain = {(name, False, drop) for name in ("relu", "gelu", "gelu_tanh", "silu") for drop in (True, False)}
    gated = {(name, True, drop) for name in ("silu", "gelu") for drop in (True, False)}
    assert set(kernel_uses("hidden")) == plain and set(kernel_uses("gated")) == gated
    dropped = ("relu", False, True)  # its mask shows in h: no dropout is drawn
    assert set(kernel_uses("hidden_backward")) == (plain | gated) - {dropped}
    assert kernel_uses("linear") == [(None, None, True), (None, None, False)]
    assert set(map(len, (work.other_uses(Problem(p, "bfloat16", 64, 64, 64)) for p in ("weight", "narrow")))) == {0}


def test_a_tile_that_breaks_a_rule_in_another_use_is_out(monkeypatch):
    """The fastest spills with dropout alone: the next one is taken."""
    monkeypatch.setattr(search, "TARGETS", {"emulated": None})
    monkeypatch.setattr(search, "compile_for", lambda launch, architecture: launch)
    monkeypatch.setattr(search, "resources", lambda compiled: compiled)
    spills = lambda x: x.constants["DROP"] and (x.constants["BM"], x.constants["BK"]) == (32, 128)  # noqa: E731
    monkeypatch.setattr(search, "faults", lambda used, launch, architecture: ["spilled"] if spills(used) else [])
    outcome = find(FakeClock(BM32BK128=[1.0], BM32BK256=[2.0]))
    assert outcome.out == {"breaks a rule in another use": 1}
    assert (outcome.tile.BM, outcome.tile.BK) == (32, 256) and outcome.complete


def test_what_does_not_compile_is_out(monkeypatch):
    run = Work.__call__

    def refused(self):
        if tiles._using["linear"][:3] == (64, 128, 128):
            raise RuntimeError("out of resources")
        return run(self)

    monkeypatch.setattr(Work, "__call__", refused)
    assert find(FakeClock()).out == {"RuntimeError": 1}


def test_out_of_time_decides_among_what_was_tried():
    answers = iter([False, False, True])
    outcome = find(FakeClock(BM32BK256=[1.0], BM64BK128=[1.0]), time_is_up=lambda: next(answers, True))
    assert outcome.tried == 2 and not outcome.complete and outcome.tile != outcome.present
    assert find(FakeClock(), time_is_up=lambda: True) is None


def test_a_run_goes_on_where_it_stopped(tmp_path):
    problems = [PROBLEM, Problem("hidden", "bfloat16", 40, 48, 160)]
    path, watch = tmp_path / "table.json", Watch()

    def run(**options):
        clock = FakeClock(BM32BK128=[1.0])
        journal = Journal(path, CPU, clock)
        return session.run(problems, CPU, clock, journal, effort=EFFORT, watch=watch, **options)

    assert run(seconds=-1).left == 2 and not path.exists()
    first = session.run(
        problems[:1], CPU, FakeClock(BM32BK128=[1.0]), Journal(path, CPU, FakeClock()), effort=EFFORT, watch=watch
    )
    assert len(first.outcomes) == 1 and "3.00x the speed of 64 x 128 x 256" in watch.said[-1]
    second = run()
    assert (second.before, len(second.outcomes)) == (1, 1)
    assert len(run(again=True).outcomes) == 2
    entries = json.loads(path.read_text())["entries"]
    assert [entry["product"] for entry in entries] == ["hidden", "linear"]
    for entry in entries:
        assert (
            entry["tile"]["BM"] == 32 and entry["time"]["median"] == 1.0 and entry["present"]["time"]["median"] == 3.0
        )
    environments = json.loads(path.read_text())["environments"]
    assert environments[entries[0]["environment"]]["versions"]["torch"] == torch.__version__


def test_a_problem_cut_short_is_tuned_again(tmp_path):
    journal = Journal(tmp_path / "table.json", CPU, FakeClock())
    outcome = find(FakeClock(BM32BK128=[1.0]))
    journal.add(dataclasses.replace(outcome, tried=outcome.of - 1))
    assert not journal.has(PROBLEM)
    journal.add(outcome)
    assert journal.has(PROBLEM) and len(journal.entries) == 1


def test_the_launchers_take_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    Journal(path, CPU, FakeClock()).add(find(FakeClock(BM32BK128=[1.0])))
    monkeypatch.setenv("MACARON_OPS_TILES", str(path))
    tiles.tables.cache_clear()
    tiles._tile.cache_clear()
    try:
        assert present_tile(PROBLEM, CPU).BM == 32
        assert present_tile(PROBLEM._replace(M=100), CPU).BM == 32, "the nearest entry"
        assert present_tile(PROBLEM._replace(M=4000), CPU).BM == 64, "too far"
    finally:
        monkeypatch.undo()
        tiles.tables.cache_clear()
        tiles._tile.cache_clear()


def test_a_table_of_another_device_is_not_overwritten(tmp_path):
    with pytest.raises(Unusable, match="holds the tiles of an architecture"):
        Journal(default_path(CPU), CPU, FakeClock())
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(Unusable, match="is no table of tiles"):
        Journal(tmp_path / "broken.json", CPU, FakeClock())
    with pytest.raises(Unusable, match="cannot be written"):
        Journal(tmp_path / "broken.json" / "table.json", CPU, FakeClock())


@pytest.mark.parametrize("architecture", PROCESSORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_fit_the_device(architecture, dtype):
    spare = 12 << 10 if architecture in ("sm90", "sm100") else 0
    with recording(architecture, PROCESSORS[architecture]):
        for problem in work.problems(session.SHAPES, [dtype], tuple(work.PRODUCTS)):
            present = present_tile(problem, CPU)
            found = candidates(problem.product, problem.operand, architecture, problem.shape, present)
            assert 3 <= len(found) <= 110 and present not in found and len(set(found)) == len(found)
            sizes = [t for t in found if t[6:] == present[6:]]  # the others have its sizes and another schedule
            assert all(t[:6] == present[:6] for t in found if t not in sizes)
            size = 2 if dtype == "bfloat16" else 4
            sides = 2 if problem.product == "gated" else 1
            for t in sizes:
                shared = t.num_stages * (t.BM + sides * t.BN) * t.BK * size
                assert shared + spare <= SHARED_MEMORY[architecture] and t.BM < 2 * max(problem.M, 64)
            near = sum(a == b for a, b in zip(sizes[0], present, strict=True))
            assert near == len(present) - 1, "the first differs in one field"


def test_the_command_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    """In the interpreter: real products, real times, however meaningless."""
    monkeypatch.setattr(session.run, "__kwdefaults__", {**session.run.__kwdefaults__, "effort": EFFORT})
    path = tmp_path / "table.json"
    arguments = ["tune", "--device", "cpu", "--product", "linear", "--shape", "20,16,160", "--out", str(path)]
    assert cli.main(arguments) == cli.FINISHED
    said = capsys.readouterr().out
    assert "linear bfloat16 M=20 N=16 K=160: " in said and "2 of 2 tried" in said and f"Table: {path}" in said
    assert tiles.read(path).entries["16-bit", "linear"][0][0] == (20, 16, 160)
    assert cli.main(arguments) == cli.FINISHED
    assert "1 were done before" in capsys.readouterr().out


def test_a_dry_run_needs_no_gpu(capsys):
    assert cli.main(["tune", "--dry-run", "--arch", "sm90", "--preset", "wmt-base", "--dtype", "tf32"]) == cli.FINISHED
    said = capsys.readouterr().out
    assert "hidden tf32 M=16384 N=2048 K=512: " in said and "candidates on sm90" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm90"], "--arch is for --dry-run"),
        (["--dry-run", "--arch", "sm70"], "--arch 'sm70': expected one of sm80"),
        (["--dry-run", "--arch", "sm90", "--product", "gemm"], "--product 'gemm': expected one of hidden"),
        (["--dry-run", "--arch", "sm90", "--preset", "gpt"], "--preset 'gpt': expected one of iwslt"),
        (["--device", "cpu", "--out", "/proc/none/table.json"], "--out /proc/none/table.json: cannot be written"),
    ],
)
def test_what_cannot_be_tuned(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["tune", "--device", "cpu"]) == cli.USAGE
    assert "--dry-run --arch sm90" in capsys.readouterr().err
