"""Every suite runs end to end on a tiny preset; wrong and failing variants become rows that say so."""

import dataclasses

import pytest
import torch

from macaron_ops import BackendError, cli, replace_layers
from macaron_ops.bench import ceilings, corpus, environment, group, results, runner, suites
from macaron_ops.bench.correctness import WrongResult
from macaron_ops.bench.options import Options
from macaron_ops.bench.suites import families, model, ops
from macaron_ops.integrations import FAMILIES
from macaron_ops.ops import dispatch
from macaron_ops.ops import run as run_of_ops

QUICK = Options(effort="quick", compile=False)
NORMAL = Options(effort="normal", compile=False)


class Silent:
    def group(self, group, names): ...
    def step(self, doing, share): ...
    def done(self, group, rows): ...


@pytest.fixture
def measured():
    return {"gemm": {"float32": {"flops_per_s": 1e9}, "bfloat16": {"flops_per_s": 1e9}}, "copy": {"bytes_per_s": 1e9}}


def run(jobs, options, folder, measured):
    written = results.Results(folder, {"ceilings": measured, "environment": environment.record(options.device)})
    runner.run(jobs, options, written, Silent())
    return results.load(written.path)["rows"]


@pytest.mark.parametrize(
    ("suite", "dtype"),
    [
        ("layers", "float32"),
        ("layers", "bfloat16"),
        ("ops", "float32"),
        ("ops", "bfloat16"),
        ("schemes", "float32"),
        ("ngpt", "float32"),
        ("ngpt", "bfloat16"),
    ],
)
def test_every_variant_is_right_and_timed(suite, dtype, tiny, tmp_path, measured):
    options = dataclasses.replace(NORMAL, dtype_names=(dtype,))
    jobs = runner.select(suites.groups([suite], options), options)
    rows = run(jobs, options, tmp_path, measured)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert [row for row in rows if row["status"] != "ok"] == []
    checked = [row for row in rows if row["variant"] != group.PRODUCTS]
    assert all(row["check"]["error"] <= row["check"]["allowed"] for row in checked)
    assert all(row["memory"]["peak_bytes"] > 0 for row in checked)
    kinds = ("", " Strang", " nGPT")
    assert {f"{group.OURS} reference{kind}" for kind in kinds} & {row["variant"] for row in rows}


def test_an_ngpt_layer_is_told_over_our_pre_norm_layer_and_all_that_it_returns_is_checked(tiny, tmp_path, measured):
    options = dataclasses.replace(NORMAL, dtype_names=("float32",), backends=("reference",))
    jobs = runner.select(suites.groups(["ngpt"], options), options)
    rows = run(jobs, options, tmp_path, measured)
    assert {row["speedup"]["over"] for row in rows} == {"macaron_ops reference pre-norm"}
    (layer,) = jobs[-1].group.build(["macaron_ops reference nGPT"])
    found = layer.prepare().call()
    assert len(found) == 10 and layer.check(found)["error"] > 0  # the output, of the input, of 8 parameters
    assert torch.allclose(found[0].norm(dim=-1), torch.ones(()))
    for i in range(len(found)):
        with pytest.raises(WrongResult):
            layer.check([1.01 * tensor if i == j else tensor for j, tensor in enumerate(found)])


def test_rows_of_the_phase_diagram_are_right_and_timed(monkeypatch, tmp_path, measured):
    small = {effort: value for effort, value in zip(("quick", "normal", "full"), (3, 4, 5), strict=True)}
    monkeypatch.setattr(suites.sphere, "_BATCH", small)
    monkeypatch.setattr(suites.sphere, "_STEPS", small)
    monkeypatch.setattr(suites.sphere, "_MANY", {"normal": (50,)})
    options = dataclasses.replace(NORMAL, dtype_names=("float32",))
    rows = run(runner.select(suites.groups(["sphere"], options), options), options, tmp_path, measured)
    assert [row for row in rows if row["status"] != "ok"] == []
    assert {row["subject"] for row in rows} == {
        "phase diagram, beta 0.5",
        "phase diagram, beta 4",
        "sphere_attend_step D=3, 50 particles",
    }
    assert {group.EAGER, suites.sphere.PUBLISHED_DTYPE} < {row["variant"] for row in rows}
    late = torch.tensor([1.0, 3.0])
    with pytest.raises(WrongResult, match="arrivals differ for 50.0%"):
        suites.sphere._check(late, torch.tensor([1.0, torch.inf]), 0.1)


