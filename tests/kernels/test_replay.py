"""Claim: a replay allocates and launches what the function itself does, on the tensors of its own call, and computes
the same; what cannot be replayed is called."""

import gc
import json
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import macaron_ops
from macaron_ops.ops import run
from macaron_ops.reference.ffn_step import Options, Tensors
from tests.ops.cases import CASES, build

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
SMALL = [case for case in CASES if repr(case) in ("ffn_step-swiglu", "ffn_step-post", "normalize_step-per-channel")]


def arguments(width=256, tokens=33, dtype=torch.bfloat16, x=None, **options):
    """``(x, tensors, options)`` on the CPU, which recorded launches never read."""
    f = 3 * width
    options = {"norm": "layer", "eps": 1e-5, "activation": "gelu", "step": 0.5, "residual_scale": 1.0, **options}
    options = {"placement": "pre", "dropout": 0.0, "activation_dropout": 0.0, "stream": 0, **options}
    shapes = (f, width), (f,), (width, f), (width,), (width,), (width,)
    x = torch.empty(tokens, width, dtype=dtype) if x is None else x
    return x, Tensors(*(torch.empty(s, dtype=dtype) for s in shapes), torch.tensor(1)), Options(**options)


def flat(x, tensors, options, save):
    return x, *tensors, *options, save


def described(launches, inputs):
    """Launches by what they start and, for every tensor, which input it is, or how its buffer was used before."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    buffers, found = [], []
    for launch in launches:
        row = [launch.kernel.__name__, launch.programs, launch.constants]
        for a in launch.arguments:
            if isinstance(a, TensorDescriptor):
                row.append({**vars(a), "base": None})
                a = a.base
            if not isinstance(a, torch.Tensor):
                row.append(a)
                continue
            of_input = [i for i, t in enumerate(inputs) if t.data_ptr() == a.data_ptr() and t.numel()]
            if not of_input:
                known = [i for i, b in enumerate(buffers) if b.data_ptr() == a.data_ptr()]
                buffers += [] if known else [a]
                of_input = [100 + (known or [len(buffers) - 1])[0]]
            row.append((of_input[0], a.dtype, a.untyped_storage().nbytes() if of_input[0] >= 100 else None))
        found.append(row)
    return found


OPTIONS = [
    {},
    {"width": 64},
    {"width": 64, "placement": "post", "dropout": 0.1, "activation_dropout": 0.2},
    {"placement": "post", "norm": "rms", "dropout": 0.1},
    {"dtype": torch.float32, "norm": None},
    {"norm": None, "x": torch.empty(2, 33, 512, dtype=torch.bfloat16)[..., :256]},
    {"x": torch.empty(256, 33, dtype=torch.bfloat16).T},  # copied, so not replayed
]


@pytest.mark.parametrize("save", ["none", "lean", "fast"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o)) or "default")
def test_the_launches_are_the_same(options, save):
    from macaron_ops.kernels.device import recording
    from macaron_ops.kernels.replay import Recorded
    from macaron_ops.ops.registry import _PYTHON

    function = _PYTHON["triton", "ffn_step"]
    again = Recorded(function)
    with torch.no_grad(), recording("sm90", 132) as launches:
        for _ in range(3):
            x, tensors, o = arguments(**options)
            call, inputs = flat(x, tensors, o, save), [x, *tensors]
            launches.clear()
            expected = function(*call)
            wanted = described(launches, inputs)
            launches.clear()
            actual = again(*call)
            assert described(launches, inputs) == wanted
            for a, e in zip(actual, expected, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
                assert all(a.data_ptr() != t.data_ptr() for t in inputs if a.numel())
        (replay,) = again._replays.values()
        assert (replay is function) == (options is OPTIONS[-1])


@pytest.fixture
def precision():
    """``precision("tf32")``: how float32 matrices are multiplied, for this test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


