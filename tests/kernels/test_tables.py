"""Claim: a product takes the nearest entry that was measured on its device or on the most similar one, else a tile of
its architecture that keeps the device busy; a lookup that was made before searches nothing; and every shipped table
says how its tiles were found."""

import json

import pytest
import torch

pytest.importorskip("triton")

from macaron_ops.bench.kernel_calls import multiplying  # noqa: E402
from macaron_ops.kernels import tiles  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.tiles import FOLDER, PRODUCTS, Tile, operand, tile, using  # noqa: E402

BF16, CPU = torch.bfloat16, torch.device("cpu")
LARGE, MIDDLE, SMALL = next(t for t in tiles.tables() if t.architecture == "sm90").rows["16-bit", "linear"]


def entry(M, N, K, BM, product="linear", kind="16-bit", **more):
    tile = {"BM": BM, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    return {"product": product, "operand": kind, "M": M, "N": N, "K": K, "tile": tile, **more}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Adds devices' tables to those of the package, before them."""
    shipped = tiles.tables()

    def use(*devices, architecture="sm90"):
        paths = []
        for i, (name, processors, entries) in enumerate(devices):
            path = tmp_path / f"{i}.json"
            head = {"architecture": architecture, "device": name, "processors": processors}
            path.write_text(json.dumps({**head, "entries": entries}))
            paths.append(path)
        found = (*map(tiles.read, paths), *shipped)
        monkeypatch.setattr(tiles, "tables", lambda: found)
        tiles._tile.cache_clear()

    yield use
    tiles._tile.cache_clear()


def linear(M, N, K, dtype=BF16, on=("sm90", 132, "H100")):
    with recording(*on):
        return tile("linear", dtype, CPU, M, N, K)


def test_without_a_measurement_the_largest_tile_that_keeps_the_device_busy():
    assert linear(16384, 1024, 4096) == LARGE
    assert linear(6000, 300, 4096) == MIDDLE, "94 large tiles are too few for 132 processors, 141 are enough"
    assert linear(16384, 128, 4096) == LARGE, "128 are nearly as many"
    assert linear(64, 64, 64) == SMALL
    assert linear(16384, 1024, 4096, on=("sm90", 600, "")) == MIDDLE


def test_the_nearest_entry(measured):
    measured(("H100", 132, [entry(16384, 1024, 4096, 16), entry(4096, 1024, 4096, 32), entry(64, 64, 64, 8, "weight")]))
    assert linear(16384, 1024, 4096).BM == 16
    assert linear(9000, 1024, 4096).BM == 16 and linear(7000, 1024, 4096).BM == 32
    assert linear(16384, 4096, 1024).BM == 16, "a factor of 4 in N and in K is still near"
    assert linear(16384, 1024, 512) == LARGE, "a factor of 8 is not"
    assert linear(1, 1024, 4096) == SMALL
    assert linear(16384, 1024, 4096, torch.float16).BM == 16, "the same instructions"
    assert linear(16384, 1024, 4096, torch.float32).BM == 64
    with recording("sm90", 132, "H100"):
        assert tile("hidden", BF16, CPU, 16384, 1024, 4096).BM == 128, "another product"


def test_an_unknown_device_takes_the_most_similar_of_its_architecture(measured):
    measured(("H100", 132, [entry(16384, 1024, 4096, 16)]), ("H100 PCIe", 114, [entry(16384, 1024, 4096, 32)]))
    shape = (16384, 1024, 4096)
    assert linear(*shape, on=("sm90", 132, "H100 PCIe")).BM == 32, "its own before a similar one"
    assert linear(*shape, on=("sm90", 132, "H200")).BM == 16
    assert linear(*shape, on=("sm90", 100, "H20")).BM == 32
    unmeasured = linear(*shape, on=("sm100", 148, "B200"))
    assert unmeasured[:2] == LARGE[:2], "no measurement of this architecture"


def test_a_second_table_of_a_device_adds_to_its_entries(measured):
    """At the same distance the first table's, which `MACARON_OPS_TILES` names."""
    named = ("H100", 132, [entry(16384, 1024, 4096, 16)])
    shipped = ("H100", 132, [entry(16384, 1024, 4096, 32), entry(64, 1024, 4096, 128)])
    measured(named, shipped)
    assert linear(16384, 1024, 4096).BM == 16 and linear(64, 1024, 4096).BM == 128


def test_a_named_table_without_a_device_is_refused(tmp_path, monkeypatch):
    """Its rows would stand for the architecture's, of which they may lack some."""
    path = tmp_path / "rows.json"
    monkeypatch.setenv("MACARON_OPS_TILES", str(path))
    tiles.tables.cache_clear()
    for head in ({}, {"device": None}):
        path.write_text(json.dumps({"architecture": "sm90", "rows": {"16-bit": {}}, **head}))
        with pytest.raises(ValueError, match=r"MACARON_OPS_TILES=.*rows.json: names no device"):
            tiles.tables()


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "16-bit"), ("float32", "float32"), ("tf32", "tf32")])
def test_tf32_and_ieee_products_are_told_apart(dtype, kind):
    with multiplying(dtype) as torch_dtype:
        assert operand(torch_dtype) == kind


def test_a_repeated_lookup_searches_nothing(monkeypatch):
    first = linear(777, 1024, 4096)
    monkeypatch.setattr(tiles, "nearest", lambda *arguments: pytest.fail("it searched"))
    assert linear(777, 1024, 4096) is first


def test_a_tile_can_be_tried():
    tried = Tile(32, 32, 32, 4, 2)
    with using("linear", tried):
        assert linear(16384, 1024, 4096) == tried
    assert linear(16384, 1024, 4096) == LARGE


def test_a_file_that_is_no_table_is_named(tmp_path):
    unknown = {"architecture": "sm90", "entries": [entry(1, 1, 1, 1) | {"tile": {"SIZE": 1}}]}
    for text in ("{", "[]", "{}", json.dumps(unknown)):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(ValueError, match="odd.json is no table of tiles"):
            tiles.read(tmp_path / "odd.json")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_say_where_they_come_from(path):
    """An architecture's tiles were chosen without a clock and have no times; a device's each have one."""
    table, document = tiles.read(path), json.loads(path.read_text())
    if table.device is None:
        assert "not timed" in document["chosen"]["how"] and "time" not in path.read_text().replace("timed", "")
        assert set(table.rows) == {(kind, p) for kind in ("16-bit", "tf32", "float32") for p in PRODUCTS}
        return
    for found in document["entries"]:
        assert found["time"]["median"] > 0 and found["time"]["rounds"] > 1
        environment = document["environments"][found["environment"]]
        assert environment["device"]["name"] == table.device and environment["versions"]["triton"]
