"""Claim: the kernels compile for Ampere, Hopper, Blackwell and MI300 without a GPU, fit their shared memory and use
their matrix instructions; no register is spilled but where the rules say how much; on Hopper and Blackwell described
operands come by TMA, on Hopper row kernels read and write 16 bytes a thread: the word of `macaron-ops inspect-kernels`.
``HYPOTHESIS_PROFILE=thorough`` compiles every tile of the tables in every use."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from macaron_ops import cli

pytest.importorskip("triton.backends.nvidia")
pytest.importorskip("triton.backends.amd")
ROOT = Path(__file__).parents[2]
WHAT = ["--every"] if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else []
PRODUCTS = (
    "hidden_forward_kernel",
    "hidden_backward_kernel",
    "linear_residual_kernel",
    "product_parts_kernel",
    "narrow_ffn_kernel",
    "wide_forward_kernel",
    "wide_points_kernel",
    "wide_queries_kernel",
    "wide_keys_kernel",
    "attention_forward_kernel",
    "attention_queries_kernel",
    "attention_keys_kernel",
    "mask_gradient_kernel",
)
PARTS = ("hidden_of_parts_kernel", "backward_of_parts_kernel", "residual_of_parts_kernel")
PAIRS = ("narrow_forward_kernel", "narrow_queries_kernel", "narrow_keys_kernel", "rows_backward_kernel")
ROW_KERNELS = ("norm_forward", "norm_backward", "step_forward", "step_backward", "step_forward_wide")
INSPECT = (sys.executable, "-m", "macaron_ops", "inspect-kernels")


def compiling(command, **environment):
    """In a process of its own: in this one Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(*arguments):
    done = compiling([*INSPECT, "--json", *arguments])
    assert done.returncode == cli.FINISHED, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm100", "gfx942"])
def test_compiles(architecture):
    found = rows("--arch", architecture, *WHAT)
    masked = set() if architecture == "sm90" else {"mask_gradient_kernel"}  # compiled there alone
    assert {*PRODUCTS, *PARTS, *PAIRS, *ROW_KERNELS} - masked <= {row["kernel"] for row in found}
    for row in found:
        used, narrow = row["used"], row["dtype"] in ("bfloat16", "float16")
        assert row["faults"] == [] and used["instructions"] > 50, row
        assert used["multiplies"] == (narrow and row["kernel"] in PRODUCTS), row
        if used["multiplies"]:
            assert used["wgmma" if architecture in ("sm90", "sm100") else "mma"] > 0, row
        described = row["constants"].get("DESCRIPTORS", False) and architecture in ("sm90", "sm100")
        assert (used["tma"] > 0) == described, row
        if architecture == "sm90":
            assert used["stack"] in (0, None) or row["kernel"] == "norm_backward", row
            assert not (used["multiplies"] and used["mma"]), row


@pytest.mark.parametrize(
    ("architecture", "kernel", "shape", "dtype"),
    [
        ("sm80", "hidden_backward_kernel", "16384,1024,4096", "bfloat16"),
        ("sm90", "hidden_forward_kernel", "16384,1024,4096", "bfloat16"),
        ("sm90", "norm_backward_wide", "64,16384,64", "bfloat16"),
        ("gfx942", "linear_residual_kernel", "16384,128,512", "float32"),
    ],
)
def test_dropout_costs_no_kernel_its_registers(architecture, kernel, shape, dtype):
    """Its words beside the derivative's numbers, its seed beside rows in blocks, a norm behind it: with what a call
    without it takes, these spilled, or read the seed in every turn."""
    found = rows("--arch", architecture, "--kernel", kernel, "--shape", shape, "--dtype", dtype)
    assert any(row["constants"]["DROP"] for row in found)
    for row in found:
        assert row["faults"] == [] and row["used"]["stack"] == 0, row
        assert row["used"]["narrow"] == 0 or kernel != "norm_backward_wide", row


@pytest.mark.parametrize(
    ("architecture", "kernel", "spilled"),
    [
        *((name, "hidden_backward_kernel", 0) for name in ("sm80", "sm90", "sm100", "gfx942")),
        *((name, "norm_backward", 8) for name in ("sm80", "sm90")),
        ("gfx942", "norm_backward", 0),
        ("sm100", "norm_backward", 24),
        ("sm100", "hidden_of_parts_kernel", 8),
        ("sm100", "hidden_forward_kernel", 16),
    ],
)
def test_a_spill_breaks_a_rule_on_every_device(architecture, kernel, spilled):
    """Past what is let pass by name."""
    from macaron_ops.kernels.device import Launch
    from macaron_ops.kernels.offline import Resources, faults

    launch = Launch(SimpleNamespace(__name__=kernel), 1, (), {})
    used = Resources(128, spilled, 0, 0, 0, 0, 0, 100, False, False, 0, 0)
    assert faults(used, launch, architecture) == faults(used._replace(stack=None), launch, architecture) == []
    found = faults(used._replace(stack=spilled + 8), launch, architecture)
    assert found == [f"{spilled + 8} bytes of stack a thread: registers are spilled"]
    found = faults(used._replace(unwritten=2), launch, architecture)
    assert found == ["2 reads of a register that nothing wrote: ptxas lost an instruction"]
    found = faults(used._replace(atomics=1), launch, architecture)
    assert found == ["1 atomic operations: other bits every time"]
    assert faults(used._replace(serialized=True), launch, architecture) == [
        "asynchronous products that wait for one another"
    ]