def test_a_device_and_a_precision_have_replays_of_their_own(precision):
    from macaron_ops.kernels.device import recording
    from macaron_ops.kernels.replay import Recorded
    from macaron_ops.ops.registry import _PYTHON

    again = Recorded(_PYTHON["triton", "ffn_step"])
    call = flat(*arguments(dtype=torch.float32), "none")
    seen = []
    for target in (("sm90", 132), ("sm80", 108), ("sm90", 4), ("sm90", 132)):
        for value in ("ieee", "tf32"):
            precision(value)
            with torch.no_grad(), recording(*target) as launches:
                again(*call)
            seen.append((launches[1].programs, launches[1].constants["PRECISION"], launches[1].constants["BM"]))
    assert len(again._replays) == 6 and seen[-2:] == seen[:2]
    assert [value for _, value, _ in seen] == 4 * ["ieee", "tf32"]


def gradients(seed, device, wanted, grad=None):
    """Of both sublayers' steps, whose backward passes are replayed too; ``grad`` makes dy of x and y."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    x, weight, bias = draw(3, 7, 24), draw(24), draw(24)
    ffn = [draw(40, 24), draw(40), draw(24, 40), draw(24)]
    attention = [draw(72, 24), draw(72), draw(24, 24), draw(24)]
    found = []
    for operator, tensors, others in ((macaron_ops.ffn_step, ffn, ()), (macaron_ops.attend_step, attention, (3,))):
        y = operator(x, *tensors, *others, norm_weight=weight, norm_bias=bias)
        dy = draw(3, 7, 24).detach() if grad is None else grad(x, y)
        inputs = [t for t, name in zip((x, *tensors, weight), "xibobw", strict=True) if name in wanted]
        found += torch.autograd.grad(y, inputs, dy)
    return found


@pytest.mark.parametrize("wanted", ["xibow", "x", "iw"])
def test_backward_is_replayed(wanted, device):
    """With the numbers of its own call, for every set of gradients that is needed."""
    run.forget()
    with macaron_ops.use_backend("triton"):
        again = [gradients(seed, device, wanted) for seed in (1, 2, 3)]
        plans = [b for kept in run._remembered.values() for b in kept.plan.backwards]
        replays = [r for b in plans for plan in b._plans.values() for r in plan._replays.values()]
        assert len(replays) == 2 and all(replay.__name__ == "replay" for replay in replays)
        for seed, found in zip((1, 2, 3), again, strict=True):
            run.forget()
            for actual, expected in zip(found, gradients(seed, device, wanted), strict=True):
                assert torch.equal(actual, expected)


def test_what_hooks_unpack_is_looked_at(device):
    """The same numbers in other strides, and a gradient whose negation is yet to be made."""
    x, w = torch.randn(3, 8, 24, device=device, requires_grad=True), torch.randn(40, 24, device=device) / 5
    back, dy = torch.randn(24, 40, device=device) / 6, torch.randn(3, 8, 24, device=device)

    def turned(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t

    def gradient(dy, unpack=lambda t: t):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = macaron_ops.ffn_step(x, w, None, back, None)
        return torch.autograd.grad(y, x, dy)[0]

    run.forget()
    with macaron_ops.use_backend("triton"):
        expected = [gradient(dy) for _ in range(3)][-1]
        torch.testing.assert_close(gradient(dy, turned), expected)
        torch.testing.assert_close(gradient(torch._neg_view(dy)), -expected)


def test_a_gradient_that_is_the_input_itself_is_planned_apart(device):
    """A plan tells tensors apart by what they were in the first call: there dy and x were one."""
    run.forget()
    layouts = [lambda x, y: x.detach(), lambda x, y: y.detach(), lambda x, y: y.detach().sum().expand(y.shape)]
    with macaron_ops.use_backend("triton"):
        again = [gradients(1, device, "xibow", layout) for _ in range(3) for layout in layouts]
        for layout, *found in zip(layouts, *(again[i : i + 3] for i in (0, 3, 6)), strict=True):
            run.forget()
            expected = gradients(1, device, "xibow", layout)
            assert all(torch.equal(a, e) for each in found for a, e in zip(each, expected, strict=True))


def test_pytorchs_attention_is_called_again(device):
    """Its results as views of other shapes, its arguments as columns of a matrix; a plan is of the core that ran."""
    from macaron_ops.kernels.attention_core import use_core

    dtype = torch.bfloat16

    def call(seed, core):
        generator = torch.Generator().manual_seed(seed)
        x, w, b, out = (
            torch.randn(s, generator=generator).to(device, dtype) for s in ((2, 9, 16), (48, 16), 48, (16, 16))
        )
        leaves = [t.requires_grad_() for t in (x, w, b, out)]
        with use_core(core):
            y = macaron_ops.attend_step(*leaves, None, 2, causal=True, save="lean")
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    turns = list(enumerate(("triton", "triton", "triton", "flash", "flash", "triton")))
    run.forget()
    with macaron_ops.use_backend("triton"):
        again = [call(*turn) for turn in turns]
        (kept,) = run._remembered.values()
        replays = [r for b in kept.plan.backwards for plan in b._plans.values() for r in plan._replays.values()]
        assert len(replays) == 2 and all(replay.__name__ == "replay" for replay in replays)
        for turn, found in zip(turns[3:], again[3:], strict=True):
            run.forget()
            for actual, expected in zip(found, call(*turn), strict=True):
                assert torch.equal(actual, expected)


def test_results_of_a_call_as_they_were_seen():
    """A part of its results is returned, in another shape, and goes into a second call; what is not returned dies."""
    from macaron_ops.kernels.replay import Recorded

    attention, planned = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0

    def function(x):
        nonlocal planned
        planned += 1
        q, k, v = (part.view(2, 9, 2, 8).transpose(1, 2) for part in x.split(16, 1))
        o, _ = attention(q, k, v, 0.0, True)
        twice, _ = attention(o, k, v)
        return [p.transpose(1, 2).flatten(2).flatten(0, 1) for p in (o, twice)]

    again = Recorded(function)
    for _ in range(3):
        x = torch.randn(18, 48)
        for actual, expected in zip(again(x), function(x), strict=True):
            assert actual.shape == (18, 16) and torch.equal(actual, expected)
    assert planned == 4


@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_numbers(case, device):
    """Three calls with other numbers, the later two replayed."""

    def results(seed):
        args, kwargs = build(case, torch.float32, device, seed)
        args[0].requires_grad_()
        y = case.operator(*args, **kwargs)
        return y, torch.autograd.grad(y.sum(), args[0])[0]

    run.forget()
    with macaron_ops.use_backend("triton"):
        again = [results(seed) for seed in (1, 2, 3)]
        for seed, result in zip((1, 2, 3), again, strict=True):
            run.forget()
            for actual, expected in zip(result, results(seed), strict=True):
                assert torch.equal(actual, expected)


def test_what_lies_otherwise_in_memory_is_told_apart(device):
    """A replay holds strides, and reads numbers where a tensor has them, not as torch would."""
    x, u = torch.randn(3, 4, 6, device=device), torch.randn(3, 4, 6, device=device)
    wide, step = torch.randn(3, 4, 12, device=device), torch.randn(12, device=device)
    negated, zero = torch._neg_view(x.clone()), torch._efficientzerotensor(3, 4, 6, device=device)
    xs = [
        x,
        negated,
        zero,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., ::2],
        wide[..., 1:7],
        x[:1].expand(3, 4, 6),
    ]
    calls = [(a, b, c) for a in xs for b in (u, wide[..., 6:]) for c in (step[:6], step[::2])]
    with macaron_ops.use_backend("triton"):
        expected = []
        for call in calls:
            run.forget()
            expected.append(macaron_ops.normalize_step(*call))
        for _ in range(3):
            for call, y in zip(calls, expected, strict=True):
                assert torch.equal(macaron_ops.normalize_step(*call), y)


def test_temporaries_die_within_a_replay():
    from macaron_ops.kernels import device
    from macaron_ops.kernels.replay import Recorded
    from macaron_ops.ops.registry import _PYTHON

    again = Recorded(_PYTHON["triton", "ffn_step"])
    born = []

    class Launches(list):
        def append(self, launch):  # weakly: what a launch reads or writes, and what is alive when the last one starts
            born.extend(weakref.ref(a) for a in launch.arguments if isinstance(a, torch.Tensor))
            alive.append(len({id(ref()) for ref in born if ref() is not None}))

    alive = []
    with torch.no_grad():
        call = flat(*arguments(norm="layer"), "none")
        with device.recording("sm90", 132):
            again(*call)
            again(*call)
        token = device._recording.set(device._Recording(device.Target("sm90", 132), Launches()))
        y = again(*call)[0]
        device._recording.reset(token)
    gc.collect()
    inputs = sum(ref() is not None and ref() is not y for ref in {id(r()): r for r in born if r() is not None}.values())
    assert alive[-1] == inputs + 2  # h and y, while N(x) is gone


def test_buffers_are_born_when_they_are_first_used():
    """What the last launch writes is not there when the first one starts."""
    from macaron_ops.kernels import device, replay

    class Allocated(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.count += operator in replay._ALLOCATIONS
            return operator(*args, **(kwargs or {}))

    def function(x):
        n, h, y = torch.empty(64), torch.empty(64), torch.empty(64)
        for name, *used in (("first", x, n), ("second", n, h), ("third", h, y)):
            device.launch(name, 1, x.device, *used)
        return y

    class Started(list):
        def append(self, launch):
            found.append(allocated.count)

    again, x, found = replay.Recorded(function), torch.empty(64), []
    with device.recording("sm90", 132):
        again(x)
    token = device._recording.set(device._Recording(device.Target("sm90", 132), Started()))
    with Allocated() as allocated:
        again(x)
    device._recording.reset(token)
    assert found == [1, 2, 3]


def test_a_recording_leaves_no_buffer_behind(monkeypatch):
    """The garbage collector does not know how much memory a GPU has left, so it must have nothing to do."""
    from macaron_ops.kernels import device, replay
    from macaron_ops.ops.registry import _PYTHON

    born, made = [], replay._Allocations.__torch_dispatch__

    def noted(*call):
        try:
            result = made(*call)
            if isinstance(result, torch.Tensor) and result.numel():
                born.append(weakref.ref(result))
            return result
        finally:
            del result, call

    monkeypatch.setattr(replay._Allocations, "__torch_dispatch__", noted)
    gc.disable()
    try:
        call = flat(*arguments(), "fast")
        given = [weakref.ref(a) for a in call if isinstance(a, torch.Tensor)]
        with torch.no_grad(), device.recording("sm90", 132):
            plan = replay._record(_PYTHON["triton", "ffn_step"], *call)
        del call
        assert plan and len(born) > 3 and not any(ref() is not None for ref in (*born, *given))
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_a_recording_takes_no_memory(name):
    """Of its buffers, all of which live until it ends: only what PyTorch's attention reads and makes, while it runs."""
    from macaron_ops.bench import memory
    from macaron_ops.kernels import attention_core, device, replay
    from macaron_ops.ops.registry import _PYTHON
    from tests.kernels.tools import attend_arguments

    x, tensors, options = attend_arguments(128, 256, 4, mask=None)
    x, tensors = (
        torch.zeros_like(x, device="cpu"),
        type(tensors)(*(t if t is None else torch.zeros_like(t, device="cpu") for t in tensors)),
    )
    function = _PYTHON["triton", "attend_step"]
    with torch.no_grad(), device.recording("sm90", 132), attention_core.use_core(name):
        replay._record(function, x, *tensors, *options, "fast")
        levels = memory._levels(lambda: replay._record(function, x, *tensors, *options, "fast"), x.device)
    matrices = levels.peak / (x.numel() * x.itemsize)
    assert matrices < {"triton": 3.1, "flash": 5.1}[name]  # q, k and v while a view of them is made; o and what made it