@pytest.mark.inductor
def test_compiled_layers_are_right(tiny, tmp_path, measured):
    options = Options(effort="normal", dtype_names=("float32",), filters=("forward+backward/torch.compile",))
    rows = run(runner.select(suites.groups(["layers"], options), options), options, tmp_path, measured)
    assert [(row["variant"], row["status"]) for row in rows] == [
        ("eager Lie-Trotter", "ok"),
        ("torch.compile Lie-Trotter", "ok"),
        ("torch.compile Strang", "ok"),
    ]


def backends_are_usable(monkeypatch, *names):
    monkeypatch.setattr(run_of_ops, "_remembered", {})  # calls that were planned with the others
    for name in dispatch.UNUSABLE:
        monkeypatch.setitem(dispatch.UNUSABLE, name, None if name in names else "not here")


@pytest.mark.parametrize(
    ("usable", "effort", "device", "names"),
    [
        (("native", "reference"), "quick", "cpu", ("native",)),
        (("native", "reference"), "normal", "cpu", ("native", "reference")),
        (("reference",), "quick", "cpu", ("reference",)),
        (("triton", "native", "reference"), "normal", "cpu", ("native", "reference")),
        (("triton", "native", "reference"), "quick", "cuda", ("triton",)),
        (("cuda", "triton", "reference"), "full", "cuda", ("auto", "cuda", "triton", "reference")),
    ],
)
def test_backends_are_those_of_the_device_and_the_reference_is_last(monkeypatch, usable, effort, device, names):
    backends_are_usable(monkeypatch, *usable)
    assert group.backend_names(Options(device=torch.device(device), effort=effort)) == names


def test_layers_have_each_operator_on_its_best_where_one_backend_has_not_all(monkeypatch):
    backends_are_usable(monkeypatch, "triton", "reference")
    cuda = Options(device=torch.device("cuda"), effort="quick")
    monkeypatch.setitem(dispatch.OPERATORS_OF, "triton", ("ffn_step", "normalize_step"))
    assert group.backend_names(cuda, ("ffn_step", "attend_step")) == ("auto", "triton")
    monkeypatch.setitem(dispatch.OPERATORS_OF, "triton", dispatch.OPERATORS)
    assert group.backend_names(cuda, ("ffn_step", "attend_step")) == ("triton",)


def test_a_backend_asked_for_that_cannot_run_is_unavailable(monkeypatch, tiny, tmp_path, measured):
    backends_are_usable(monkeypatch, "reference")
    wanted = ("ffn_step tiny/float32/forward/macaron_ops",)
    options = dataclasses.replace(QUICK, backends=("native", "reference"), filters=wanted)
    rows = run(runner.select(suites.groups(["ops"], options), options), options, tmp_path, measured)
    assert [(row["variant"], row["status"]) for row in rows] == [
        ("eager", "ok"),
        ("macaron_ops native", "unavailable"),
        ("macaron_ops reference", "ok"),
    ]


def test_particles_in_space_have_named_denominators_and_many_run_alone(monkeypatch, tiny):
    backends_are_usable(monkeypatch, "native", "reference")
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: name == "pykeops")
    found = {(found.subject, found.dtype, found.direction): found.names for found in ops.groups(NORMAL)}
    for direction in ("forward", "forward+backward"):
        assert found["sphere_attend_step D=3", "float32", direction] == (
            "eager",
            "scaled_dot_product_attention",
            "pykeops",
            "macaron_ops native",
        )
    assert found["sphere_attend_step D=3, 56 particles", "float32", "forward"] == ("macaron_ops native",)
    assert ("sphere_attend_step D=3, 56 particles", "float32", "forward+backward") not in found
    assert ("sphere_attend_step D=3", "bfloat16", "forward") not in found  # unless asked for
    narrow = {
        found.subject: found.names for found in ops.groups(dataclasses.replace(NORMAL, dtype_names=("bfloat16",)))
    }
    assert "pykeops" not in narrow["sphere_attend_step D=3"]  # which has no such numbers
    assert found["sphere_attend_step D=4", "bfloat16", "forward"][1] == "scaled_dot_product_attention"
    asked = ops.groups(dataclasses.replace(NORMAL, backends=("reference",)))
    assert all("macaron_ops reference" in group.names for group in asked)
    backends_are_usable(monkeypatch, "reference")
    subjects = {group.subject for group in ops.groups(NORMAL) if "macaron_ops reference" in group.names}
    assert "sphere_attend_step D=3" in subjects and "sphere_attend_step D=3, 56 particles" not in subjects