def test_products_that_wait_for_one_another_are_found():
    """Of one kernel with two products and a loop that may be empty, and of the same where it is not: it takes no more
    than that."""
    done = compiling([sys.executable, Path(__file__).with_name("two_products.py")])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"may be empty": True, "once at least": False}


ATOMIC = """
import sys
import torch
import triton
import triton.language as tl
from macaron_ops.kernels.device import Launch
from macaron_ops.kernels.offline import compile_for, faults, resources

@triton.jit
def adding(x):
    tl.atomic_add(x + tl.arange(0, 128), 1.0)

launch = Launch(adding, 1, (torch.empty(128, device="meta"),), {})
for architecture in ("sm90", "gfx942"):
    print(faults(resources(compile_for(launch, architecture)), launch, architecture))
"""


def test_an_atomic_operation_breaks_a_rule(tmp_path):
    (tmp_path / "adding.py").write_text(ATOMIC)
    done = compiling([sys.executable, str(tmp_path / "adding.py")], PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == 2 * ["['1 atomic operations: other bits every time']"], done.stderr


def read_in_loops(text):
    """The lines of a kernel's code (ttgir) that read dropout's seed, a number of 64 bits, in a loop."""
    loops, found = [], []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            loops.append(indent)
        elif loops and line.lstrip().startswith("}") and indent == loops[-1]:
            loops.pop()
        elif loops and "tt.ptr<i64>" in line and ("tt.load" in line or "async_copy" in line):
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("architecture", "kernel", "shape"),
    [
        ("sm90", "hidden_forward_kernel", "1024,512,1024"),
        ("sm90", "hidden_backward_kernel", "16384,1024,4096"),
        ("sm90", "narrow_ffn_kernel", "1024,64,128"),
        ("sm100", "attention_keys_kernel", None),
    ],
)
def test_dropouts_seed_is_read_before_the_loop(architecture, kernel, shape):
    """In it Triton would copy it in every turn, or wait for it in each slice of a tile. ``linear_residual`` does wait,
    and ``hidden_backward`` where a program has one tile: by one read ptxas works on all slices at once, and spills."""
    shapes = ["--shape", shape] if shape else []
    done = compiling([*INSPECT, "--arch", architecture, "--kernel", kernel, "--source", "ttgir", *shapes])
    assert done.returncode == cli.FINISHED, done.stderr
    heads = {text: text.partition("\n")[0] for text in done.stdout.split("\n// ")}
    dropping = [text for text, head in heads.items() if "DROP=True" in head]
    if kernel == "hidden_backward_kernel":
        dropping = [text for text in dropping if "PERSISTENT=True" in heads[text]]
    assert dropping and all("tt.load %" in text and "scf.for" in text for text in dropping)
    for text in dropping:
        assert read_in_loops(text) == []


