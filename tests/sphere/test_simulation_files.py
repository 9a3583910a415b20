"""Claim: an interrupted simulation goes on bit for bit from its checkpoint, which no other run takes; trajectories are
read as they were written, and no file can bring code."""

import json

import numpy as np
import pytest
import torch

from macaron_ops.sphere import Normalization, Perceptron, SelfAttention, Trajectory, checkpoint, simulate, uniform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


X = uniform(12, 3, generator=generator())
DRAW = torch.randn(4, 3, generator=generator(1), dtype=torch.float64)
PERCEPTRON = Perceptron(DRAW, DRAW[:, 0], DRAW[:, 1], "gelu")
RUNS = {
    "euler": {},
    "float32": {"x0": X.float()},
    "splitting": {"scheme": "strang_ABA"},
    "adaptive": {"scheme": "rk4", "tolerance": 1e-7},
    "radii": {"scheme": "rk4", "normalization": Normalization("pre", radius=1.3)},
    "no points": {"keep_points": False},
}


def run(observers=("energy", "drift", "masses"), **options):
    options = {"x0": X, "t": 3.0, "step": 0.07, "observers": observers, "every": 3, **options}
    return simulate(SelfAttention(2.0, weighting="unnormalized") + PERCEPTRON, **options)


class Interrupting(Perceptron):
    """The user presses Ctrl-C in the middle of the run: within a step, as its field is evaluated."""

    calls = None

    def vectors(self, x):
        if Interrupting.calls is not None:
            Interrupting.calls -= 1
            if Interrupting.calls < 0:
                raise KeyboardInterrupt
        return super().vectors(x)


def interrupting(calls, **options):
    field = SelfAttention(2.0, weighting="unnormalized") + Interrupting(DRAW, DRAW[:, 0], DRAW[:, 1], "gelu")
    options = {"x0": X, "t": 3.0, "step": 0.07, "observers": ("energy", "drift", "masses"), "every": 3, **options}
    Interrupting.calls = calls
    try:
        return simulate(field, **options)
    finally:
        Interrupting.calls = None


def same(a, b):
    assert a.times.equal(b.times) and a.points.equal(b.points) and (a.steps, a.stopped) == (b.steps, b.stopped)
    assert (a.radii is None and b.radii is None) or a.radii.equal(b.radii)
    assert list(a.observed) == list(b.observed)
    for name, value in a.observed.items():
        torch.testing.assert_close(value, b.observed[name], rtol=0, atol=0, equal_nan=True)
        assert value.dtype == b.observed[name].dtype


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_twice_it_ends_bit_for_bit_as_if_never(name, tmp_path):
    options, path = RUNS[name], tmp_path / "run.npz"
    whole = interrupting(None, **options)
    taken = []
    for calls in (25, 8):
        with pytest.raises(KeyboardInterrupt):
            interrupting(calls, checkpoint=path, **options)
        state, frames = checkpoint.read(path, json.loads(json.dumps(whole.meta)), torch.device("cpu"))
        taken.append(state.taken)
        assert len(frames) < len(whole.times) and state.t < 3.0
    assert 0 < taken[0] <= taken[1] < whole.steps
    same(interrupting(None, checkpoint=path, **options), whole)
    # A run that has ended is read, not run again: an interrupt at the first evaluation does not come.
    same(interrupting(0, checkpoint=path, **options), whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """Every so many steps; what was written before a step that fails stays there, whole."""
    path, whole = tmp_path / "run.npz", run()
    original, count = Perceptron.vectors, iter(range(10**6))

    def fails(self, x):
        if next(count) == 20:
            raise MemoryError
        return original(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Perceptron, "vectors", fails)
        with pytest.raises(MemoryError):
            run(checkpoint=path, checkpoint_every=8)
    state, _ = checkpoint.read(path, whole.meta, torch.device("cpu"))
    assert state.taken == 16 and list(tmp_path.iterdir()) == [path]
    same(run(checkpoint=path), whole)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"step": 0.08}, "step"),
        ({"t": 4.0}, "t"),
        ({"x0": uniform(12, 3, generator=generator(5))}, "x0"),
        ({"x0": X.float()}, "x0"),
        ({"scheme": "rk4"}, "scheme"),
        ({"ascent": False}, "ascent"),
        ({"observers": ("energy",)}, "observers"),
        ({"every": 4}, "every"),
        ({"normalization": "ngpt"}, "normalization"),
        ({"scheme": "rk4", "tolerance": 1e-6}, "scheme, tolerance"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(other, name, tmp_path):
    path = tmp_path / "run.npz"
    run(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"checkpoint: .* is of a run with another {name}; remove it or name another"):
        run(checkpoint=path, **other)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_field_is_refused(tmp_path):
    path, weights = tmp_path / "run.npz", DRAW[:, 1].clone()
    simulate(Perceptron(DRAW, DRAW[:, 0], weights), X, 0.1, 0.1, checkpoint=path)
    weights[2] += 1e-15
    with pytest.raises(ValueError, match="is of a run with another field"):
        simulate(Perceptron(DRAW, DRAW[:, 0], weights), X, 0.1, 0.1, checkpoint=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("law", ["post", "peri"])
def test_a_trajectory_is_read_as_it_was_written(dtype, law, tmp_path):
    path = run(x0=torch.nn.functional.normalize(X.to(dtype), dim=-1), normalization=law, observers=("mean_product",))
    written = path.save(tmp_path / "path")
    assert written == tmp_path / "path.npz"
    read = Trajectory.load(written)
    same(read, path)
    assert read.points.dtype == dtype and read.meta == path.meta
    assert read.meta["step"] == 0.07 and read.meta["normalization"]["name"] == law
    assert read.meta["about"] == "SelfAttention(beta=2, weighting='unnormalized') + Perceptron(4 neurons, gelu)"


def test_files_are_plain_numpy(tmp_path):
    """Another program reads them with numpy alone; without pickles."""
    path = run().save(tmp_path / "path.npz")
    with np.load(path, allow_pickle=False) as file:
        assert {"times", "points", "observed/energy", "meta"} <= set(file.files)
        assert json.loads(str(file["meta"]))["settings"]["about"].startswith("SelfAttention")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path):
    meta = np.array(json.dumps({"format": 1, "dtypes": {"times": "float64"}}))
    np.savez(tmp_path / "bomb.npz", meta=meta, times=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="expected an npz that macaron_ops.sphere wrote"):
        Trajectory.load(tmp_path / "bomb.npz")


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no npz")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"{name}: expected an npz that macaron_ops.sphere wrote"):
            Trajectory.load(tmp_path / name)
    path = run().save(tmp_path / "path.npz")
    with pytest.raises(ValueError, match="is a trajectory, not a checkpoint"):
        run(checkpoint=path)
    run(checkpoint=tmp_path / "run.npz")
    with pytest.raises(ValueError, match="is a checkpoint of a run, not a trajectory"):
        Trajectory.load(tmp_path / "run.npz")
