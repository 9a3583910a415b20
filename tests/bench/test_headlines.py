"""Headlines are computed, name their denominator, and say slower when it is slower."""

from macaron_ops.bench.headlines import compared, headlines


def test_slower_is_called_slower():
    assert compared(0.8) == "slower: 0.80x the speed of"
    assert compared(1.25) == "1.25x the speed of"
    assert compared(1.001) == "as fast as"
    assert compared(1.03, 0.9, 1.1) == "within noise, 1.03x the speed of"
    assert compared(1.25, 1.2, 1.3) == "1.25x the speed of"


def test_ratios_are_geometric_means_with_their_range(make_document, make_row):
    rows = [make_row("eager Strang", 2.0, 0, subject="iwslt"), make_row("eager Strang", 0.5, 0, subject="wmt-big")]
    (line,) = headlines(make_document(*rows))
    assert (
        "eager Strang is as fast as eager Lie-Trotter (geometric mean of 2 presets: 0.50x iwslt to 2.00x wmt-big)"
        in line
    )


def test_the_best_backend_is_told_and_training_goes_first(make_document, make_row):
    both = {"pass": "forward+backward"}
    rows = [
        make_row("macaron_ops reference Strang", 1.0, 0, **both),
        make_row("macaron_ops native Strang", 0.5, 0, **both),
        make_row("macaron_ops native Strang", 0.1, 0),
    ]
    (line,) = headlines(make_document(*rows))
    assert "forward+backward in float32: macaron_ops native Strang is 2.00x the speed of" in line


def test_a_wrong_result_is_the_first_line(make_document, make_row):
    rows = [make_row("eager Strang", 1.0), make_row("macaron_ops native Strang", status="wrong", reason="off")]
    first, *_ = headlines(make_document(*rows))
    assert first.startswith("1 of 2 measurements gave a wrong result or failed")


def test_the_model_line_tells_speed_tokens_and_agreement(make_document, make_row):
    model = {"suite": "model", "subject": "MiniLM-L6 batch 1", "shape": {"batch": 1}, "check": {"to_original": 3e-8}}
    rows = [make_row("transformers", 1.0, 0, **model), make_row("replace_layers", 2.0, 0, **model)]
    (line,) = headlines(make_document(*rows))
    assert "batch 1: slower: 0.50x the speed of transformers' own layers (3.00 tokens/s)" in line
    assert "1 - cosine <= 3e-08" in line


def test_the_leanest_layer_is_told_with_its_speed(make_document, make_row):
    def weighed(variant, median, taken, kept):
        memory = {"peak_bytes": 9, "activation_bytes": taken, "kept_bytes": kept, "method": "test"}
        return make_row(variant, median, 0, memory=memory, **{"pass": "forward+backward"})

    rows = [
        weighed("eager Lie-Trotter", 1.0, 1000, 400),
        weighed("macaron_ops native Strang", 0.5, 800, 400),
        weighed("macaron_ops native lean Strang", 0.8, 350, 100),
    ]
    best, leanest = headlines(make_document(*rows))
    assert "macaron_ops native Strang is 2.00x the speed of" in best
    assert "macaron_ops native lean Strang keeps 0.25x as much for the backward as eager Lie-Trotter" in leanest
    assert leanest.endswith("takes 0.35x the activation memory (wmt-base); its speed is 1.25x.")


def test_a_layer_that_keeps_something_else_than_its_formula_says_is_told(make_document, make_row):
    def keeps(variant, kept, said):
        return make_row(variant, memory={"kept_bytes": kept, "kept_by_formula": said, "activation_bytes": None})

    as_said = keeps("macaron_ops native Strang", 1010, 1000)
    first, *_ = headlines(make_document(as_said, keeps("macaron_ops triton lean Strang", 1300, 1000)))
    assert first == (
        "1 of 2 layers keep another amount for the backward than by their formula: "
        "macaron_ops triton lean Strang (wmt-base) 1.30x."
    )
    assert not any("formula" in line for line in headlines(make_document(as_said)))


def test_operators_are_told_together_and_a_slower_one_is_called_so(make_document, make_row):
    ops = {"suite": "ops"}
    rows = [
        make_row("macaron_ops native", 0.5, 0, subject="ffn_step a", **ops),
        make_row("macaron_ops native", 2.0, 0, subject="attend_step a", **ops),
        make_row("macaron_ops native", 0.05, 0, subject="sphere_attend_step D=3", **ops),
        make_row("macaron_ops reference", 4.0, 0, subject="ffn_step a", **ops),
    ]
    (line,) = headlines(make_document(*rows))
    assert line.endswith(
        "macaron_ops native: ffn_step 2.00x, attend_step 0.50x (slower), sphere_attend_step D=3 20.00x."
    )


def test_no_rows_no_lines(make_document):
    assert headlines(make_document()) == []
