"""``python -m tests.native.one_instruction_set``: the cases of tests/ops/cases.py and larger calls on native kernels,
by the tolerance rule, with the instruction set that MACARON_OPS_CPU_ISA names. Prints its name, then what fails.

A process chooses its instruction set once, so that ``test_instruction_sets.py`` starts one for each.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch

import macaron_ops
from macaron_ops import native
from tests import twins
from tests.native.calls import DTYPES, Call, Drawn, check
from tests.ops.cases import CASES, Case, build
from tests.ops.test_numbers import run, upcast
from tests.rule import assert_draws_by_rule


def check_case(case: Case, dtypes: str) -> None:
    """A case in float32, bfloat16 or under autocast, with every ``save``."""
    x_dtype, *_ = DTYPES[dtypes]
    twin = getattr(twins, case.operator.__name__)
    policies = [{"save": "fast"}, {"save": "lean"}] if case.operator.__name__ in ("ffn_step", "attend_step") else [{}]

    def drawn(seed):
        """float64 numbers that both bfloat16 and float32 have."""
        args, kwargs = build(case, torch.bfloat16 if dtypes != "float32" else torch.float32, seed=seed)
        return upcast(args), {name: upcast(value) for name, value in kwargs.items()}

    def narrowed(seed):
        def narrow(value):
            if isinstance(value, tuple):
                return tuple(narrow(v) for v in value)
            return value.to(x_dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        args, kwargs = drawn(seed)
        return narrow(args), {name: narrow(value) for name, value in kwargs.items()}

    def draw(seed):
        args, kwargs = drawn(seed)
        grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
        exact = run(twin, args, kwargs, grad)
        with contextlib.ExitStack() as stack:
            if dtypes == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            eager = run(twin, *narrowed(seed), grad)
            stack.enter_context(macaron_ops.use_backend("native"))
            found = {}
            for policy in policies:
                args, kwargs = narrowed(seed)
                actual = run(case.operator, args, {**kwargs, **policy}, grad)
                for i, results in enumerate(zip(actual, eager, exact, strict=True)):
                    found[f"{policy.get('save', '')} output {i}"] = tuple(t.detach() for t in results)
        return found

    assert_draws_by_rule(draw)


def _ffn(rows: int, width: int, hidden: int, **options) -> Call:
    inner = 2 * hidden if options["activation"] in ("swiglu", "geglu") else hidden
    tensors = {"x": Drawn((rows, width), role="x"), "w_in": Drawn((inner, width), "fan"), "b_in": Drawn((inner,))}
    tensors |= {"w_out": Drawn((width, hidden), "fan"), "b_out": Drawn((width,))}
    return Call("ffn_step", tensors, options)


def _attend(batch: tuple, tokens: int, width: int, heads: int, keys: int | None = None, **options) -> Call:
    tensors = {"x": Drawn((*batch, tokens, width), role="x")}
    if keys is not None:
        tensors["context"] = Drawn((*batch, keys, width))
    tensors |= {"w_qkv": Drawn((3 * width, width), "fan"), "b_qkv": Drawn((3 * width,))}
    tensors |= {"w_out": Drawn((width, width), "fan"), "b_out": Drawn((width,))}
    return Call("attend_step", tensors, {"num_heads": heads, **options})


def _sphere(rows: int, width: int, **options) -> Call:
    return Call("sphere_attend_step", {"x": Drawn((rows, width), "unit", "x")}, {"step": 0.3, "beta": 2.0, **options})


# Scores so large that the rounding errors of their sums are most of the error of the weights.
_LARGE_SCORES = Call(
    "attend_step",
    {
        "x": Drawn((3, 16), role="x", trained=False, scale=10.0, shift=3.0),
        "w_q": Drawn((34, 16), "fan", trained=False),
        "b_q": Drawn((34,), trained=False),
        "w_k": Drawn((34, 33), "fan", trained=False),
        "w_v": Drawn((34, 33), "fan", trained=False),
        "w_out": Drawn((16, 34), "fan", trained=False),
        "context": Drawn((11, 33)),
        "attn_mask": Drawn((2, 3, 11), "blocked", "x", trained=False),
        "key_padding_mask": Drawn((11,), "bias", "x", trained=False),
    },
    {"norm": None, "num_heads": 2, "causal": True, "dropout": 0.9, "seed": -1},
)

# Past a segment of a sum (240), a group of tokens in the backward pass (512), panels (32, 64), a block of keys (128).
LARGER = [
    _ffn(526, 65, 250, activation="gelu", norm="rms"),
    _ffn(35, 300, 490, activation="swiglu", placement="post"),
    _attend((9,), 65, 96, 2, causal=True),
    _attend((), 301, 40, 2, placement="post"),
    _attend((), 300, 48, 4, cu_seqlens=(0, 1, 65, 300, 300), norm=None),
    _attend((2,), 33, 260, 2, keys=129),
    _LARGE_SCORES,
    _sphere(300, 3, causal=True),
    _sphere(150, 100, weighting="unnormalized"),
]


def check_larger(call: Call, dtypes: str) -> None:
    for save in ("fast", "lean"):
        check(replace(call, dtypes=dtypes, save=save))


def report(name: str, function: Callable, *args) -> None:
    try:
        function(*args)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(native.cpu_isa(), flush=True)
    there = macaron_ops.backends()["native"].operators
    for dtypes in ("float32", "bfloat16", "autocast"):
        for case in (c for c in CASES if c.operator.__name__ in there):
            report(f"{case}, {dtypes}", check_case, case, dtypes)
        for call in (c for c in LARGER if c.operator in there):
            report(f"{call}, {dtypes}", check_larger, call, dtypes)