def test_descriptors_are_made_of_the_call_s_own_tensors():
    """Of an argument, and of a buffer that a launch before has filled."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from macaron_ops.kernels import device
    from macaron_ops.kernels.replay import Recorded

    planned = 0

    def function(x, y):
        nonlocal planned
        planned += 1
        n, out = torch.empty(4, 8), torch.empty(32)
        device.launch("first", 3, x.device, TensorDescriptor.from_tensor(x, [4, 4]), n, 1.5, D=8)
        device.launch("second", 3, x.device, y, TensorDescriptor.from_tensor(n, [2, 8]), n, out)
        return out.view(4, 8)

    again = Recorded(function)
    for _ in range(3):
        x, y = torch.empty(4, 8), torch.empty(4)
        with device.recording("sm90", 132) as launches:
            out = again(x, y)
        (a, n, number), (b, c, m, o) = (launch.arguments for launch in launches)
        assert (a.base is x, a.block_shape, b is y, c.base is n, m is n, o is out) == (True, [4, 4], *[True] * 4)
        assert ([*c.shape], [*c.strides], c.block_shape, number) == ([4, 8], [8, 1], [2, 8], 1.5)
        assert launches[0].constants == {"D": 8} and out.shape == (4, 8)
        assert a == TensorDescriptor.from_tensor(x, [4, 4]) and c == TensorDescriptor.from_tensor(n, [2, 8])
    assert planned == 1


def test_what_computes_in_torch_is_called():
    from macaron_ops.kernels.replay import Recorded

    count = 0

    def function(x, *_):
        nonlocal count
        count += 1
        return (x + 1).contiguous()

    again = Recorded(function)
    for i in range(4):
        assert torch.equal(again(torch.full((2,), float(i))), torch.full((2,), i + 1.0))
    assert count == 5  # once to find out


@pytest.fixture(scope="module")
def started():
    """Rounds of starts by kernel, for an H100 that is not there, in a process where Triton compiles."""
    pytest.importorskip("triton.backends.nvidia")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Triton compiles its launcher against Python.h, which is not here")
    script = Path(__file__).with_name("start_offline.py")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    assert kernels == ["norm_forward", "hidden_forward_kernel", "linear_residual_kernel"]
    return {name: {row["round"]: row for row in rows if row["kernel"] == name} for name in kernels}


def test_a_kernel_is_started_as_triton_starts_it(started):
    """Grid, block, shared memory, stream and every byte of its parameters, tensor maps too; but bound by Triton only
    once, and by its launcher only the first time and where a profiler wants to be told."""
    for rounds in started.values():
        assert all(rounds[name]["ours"] == rounds[name]["tritons"] != "" for name in ("first", "again", "hooked"))
        assert rounds["first"]["ours"] != rounds["again"]["ours"]  # other pointers
        assert [rounds[name]["bound"] for name in ("first", "again", "hooked")] == [1, 0, 0]
        assert [rounds[name]["told"] for name in ("first", "again", "hooked")] == [0, 0, 1]
        assert all(rounds[name]["packed"] for name in ("first", "again", "hooked"))
        assert (rounds["recorded"]["recorded"], rounds["recorded"]["ours"]) == (1, "")


def test_what_the_driver_refuses_is_an_error(started):
    for rounds in started.values():
        assert rounds["refused"]["error"] == "CUDA's driver did not start a kernel: invalid argument (1)"


def test_a_thread_without_a_context_gets_one(started):
    """By Triton's launcher, the first time: both of its starts come through."""
    assert all(rounds["no context"]["lines"] == 2 for rounds in started.values())


