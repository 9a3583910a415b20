"""Claim: whatever a row of the table says - tiles walked over by persistent programs, operands and results by tensor
descriptors, sums over k cut in parts - the results keep the tolerance rule, and the launches are of that kind."""

from contextlib import ExitStack

import pytest
import torch

import macaron_ops
from tests.kernels.test_numbers import assert_case_by_rule
from tests.ops.cases import Case, _ffn

TRITON = macaron_ops.backends()["triton"]
if not TRITON.usable:
    pytest.skip(f"triton: {TRITON.reason}", allow_module_level=True)

from macaron_ops.kernels import hidden, linear_residual, product_parts, tiles  # noqa: E402
from macaron_ops.kernels.product import as_operands, as_results  # noqa: E402
from macaron_ops.kernels.tiles import Tile, cut, tile  # noqa: E402

# Odd numbers of tiles in every direction; rows of 272 and 144 bytes in 16 bits can be described.
TOKENS, WIDTH, HIDDEN = (3, 11), 136, 72
SMALL = Tile(32, 64, 64, 4, 2, 2)
DROPOUT = {"dropout": 0.3, "activation_dropout": 0.2, "seed": 11}
GATED = (torch.bfloat16, {"activation": "swiglu", "placement": "post"}, "lean")
PLAIN = (torch.bfloat16, {"activation": "gelu", "norm": "layer"}, "fast")
DROPPED = (torch.float16, {"activation": "silu", "placement": "post", "norm": "sphere", **DROPOUT}, "fast")
VARIANTS = {
    "persistent": ({"PERSISTENT": True}, (torch.float32, {"activation": "gelu", "norm": "rms"}, "fast")),
    "descriptors": ({"DESCRIPTORS": True}, GATED),
    "persistent, descriptors": ({"PERSISTENT": True, "DESCRIPTORS": True, "MAXNREG": 128}, DROPPED),
    "stores": ({"STORES": True, "SLICES": 2}, GATED),
    "persistent, stores": ({"PERSISTENT": True, "DESCRIPTORS": True, "STORES": True, "SLICES": 2}, PLAIN),
    "parts": ({"PARTS": 2}, GATED),
    "parts, descriptors": ({"PARTS": 2, "DESCRIPTORS": True}, DROPPED),
}


@pytest.fixture
def launched(monkeypatch):
    """``(kernel's name, constants)`` of what the launchers start."""
    found = []
    for module in (hidden, linear_residual, product_parts):

        def noted(kernel, *arguments, launch=module.launch, **constants):
            found.append((kernel.__name__, constants))
            launch(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", noted)
    return found


@pytest.fixture
def table():
    """Gives every product the small tile with the given fields."""

    with ExitStack() as stack:

        def fill(fields):
            for product in tiles.PRODUCTS:
                parts = {"PARTS": 1} if product == "few" else {}
                stack.enter_context(tiles.using(product, SMALL._replace(**parts | fields)))

        yield fill


WHOLE = {"hidden_forward_kernel", "hidden_backward_kernel", "linear_residual_kernel"}
CUT = {"hidden_of_parts_kernel", "backward_of_parts_kernel", "residual_of_parts_kernel"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_product(variant, table, launched, device):
    fields, (dtype, options, save) = VARIANTS[variant]
    table(fields)
    hidden = 128 if variant == "stores" else HIDDEN  # whole tiles of the gate end where up begins
    case = Case(macaron_ops.ffn_step, variant, _ffn(WIDTH, hidden, TOKENS, **options))
    assert_case_by_rule(case, dtype, device, save=save)
    names = {name for name, _ in launched}
    ours, others = (CUT, WHOLE) if "PARTS" in fields else (WHOLE, CUT)
    assert ours <= names and not others & names
    products = [constants for _, constants in launched if "DESCRIPTORS" in constants]
    assert all(constants["DESCRIPTORS"] == fields.get("DESCRIPTORS", False) for constants in products)
    written = [constants["STORES"] for constants in products if not constants.get("CUT")]
    assert all(stores == fields.get("STORES", False) for stores in written) or options.get("placement") == "post"
    assert any(written) == fields.get("STORES", False)
    assert all(constants["PERSISTENT"] == fields.get("PERSISTENT", False) for constants in products)
    assert any(constants.get("CUT") for constants in products) == ("PARTS" in fields)


def test_what_cannot_be_described_goes_by_pointers():
    t = SMALL._replace(DESCRIPTORS=True)
    good = torch.zeros(8, 64, dtype=torch.bfloat16)
    bad = {
        "a base off 16 bytes": torch.zeros(8 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 64),
        "rows off 16 bytes": torch.zeros(8, 65, dtype=torch.bfloat16)[:, :64],
        "rows that overlap": torch.zeros(64, dtype=torch.bfloat16).expand(8, 64),
        "no rows": torch.zeros(0, 64, dtype=torch.bfloat16),
    }
    assert as_operands(good, good, t, True, True)[1]["DESCRIPTORS"]
    assert not as_operands(good, good, SMALL, True, True)[1]["DESCRIPTORS"]
    (wide,), constants = as_results(t._replace(STORES=True), good, whole=96)  # a tile of 64 would reach past 96
    assert wide is good and not constants["STORES"]
    for why, matrix in bad.items():
        (a, b), constants = as_operands(matrix, good, t, True, False)
        assert a is matrix and b is good and not constants["DESCRIPTORS"], why


def test_persistent_programs_fill_the_device_once():
    t, cpu = SMALL._replace(PERSISTENT=True), torch.device("cpu")  # the emulated device has two processors
    assert SMALL.programs(100, 100, cpu) == 8
    assert t.programs(100, 100, cpu) == 2 and t.programs(1, 1, cpu) == 1
    assert t._replace(MAXNREG=128).programs(100, 100, cpu) == 8  # 4 warps of 128 registers: four to a processor


def test_a_sum_is_cut_where_few_tiles_would_leave_processors_idle():
    from macaron_ops.kernels.device import recording

    def planned(product, *shape):
        with recording("sm90", 132):
            return cut(product, torch.bfloat16, torch.device("meta"), *shape)

    for tokens in (1, 8, 64):  # decoding: 16 tiles of 64 x 64 for the second product
        t, parts, part = planned("few", tokens, 1024, 4096)
        assert parts == 8 and part == 512 and parts * t.count(tokens, 1024) == 128
    assert planned("few", 64, 4096, 1024)[1] == 1  # 64 tiles, a short sum: another pass would cost more
    assert planned("few", 16384, 1024, 4096)[1] == 1
    t, parts, part = planned("weight", 256, 1024, 16384)
    assert (t.BM, t.BN, parts, part) == (128, 128, 8, 2048)
    for shape in ((1536, 512), (3072, 1024), (512, 512), (1024, 4096)):  # waves are nearly full
        t, parts, _ = planned("weight", *shape, 16384)
        programs = parts * t.count(*shape)
        assert programs >= 0.9 * 132 * -(-programs // 132) and t.BM * t.BN >= 128 * 128
    with recording("sm90", 132):  # 128 large tiles for 132 processors are enough
        assert tile("weight", torch.bfloat16, torch.device("meta"), 1024, 4096, 16384).BN == 256