def test_of_many_particles_the_first_are_checked(tiny):
    case = ops.many_case(20)
    (variant,) = ops._build(case, torch.float32, "forward", NORMAL, ["macaron_ops reference"])
    (y,) = variant.prepare().call()
    assert variant.check([y])["tensor"] == "output"
    y[:, -1] += 1
    variant.check([y])
    y[:, 0] += 1
    with pytest.raises(runner.WrongResult):
        variant.check([y])


def test_a_group_of_slow_calls_has_fewer_rounds():
    slow = dataclasses.replace(make_group([]), min_rounds=5)
    assert runner.budget(slow, NORMAL).min_rounds == 5
    assert runner.budget(make_group([]), NORMAL) == NORMAL.budget
    assert runner.budget(dataclasses.replace(slow, min_rounds=50), NORMAL) == NORMAL.budget


def make_group(variants):
    names = tuple(variant.name for variant in variants)
    return group.Group("ops", "test", {}, "float32", "forward", 1, None, "eager", names, lambda names: variants)


def test_a_variant_that_fails_is_a_row_and_the_others_are_timed(tmp_path, measured, tiny):
    def refuse(found):
        raise runner.WrongResult("output is off by 1")

    def unable():
        raise BackendError("native has no such operator")

    def broken():
        raise ZeroDivisionError("division\nby zero")

    def ready():
        return group.Ready(lambda: (torch.zeros(1),))

    variants = [
        group.Variant("eager", ready),
        group.Variant("wrong", ready, refuse),
        group.Variant("unable", unable),
        group.Variant("broken", broken),
    ]
    options = Options()
    rows = run(runner.select([make_group(variants)], options), options, tmp_path, measured)
    assert [(row["variant"], row["status"], row["reason"]) for row in rows] == [
        ("eager", "ok", None),
        ("wrong", "wrong", "output is off by 1"),
        ("unable", "unavailable", "native has no such operator"),
        ("broken", "failed", "ZeroDivisionError: division"),
    ]
    assert "time" in rows[0] and "time" not in rows[1]


@pytest.mark.parametrize("where", ["inputs", "timing"])
def test_what_fails_outside_of_a_variant_fails_its_group_alone(where, tmp_path, measured, tiny):
    def build(names):
        if where == "inputs":
            raise MemoryError("no room for the inputs")
        yield group.Variant("eager", lambda: group.Ready(call))

    def call():
        calls.append(1)
        if len(calls) > 3:  # the check and the weighing went well
            raise MemoryError("no room any more")
        return (torch.zeros(1),)

    calls = []
    bad = dataclasses.replace(make_group([]), names=("eager",), build=build)
    good = make_group([group.Variant("eager", lambda: group.Ready(lambda: (torch.zeros(1),)))])
    rows = run(runner.select([bad, good], Options()), Options(), tmp_path, measured)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"].startswith("MemoryError: no room")


def test_without_its_denominator_a_row_has_no_speed(tmp_path, measured, tiny):
    def broken():
        raise RuntimeError("no eager today")

    variants = [group.Variant("eager", broken), group.Variant("other", lambda: group.Ready(lambda: (torch.zeros(1),)))]
    rows = run(runner.select([make_group(variants)], Options()), Options(), tmp_path, measured)
    assert rows[1]["status"] == "ok" and rows[1]["speedup"] is None


def test_an_interruption_leaves_the_finished_groups(tmp_path, measured, tiny):
    def interrupted():
        raise KeyboardInterrupt

    first = make_group([group.Variant("eager", lambda: group.Ready(lambda: (torch.zeros(1),)))])
    second = make_group([group.Variant("eager", interrupted)])
    with pytest.raises(KeyboardInterrupt):
        run(runner.select([first, second], Options()), Options(), tmp_path, measured)
    assert len(results.load(tmp_path)["rows"]) == 1


def test_a_filter_keeps_the_denominator(tiny):
    options = dataclasses.replace(NORMAL, filters=("float32/forward/*reference strang",))
    (job,) = runner.select(suites.groups(["layers"], options), options)
    assert job.names == ("eager Lie-Trotter", "macaron_ops reference Strang")


def test_a_filter_that_matches_nothing_lists_the_choices(tiny):
    options = dataclasses.replace(QUICK, filters=("nonsense",))
    with pytest.raises(runner.NothingMatches, match="nonsense matches nothing") as error:
        runner.select(suites.groups(["layers"], options), options)
    assert "subject: tiny" in str(error.value)
    assert "eager Strang" in str(error.value)