def test_two_threads_start_one_launch(started):
    """Each with its own tensors: none reads the other's parameters."""
    for rounds in started.values():
        assert rounds["together"]["lines"] == 200 and rounds["together"]["ours"] == rounds["together"]["apart"]


@pytest.mark.gpu
def test_no_launch_is_left_to_tritons_launcher(device, monkeypatch):
    """On an NVIDIA device, from the fourth call of a kind on: two plan, the third is Triton's."""
    if torch.device(device).type != "cuda" or torch.version.hip:
        pytest.skip("needs an NVIDIA device")
    from macaron_ops.kernels import packed, start

    counts = {"starts": 0, "packed": 0}

    def counted(function, name):
        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(start.Start, "__call__", counted(start.Start.__call__, "starts"))
    monkeypatch.setattr(packed.Packed, "start", counted(packed.Packed.start, "packed"))
    run.forget()
    x, w, back = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((4096, 512), (1024, 512), (512, 1024)))
    x.requires_grad_()
    with macaron_ops.use_backend("triton"):
        for i in range(6):
            if i == 3:
                counts.update(starts=0, packed=0)
            y = macaron_ops.ffn_step(x, w, None, back, None)
            torch.autograd.grad(y, x, torch.ones_like(y))
    assert counts["starts"] == counts["packed"] > 9
