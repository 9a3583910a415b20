"""Claim: on a GPU a group is timed in one way, by CUDA graphs where all of it can be captured; small tensors come from
memory and not from a cache; a lost device ends the run with its rows written. On a GPU of fakes."""

import contextlib
import dataclasses
import types

import pytest
import torch

import macaron_ops
from macaron_ops.bench import ceilings, compile_ahead, group, norm_kernels, results, runner, timing
from macaron_ops.bench.correctness import WrongResult
from macaron_ops.bench.options import Options
from macaron_ops.bench.suites import ops

CUDA = Options(device=torch.device("cuda"), dtype_names=("bfloat16",), compile=False, backends=("triton",))
L2 = 1 << 20
CEILINGS = {"gemm": {"bfloat16": {"flops_per_s": 1e12}}, "copy": {"bytes_per_s": 1e9}}


class FakeClock:
    """A launched call takes 3 seconds, a replay 1 second for each call that it captured."""

    method, warmup_seconds, time = "CUDA events", 0.0, 0.0

    def sample(self, call, calls):
        seconds = getattr(call, "captured", 3.0)
        self.time += seconds * calls
        return float(seconds)

    def now(self):
        return self.time


@pytest.fixture
def gpu(monkeypatch):
    """Names whose capture fails, to be filled by a test."""
    refuse = []

    def replay(call, device, calls=1, warmup_calls=3):
        for _ in range(warmup_calls):
            call()
        if call in refuse:
            raise RuntimeError("the end of the capture failed") from None

        def replayed():
            pass

        replayed.captured = calls
        return replayed

    properties = types.SimpleNamespace(L2_cache_size=L2)
    monkeypatch.setattr(timing, "replay", replay)
    monkeypatch.setattr(timing, "clock_for", lambda device: FakeClock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return refuse


class Silent:
    def group(self, group, names): ...
    def step(self, doing, share): ...
    def done(self, group, rows): ...


def call():
    return (torch.zeros(1),)


def other():
    return (torch.zeros(1),)


def run(folder, *variants, **fields):
    names = tuple(variant.name for variant in variants)
    made = group.Group(
        "ops", "test", {}, "bfloat16", "forward", 1, None, "eager", names, lambda names: variants, **fields
    )
    written = results.Results(folder, {"ceilings": CEILINGS})
    runner.run(runner.select([made], CUDA), CUDA, written, Silent())
    return {row["variant"]: row for row in results.load(folder)["rows"]}


def variant(name, call=call, turns=1, **fields):
    return group.Variant(name, lambda: group.Ready(call, turns=turns), measures_memory=False, **fields)


def test_replays_are_the_times_and_launches_stand_beside(gpu, tmp_path):
    rows = run(tmp_path, variant("eager", turns=4), variant("other", other, turns=4))
    for row in rows.values():
        assert row["time"]["median"] == 1.0 and row["time"]["method"] == "CUDA graph"
        assert row["extra"]["launched"]["median"] == 3.0
    assert rows["other"]["speedup"]["median"] == 1.0


def test_a_variant_that_cannot_be_captured_leaves_its_group_to_launches(gpu, tmp_path):
    gpu.append(other)
    rows = run(tmp_path, variant("eager"), variant("other", other))
    assert [row["time"]["median"] for row in rows.values()] == [3.0, 3.0]
    assert rows["eager"]["time"]["method"] == "CUDA events"
    assert rows["eager"]["extra"]["replay"]["median"] == 1.0
    assert "capture failed" in rows["other"]["extra"]["replay_refused"]


def test_what_is_known_not_to_be_capturable_is_not_tried(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "replay", lambda *arguments: pytest.fail("it was captured"))
    rows = run(tmp_path, variant("eager", capturable=False))
    assert rows["eager"]["time"]["median"] == 3.0


def test_a_share_of_the_copy_bandwidth(gpu, tmp_path):
    rows = run(tmp_path, variant("eager"), bytes=500_000_000)
    assert rows["eager"]["extra"]["share_of_copy"] == 0.5


def test_a_lost_device_ends_the_run_after_its_rows_are_written(gpu, tmp_path, monkeypatch):
    def lost(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(runner.DeviceLost, match="illegal memory access"):
        run(tmp_path, variant("eager"))
    assert len(results.load(tmp_path)["rows"]) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_holds_every_turn_and_leaves_the_stream_as_it_was(fails, monkeypatch):
    """Where the end of a capture fails, torch stays on the capture's stream."""
    calls, streams, alive = [], ["default"], []

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other): ...

    @contextlib.contextmanager
    def graph(made, stream):
        streams.append("capture")
        before = len(calls)
        yield
        alive.extend(calls[before:])
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        streams.append("default")

    for name, fake in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "set_stream": lambda stream: streams.append("default"),
        "CUDAGraph": lambda: types.SimpleNamespace(replay="replay"),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def call():
        calls.append(object())
        return calls[-1]

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        assert timing.replay(call, torch.device("cuda"), calls=5) == "replay"
    assert len(alive) == 5 and len(calls) == 8 and streams[-1] == "default"


def test_sets_of_tensors_fill_three_caches(gpu):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [group.copies(n, cuda) for n in (4 * L2, 3 * L2, L2, L2 // 2 + 1, 1)] == [1, 1, 3, 6, 128]
    assert group.copies(1, cpu) == 1


def test_every_call_has_other_memory_and_the_same_result(monkeypatch):
    monkeypatch.setattr(ops, "copies", lambda nbytes, device: 3)
    case = ops.norm_case("layer", 4, 1)
    seen = []

    def recorded(x, norm_weight, norm_bias):
        seen.append(x.data_ptr())
        return case.eager(x, norm_weight, norm_bias)

    watched = ops.replace(case, eager=recorded)
    (eager,) = ops._build(watched, torch.float32, "forward+backward", Options(), ["eager"])
    ready = eager.prepare()
    assert ready.turns == 3
    found = [ready.call() for _ in range(4)]
    assert len(set(seen)) == 3 and seen[0] == seen[3]
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    eager.check(found[1])


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("norm", ["layer", "residual", "rms", "sphere"])
@pytest.mark.parametrize("backend", norm_kernels.BACKENDS)
def test_the_norms_of_the_kernels_are_variants_that_are_checked(backend, norm, direction):
    """Where there is no GPU Triton's in the interpreter, CUDA's compiled for the CPU, as in the kernels' tests."""
    status = macaron_ops.backends()[backend]
    if not status.usable:
        pytest.skip(f"{backend}: {status.reason}")
    options = Options(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    (ours,) = ops._build(ops.norm_case(norm, 5, 1), torch.float32, direction, options, [f"macaron_ops {backend}"])
    found = ours.prepare().call()
    assert len(found) == (1 if direction == "forward" else 1 + len(ops.norm_case(norm, 5, 1).tensors))
    assert ours.check(found)["error"] > 0
    with pytest.raises(WrongResult):
        ours.check([1.01 * t for t in found])


def test_what_is_compiled_is_shared_among_processes(tiny, capsys):
    arguments = ["bench", "layers", "--device", "cpu", "--dtype", "float32", "--backend", "native", "--no-compile"]
    said = []
    for part in ("1/2", "2/2"):
        compile_ahead.main(part, arguments)
        said.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in said] == [3, 3]  # two schemes, forward alone and with the backward, fast and lean
    assert len({line for lines in said for line in lines}) == 6
    assert all("layers tiny float32" in line and "macaron_ops native" in line for lines in said for line in lines)


def test_what_a_gpu_is_measured_at_is_what_the_goals_ask_for(gpu):
    """16,384 tokens at every width, a whole FFN, rows of 1 MB and more, each with its rivals, Triton's and CUDA's
    together; a million particles."""
    found = {(each.subject, each.direction): each for each in ops.groups(CUDA) if " MB" not in each.subject}
    both = dataclasses.replace(CUDA, backends=("triton", "cuda"))
    found |= {(each.subject, each.direction): each for each in ops.groups(both) if " MB" in each.subject}
    full = {each.subject for each in ops.groups(dataclasses.replace(CUDA, effort="full", dtype_names=("float32",)))}
    assert "sphere_attend_step D=3, 1,048,576 particles" in full
    for subject in ("wmt-big", "wmt-big F=4096", "conformer-s", "conformer-m", "conformer-l", "bert-base", "iwslt"):
        each = found[f"ffn_step {subject}", "forward"]
        assert each.tokens == 16384 and each.names == ("eager", "macaron_ops triton", "bare products")
    assert found["ffn_step wmt-big F=4096", "forward"].shape["hidden"] == 4096
    two, three = (1, 64), (1, 64, 256)
    rows = {"normalize_step": (3, 8, three), "layer_norm": (2, 5, three), "residual_norm": (4, 7, two)}
    for kernel, (forward, both, sizes) in (rows | dict.fromkeys(("rms_norm", "sphere_norm"), (2, 5, two))).items():
        for megabytes in sizes:
            for direction, count in (("forward", forward), ("forward+backward", both)):
                each = found[f"{kernel} {megabytes} MB", direction]
                assert each.bytes == count * megabytes << 20
                assert each.names == ("eager", "macaron_ops triton", "macaron_ops cuda")


def test_the_clocks_rise_before_anything_is_timed():
    class Clock(FakeClock):
        warmup_seconds = 50.0

    clock = Clock()
    timing._calls_per_sample(lambda: None, clock, timing.Budget(seconds=100.0))
    assert 50.0 <= clock.time <= 53.0


def test_ceilings_are_taken_of_random_numbers(monkeypatch):
    """Some GPUs copy zeros faster."""
    seen = []

    def measured(variants, clock, budget):
        for name, one in variants.items():
            found = one()
            seen.append((name, found.float().std().item()))
            return {name: timing.Timing((1.0,), 1)}

    monkeypatch.setattr(ceilings, "measure", measured)
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(ceilings, "_GEMM_SIZES", {"cpu": (16,)})
    ceilings.measure_ceilings(torch.device("cpu"), [torch.float32], 0)
    assert [name for name, _ in seen] == ["copy", "mm"]
    assert all(spread > 0.1 for _, spread in seen)
