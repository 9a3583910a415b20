"""The report holds everything in one file, loads nothing, and shows what failed."""

import re
from html.parser import HTMLParser

import pytest

from macaron_ops.bench import compare, plots, report


class Loads(HTMLParser):
    """Every address that a browser would load by itself, and every tag left open."""

    def __init__(self):
        super().__init__()
        self.addresses, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href", "data", "poster")]
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def document(make_document, make_row):
    return make_document(
        make_row(),
        make_row("eager Strang", 1.3),
        make_row("macaron_ops reference Strang", status="wrong", reason="output is off by <1>"),
        make_row("eager", suite="ops", subject="ffn_step wmt-base"),
        make_row("transformers", suite="model", subject="MiniLM-L6 batch 1"),
        make_row("replace_layers", suite="model", subject="MiniLM-L6 batch 1"),
    )


def test_the_report_is_one_file_that_loads_nothing(document):
    page = report.render(document, ["a headline"], compare.compare(document, document))
    parser = Loads()
    parser.feed(page)
    assert parser.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parser.addresses)
    assert not parser.open
    assert not re.search(r"url\(|@import|<script|<link|https?://", page)


def test_what_was_wrong_is_shown_and_escaped(document):
    page = report.render(document, ["1 < 2"])
    assert "wrong: output is off by &lt;1&gt;" in page
    assert "1 &lt; 2" in page


def test_slower_is_marked_as_slower_and_ratios_name_their_denominator(document):
    page = report.render(document, [])
    assert "<td class='slower'>0.77x" in page
    assert "<th>speed over eager Lie-Trotter</th>" in page


def test_an_interrupted_run_says_so(document):
    assert "This run is interrupted" in report.render(document | {"status": "interrupted"}, [])


def test_an_empty_run_has_a_report(make_document):
    assert "Transformer layers" in report.render(make_document(ceilings={}), [])


def test_plots_are_drawn_for_what_was_measured(document, tmp_path):
    paths = plots.write_all(document, tmp_path)
    names = {path.stem for path in paths}
    assert names == {
        "layers-speed-float32",
        "layers-share-float32",
        "layers-memory-float32",
        "ops-speed-float32",
        "model-tokens-float32",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_families_of_models_are_drawn_as_ratios(make_document, make_row):
    rows = [
        make_row(name, median, suite="model", subject=subject, **{"pass": direction})
        for subject in ("llama", "parakeet")
        for direction in ("forward", "forward+backward")
        for name, median in (("transformers", 1.0), ("replace_layers native", 0.8))
    ]
    (plot,) = plots.plots(make_document(*rows))
    axes = plot.draw(plots.LIGHT).axes
    assert plot.name == "families-speed-float32" and "MiniLM" not in plot.caption
    assert [a.get_title(loc="left") for a in axes] == ["forward", "forward+backward"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["llama", "parakeet"]


def test_goals_are_shown_with_what_was_asked_and_a_missed_one_is_red(make_document, make_row):
    fields = {"suite": "ops", "subject": "ffn_step wmt-base"}
    rows = [make_row("eager", 1.0, **fields), make_row("macaron_ops native", 0.8, **fields)]
    page = report.render(make_document(*rows), [])
    assert "at least 1.20x" in page and '<td class="faster">met</td>' in page
    rows[1] = make_row("macaron_ops native", 1.25, **fields)
    page = report.render(make_document(*rows), [])
    assert '<td class="slower">slower, missed</td>' in page
    assert "Goals" not in report.render(make_document(make_row()), [])


def test_a_ratio_far_from_the_others_is_drawn_on_a_logarithmic_axis(make_document, make_row):
    fields = {"suite": "ops", "subject": "sphere_attend_step D=3"}
    rows = [make_row("eager", 1.0, **fields), make_row("macaron_ops native", 0.04, **fields)]
    (plot,) = plots.plots(make_document(*rows))
    assert plot.draw(plots.LIGHT).axes[0].get_xscale() == "log"
    (plot,) = plots.plots(make_document(make_row("eager", **fields), make_row("macaron_ops native", 0.8, **fields)))
    assert plot.draw(plots.LIGHT).axes[0].get_xscale() == "linear"


def test_measurements_without_a_denominator_do_not_break_the_plots(make_document, make_row):
    alone = make_row("macaron_ops native", suite="ops", subject="many particles", speedup=None)
    (plot,) = plots.plots(make_document(alone))
    plots.save(plot, plots.LIGHT)
    eager = make_row("eager", suite="ops", subject="few particles")
    (plot,) = plots.plots(make_document(alone, eager))
    labels = [label.get_text() for label in plot.draw(plots.LIGHT).axes[0].get_yticklabels()]
    assert labels == ["few particles"]