def test_a_configuration_that_breaks_a_rule_fails_the_command(tmp_path):
    """Tiles of a device's table that spill, or that no block has the memory for."""
    tile = {"BM": 256, "BN": 256, "BK": 128, "num_warps": 8, "num_stages": 4}
    entry = {"product": "weight", "operand": "16-bit", "M": 1024, "N": 4096, "K": 16384, "tile": tile}
    table = {"architecture": "sm90", "device": "a large one", "processors": 132, "entries": [entry]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    command = [*INSPECT, "--kernel", "product_parts_*"]
    done = compiling(command, MACARON_OPS_TILES=str(tmp_path / "table.json"))
    assert done.returncode == cli.FAILED, done.stdout + done.stderr
    assert "product_parts_kernel" in done.stdout and "256 x 256 x 128" in done.stdout
    assert "524288 bytes of shared memory, a block has 232448" in done.stdout
    assert "of stack a thread: registers are spilled" in done.stdout


def test_the_code_of_a_kernel():
    for kind, words in {"ttgir": "ttg.blocked", "ptx": ".target sm_90a", "sass": "HGMMA"}.items():
        done = compiling([*INSPECT, "--kernel", "product_parts_*", "--shape", "1024,512,1024", "--source", kind])
        assert done.returncode == cli.FINISHED and words in done.stdout, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm70"], "--arch 'sm70': expected one of sm80"),
        (["--kernel", "nothing"], "--kernel 'nothing': no kernel"),
        (["--dtype", "int8"], "--dtype 'int8': expected one of bfloat16"),
        (["--arch", "gfx942", "--source", "ptx"], "--source 'ptx': expected one of ttgir, amdgcn"),
    ],
)
def test_what_cannot_be_inspected(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["inspect-kernels", *arguments]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_an_interpreted_kernel_has_no_machine_code(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["inspect-kernels"]) == cli.USAGE
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


USES = """
from macaron_ops.bench.kernel_calls import Wanted
from macaron_ops.bench.kernel_report import launches
from macaron_ops.kernels.offline import cache_key

found = launches("sm90", Wanted(dtypes=("bfloat16",), every=True))
for operator, launch, _ in found:
    name, c = launch.kernel.__name__, launch.constants
    affine = launch.arguments[1 if name == "norm_forward" else 2] is not None
    print("norm", name, c.get("NORM"), c.get("AFTER"), affine)
    print("activation", name, c.get("ACTIVATION"), c.get("GATED"), c.get("DROP"), c.get("SLICES"))
    print("direction", name, c.get("DIRECTION"), c.get("STEP"))
assert len({cache_key(launch, "sm90") for _, launch, _ in found}) == len(found)
"""


def test_every_use_is_compiled_once():
    """All norms, with and without a weight, before and after the products, in every kernel that knows them."""
    done = compiling([sys.executable, "-c", USES])
    assert done.returncode == 0, done.stderr
    said = set(done.stdout.splitlines())
    for name in ("norm_forward", "norm_backward"):
        affine = {f"norm {name} {norm} None {has}" for norm in ("layer", "rms", "sphere") for has in (True, False)}
        assert affine <= said, name
    assert "norm norm_backward none None False" in said
    for norm in ("layer", "rms", "sphere"):
        for name in ("linear_residual_kernel", "residual_of_parts_kernel"):
            assert any(line.startswith(f"norm {name} {norm} None") for line in said)
        for before, after in ((norm, "none"), ("none", norm)):
            assert any(line.startswith(f"norm narrow_ffn_kernel {before} {after}") for line in said)
    for activation in ("relu False", "gelu False", "gelu_tanh False", "silu False", "silu True", "gelu True"):
        for name in ("hidden_forward_kernel", "hidden_backward_kernel", "narrow_ffn_kernel"):
            for drop in (False, True):
                wanted = f"activation {name} {activation} {drop and (name, activation) != RELU} "
                assert any(line.startswith(wanted) for line in said), wanted
    for direction in ("tangent", "difference", "ambient"):
        for name in ("step_forward", "step_backward", "step_forward_wide", "step_backward_wide"):
            steps = {line.rsplit(" ", 1)[1] for line in said if line.startswith(f"direction {name} {direction} ")}
            assert len(steps) == 3, (name, direction)


RELU = ("hidden_backward_kernel", "relu False")  # it reads h, which is 0 where dropped


KEYS = """
import collections
import itertools
import torch
from macaron_ops.bench.kernel_calls import ffn_arguments, launches_of_ffn
from macaron_ops.kernels.offline import cache_key

TOKENS = (1, 2, 7, 16, 100, 128, 1000, 1024, 4096, 5000, 16384, 16385)
for width, p in itertools.product((1024, 250, 128), (0.0, 0.1)):
    keys, uses = collections.defaultdict(set), collections.defaultdict(set)
    for tokens, stream in itertools.product(TOKENS, (0,) if p else (0, 4)):
        x, tensors, options = ffn_arguments(tokens, width, 4 * width, torch.bfloat16, dropout=p)
        forward, backward = launches_of_ffn(x, tensors, options._replace(stream=stream))
        for launch in forward + backward:
            kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else a is None for a in launch.arguments)
            if launch.kernel.__name__ == "sums_kernel":  # whose widths are those of what is summed together
                kinds += tuple(width % 16 == 0 for width in launch.arguments[4::5])
            uses[launch.kernel.__name__].add((kinds, str(launch.constants)))
            keys[launch.kernel.__name__].add(cache_key(launch, "sm90"))
    for name in keys:
        print(name, len(keys[name]), len(uses[name]))
"""


def test_one_compiled_kernel_serves_every_number_of_tokens():
    """By Triton's own cache keys: as many as there are tiles and uses of a kernel, and no more for any token count or
    substep of a layer. Where the tokens are the sum's length, their divisibility by 16 is told apart, and 1."""
    done = compiling([sys.executable, "-c", KEYS])
    assert done.returncode == 0, done.stderr
    counts = [(name, int(keys), int(uses)) for name, keys, uses in map(str.split, done.stdout.splitlines())]
    assert len(counts) >= 6 * 6
    for name, keys, uses in counts:
        assert keys <= 3 * uses if name == "product_parts_kernel" else keys == uses, done.stdout