def test_the_better_ceiling_is_kept():
    def make(gemm, copy):
        return {"gemm": {"float32": {"flops_per_s": gemm}}, "copy": {"bytes_per_s": copy}}

    assert ceilings.better(make(1.0, 4.0), make(2.0, 3.0)) == make(2.0, 4.0)
    assert ceilings.disagreement(make(1.0, 4.0), make(2.0, 3.0)) == 0.5


def test_the_corpus_is_prose_and_repeats():
    assert len(corpus.sentences()) > 600
    assert corpus.sample(8, seed=3) == corpus.sample(8, seed=3) != corpus.sample(8, seed=4)
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in corpus.sentences())


@pytest.fixture
def minilm():
    pytest.importorskip("transformers")
    if not model.importlib.util.find_spec(model.PACKAGE):
        pytest.skip(f"{model.PACKAGE} is not installed")


def test_the_workload_counts_real_tokens_and_sorts_by_length(minilm):
    work = model.workload(8, 4, seed=0)
    assert [len(batch["input_ids"]) for batch in work.batches] == [4, 4]
    assert work.lengths == sorted(work.lengths)
    assert work.real_tokens == sum(int(batch["attention_mask"].sum()) for batch in work.batches)


def test_the_model_agrees_before_and_after(minilm, tiny, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(model, "_WORKLOADS", {"quick": ((4, 1), (8, 4))})
    rows = run(runner.select(model.groups(QUICK), QUICK), QUICK, tmp_path, measured)
    assert [(row["subject"], row["variant"], row["status"]) for row in rows] == [
        ("MiniLM-L6 batch 1", "transformers", "ok"),
        ("MiniLM-L6 batch 1", "replace_layers", "ok"),
        ("MiniLM-L6 batch 4", "transformers", "ok"),
        ("MiniLM-L6 batch 4", "replace_layers", "ok"),
    ]
    assert all(row["check"]["to_original"] <= model.FLOAT32_AGREEMENT for row in rows)


def test_disagreement_is_one_minus_cosine():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    assert model.disagreement(a, b) == pytest.approx(1 - 2**-0.5)


@pytest.mark.parametrize("name", ["distilbert", "llama", "parakeet"])
def test_families_are_the_same_before_and_after(name, tmp_path, measured, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(families, "_layers", lambda options: 1)
    options = dataclasses.replace(QUICK, models=(name,), backends=("auto",))
    rows = run(runner.select(suites.groups(["model"], options), options), options, tmp_path, measured)
    assert [(row["variant"], row["pass"], row["status"]) for row in rows] == [
        (variant, direction, "ok")
        for direction in ("forward", "forward+backward")
        for variant in (group.BEFORE, f"{group.AFTER} auto")
    ]
    assert all(row["check"]["error"] <= row["check"]["allowed"] for row in rows if row["variant"] != group.BEFORE)


@pytest.mark.parametrize("name", families.SPECS)
def test_every_family_is_built_and_replaced(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(families, "_layers", lambda options: 1)
    model = families.model_of(name, QUICK)
    inputs = dict(families._inputs(name, families._size(QUICK)))
    assert families._last(model, inputs).shape[0] == 2
    replaced = {entry.after for entry in replace_layers(model, strict=True).replaced}
    assert len(replaced) == 1 and replaced.pop().startswith("Fused")


def test_every_family_of_transformers_is_measured():
    """`all` names them, and each of `replace_layers`' families is one of them, but for Gemma 4's audio: it mixes
    float32 into a float64 model, to which a run compares."""
    transformers = pytest.importorskip("transformers")
    given = cli.parser().parse_args(["bench", "model", "--model", "all", "--quick"])
    assert cli.bench_options(given).models == tuple(families.SPECS)
    modules = {getattr(transformers, spec.config).__module__.split(".")[2] for spec in families.SPECS.values()}
    for family in FAMILIES:
        names = {layer.split(".")[2] for layer in family.layers if layer.startswith("transformers.models.")}
        assert not names or names & modules or family.name in ("gemma4_audio", "unfused"), family.name


def test_a_family_that_is_replaced_wrongly_has_no_speed(tmp_path, measured, monkeypatch):
    pytest.importorskip("transformers")
    from macaron_ops.integrations import llama

    monkeypatch.setattr(families, "_layers", lambda options: 1)
    right = llama.ffn_step
    monkeypatch.setattr(llama, "ffn_step", lambda *args, step, **kwargs: right(*args, step=0.9, **kwargs))
    options = dataclasses.replace(QUICK, models=("llama",), backends=("auto",), filters=("llama/float32/forward/*",))
    rows = run(runner.select(suites.groups(["model"], options), options), options, tmp_path, measured)
    assert [row["status"] for row in rows] == ["ok", "wrong"]
