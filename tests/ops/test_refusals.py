"""Claim: bad arguments are refused before anything runs, by a ValueError or TypeError that names the argument, what was
expected and what came."""

import math

import pytest
import torch

from macaron_ops import attend_step, ffn_step, normalize_step, sphere_attend_step

D, HIDDEN, T, HEADS = 6, 10, 4, 2
X = torch.randn(2, T, D)
FFN = dict(
    x=X, w_in=torch.randn(HIDDEN, D), b_in=torch.randn(HIDDEN), w_out=torch.randn(D, HIDDEN), b_out=torch.randn(D)
)
ATTEND = dict(
    x=X,
    w_qkv=torch.randn(3 * D, D),
    b_qkv=torch.randn(3 * D),
    w_out=torch.randn(D, D),
    b_out=torch.randn(D),
    num_heads=HEADS,
)
SEPARATE = dict(w_qkv=tuple(torch.randn(D, D) for _ in range(3)), b_qkv=None)
ROTARY = (torch.randn(T, 1), torch.randn(T, 1))


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """A refusal comes before anything runs."""
    from macaron_ops.ops import run

    def ran(*_):
        raise AssertionError("the operator ran")

    monkeypatch.setattr(run, "_forward", ran)
    monkeypatch.setattr(run._Substeps, "apply", ran)


FFN_CASES = [
    (dict(x=[1.0]), TypeError, r"x: expected a tensor; got \[1.0\] \(list\)"),
    (dict(x=X.long()), TypeError, "x: expected float64, float32, bfloat16 or float16; got torch.int64"),
    (dict(x=torch.tensor(1.0)), ValueError, r"x: expected shape \(..., D\); got \(\)"),
    (dict(x=torch.zeros(3, 0)), ValueError, r"x: expected at least one channel; got shape \(3, 0\)"),
    (dict(x=torch.nested.nested_tensor([X[0]])), TypeError, "x: expected a dense strided tensor"),
    (dict(x=X.to_sparse()), TypeError, "x: expected a dense strided tensor; got layout torch.sparse_coo"),
    (dict(w_in=None), TypeError, "w_in: expected a tensor; got None"),
    (dict(w_in=torch.randn(HIDDEN, 7)), ValueError, r"w_in: expected shape \(10, 6\); got \(10, 7\)"),
    (dict(w_in=torch.randn(9, D)), ValueError, r"w_in: expected shape \(10, 6\); got \(9, 6\)"),
    (dict(w_in=FFN["w_in"].double()), TypeError, "w_in: expected the dtype of x, torch.float32; got torch.float64"),
    (dict(w_in=FFN["w_in"].to("meta")), ValueError, "w_in: expected a tensor on the device of x, cpu; got meta"),
    (dict(w_in=torch.randn(15, D), activation="swiglu"), ValueError, r"w_in: expected \(2F, D\) = \(20, 6\)"),
    (dict(b_in=torch.randn(HIDDEN, 1)), ValueError, r"b_in: expected shape \(10,\); got \(10, 1\)"),
    (dict(w_out=torch.randn(7, HIDDEN)), ValueError, r"w_out: expected shape \(6, F\); got \(7, 10\)"),
    (dict(b_out=torch.randn(5)), ValueError, r"b_out: expected shape \(6,\); got \(5,\)"),
    (dict(b_out=0.0), TypeError, r"b_out: expected a tensor or None; got 0.0 \(float\)"),
    (dict(norm="batch"), ValueError, "norm: expected one of 'layer', 'rms', 'sphere', None; got 'batch'"),
    (
        dict(norm=None, norm_weight=torch.ones(D)),
        ValueError,
        "norm_weight, norm_bias: expected None where norm is None",
    ),
    (dict(norm_weight=torch.ones(5)), ValueError, r"norm_weight: expected shape \(6,\); got \(5,\)"),
    (dict(eps=-1.0), ValueError, "eps: expected a finite number of at least 0.0; got -1.0"),
    (dict(activation="tanh"), ValueError, "activation: expected one of 'relu', 'gelu', .*; got 'tanh'"),
    (dict(activation=["relu"]), ValueError, r"activation: expected one of .*; got \['relu'\]"),
    (dict(activation=torch.nn.ReLU), TypeError, "activation: expected a name or a function; got the class ReLU"),
    (dict(w_in=FFN["w_in"].to_sparse()), TypeError, "w_in: expected a dense strided tensor; got layout torch.sparse"),
    (dict(step=math.nan), ValueError, "step: expected a finite number; got nan"),
    (dict(step="half"), TypeError, r"step: expected a number; got 'half' \(str\)"),
    (dict(residual_scale=math.inf), ValueError, "residual_scale: expected a finite number; got inf"),
    (dict(placement="both"), ValueError, "placement: expected one of 'pre', 'post'; got 'both'"),
    (dict(dropout=1.5), ValueError, "dropout: expected a probability between 0 and 1; got 1.5"),
    (dict(activation_dropout=-0.1), ValueError, "activation_dropout: expected a probability"),
    (dict(seed=True), TypeError, "seed: expected an int, an int64 tensor"),
    (
        dict(dropout=0.1, seed=2**63),
        ValueError,
        "seed: expected an integer of 64 bits, signed; got 9223372036854775808",
    ),
    (dict(seed=0.5), TypeError, "seed: expected an int, an int64 tensor"),
    (dict(dropout=0.1, seed=torch.zeros(2)), ValueError, r"seed: expected an int64 tensor of shape \(\)"),
    (dict(save="all"), ValueError, "save: expected one of 'fast', 'lean'; got 'all'"),
]
ATTEND_CASES = [
    (dict(x=torch.randn(D)), ValueError, r"x: expected shape \(..., T, D\); got \(6,\)"),
    (dict(num_heads=4), ValueError, "num_heads: expected a divisor of w_out's 6 columns; got 4"),
    (dict(num_heads=0), ValueError, "num_heads: expected an integer of at least 1; got 0"),
    (dict(num_heads=2.0), TypeError, r"num_heads: expected an integer; got 2.0 \(float\)"),
    (dict(num_heads=6, num_kv_heads=4), ValueError, "num_kv_heads: expected a divisor of num_heads = 6; got 4"),
    (dict(w_qkv=torch.randn(17, D)), ValueError, r"w_qkv: expected shape \(18, 6\); got \(17, 6\)"),
    (dict(num_kv_heads=1), ValueError, r"w_qkv: expected shape \(12, 6\); got \(18, 6\)"),
    (dict(b_qkv=(None,) * 3), TypeError, "b_qkv: expected a tensor or None where w_qkv is one tensor; got a tuple"),
    (dict(w_qkv=SEPARATE["w_qkv"][:2]), ValueError, "w_qkv: expected three entries"),
    (SEPARATE | dict(b_qkv=torch.randn(18)), ValueError, "b_qkv: expected three entries, for q, k and v; got Tensor"),
    (
        dict(w_qkv=(*SEPARATE["w_qkv"][:2], torch.randn(D, 5)), b_qkv=None),
        ValueError,
        r"w_qkv\[2\]: expected shape \(6, 6\); got \(6, 5\)",
    ),
    (dict(context=torch.randn(3, 5, D)), ValueError, r"context: expected shape \(2, 'S', 'Dc'\); got \(3, 5, 6\)"),
    (dict(context=torch.randn(2, 5, 7)), ValueError, r"w_qkv: expected a tuple \(w_q, w_k, w_v\) where context has"),
    (dict(causal=1), TypeError, "causal: expected a bool; got 1"),
    (dict(attn_mask=torch.zeros(3, T)), ValueError, r"attn_mask: expected shape \(4, 4\), \(4, 4, 4\) or one that"),
    (dict(attn_mask=torch.zeros(T, T).long()), TypeError, "attn_mask: expected dtype bool or torch.float32"),
    (dict(attn_mask=[[0]]), TypeError, "attn_mask: expected a tensor or None; got list"),
    (dict(key_padding_mask=torch.zeros(2, 5)), ValueError, r"key_padding_mask: expected shape \(2, 4\); got \(2, 5\)"),
    (dict(cu_seqlens=torch.tensor([0, 4])), TypeError, "cu_seqlens: expected an int32 tensor of shape"),
    (dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)), ValueError, r"cu_seqlens: expected x of shape \(T, D\)"),
    (
        dict(x=X[0], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), context=X[0]),
        ValueError,
        "cu_seqlens: expected None with a context",
    ),
    *(
        (
            dict(x=X[0], cu_seqlens=torch.tensor(borders, dtype=torch.int32)),
            ValueError,
            "cu_seqlens: expected borders that rise from 0 to T = 4; got",
        )
        for borders in ([0, 2], [0, 7], [0, 3, 1, 4], [1, 4], [])
    ),
    (dict(scale=math.nan), ValueError, "scale: expected a finite number; got nan"),
    (dict(rotary=ROTARY[0]), TypeError, r"rotary: expected \(cos, sin\); got Tensor"),
    (dict(rotary=(torch.randn(3, 1),) * 2), ValueError, r"rotary\[0\]: expected shape \(4, R / 2\); got \(3, 1\)"),
    (dict(rotary=(torch.randn(T, 2),) * 2), ValueError, "rotary: expected at most head_dim / 2 = 1 columns; got 2"),
    (dict(rotary=ROTARY, context=X), ValueError, "rotary: expected None with a context"),
    (dict(rotary=(ROTARY[0].clone().requires_grad_(), ROTARY[1])), ValueError, "rotary: expected constants"),
    (dict(qk_scale=torch.ones(2)), ValueError, r"qk_scale: expected shape \(3,\); got \(2,\)"),
    (dict(qk_scale=torch.ones(3, 3)), ValueError, r"qk_scale: expected shape \(2, 3\); got \(3, 3\)"),
    (dict(attention_dropout=2), ValueError, "attention_dropout: expected a probability between 0 and 1; got 2.0"),
]
NORMALIZE = dict(x=X, u=X, step=0.1)
NORMALIZE_CASES = [
    (dict(u=X[0]), ValueError, r"u: expected shape \(2, 4, 6\); got \(4, 6\)"),
    (dict(step=math.nan), ValueError, "step: expected a finite number; got nan"),
    (dict(step=torch.ones(5)), ValueError, r"step: expected a number or a tensor of shape \(\) or \(6,\); got \(5,\)"),
    (dict(direction="radial"), ValueError, "direction: expected one of 'tangent', 'difference', 'ambient'"),
]
SPHERE = dict(x=X, step=0.1, beta=1.0)
SPHERE_CASES = [
    (dict(beta=math.inf), ValueError, "beta: expected a finite number; got inf"),
    (dict(beta=torch.ones(6)), ValueError, r"beta: expected a number or a tensor of shape \(\); got \(6,\)"),
    (dict(query=torch.randn(2, 3, D)), ValueError, r"query: expected shape \(2, 4, E\); got \(2, 3, 6\)"),
    (dict(query=torch.randn(2, T, 5)), ValueError, "query: expected 6 channels, as x, where key is None; got 5"),
    (dict(key=torch.randn(2, 7, D)), ValueError, "key: expected 4 rows, as x, where value is None; got 7"),
    (dict(key=torch.randn(2, 7, 5)), ValueError, r"key: expected shape \(2, m, 6\); got \(2, 7, 5\)"),
    (dict(key=torch.zeros(2, 0, D), value=torch.zeros(2, 0, D)), ValueError, "key: expected at least one row; got 0"),
    (dict(value=torch.randn(2, T, 5)), ValueError, r"value: expected shape \(2, 4, 6\); got \(2, 4, 5\)"),
    (dict(weighting="sigmoid"), ValueError, "weighting: expected one of 'softmax', 'unnormalized'; got 'sigmoid'"),
    (dict(causal="yes"), TypeError, "causal: expected a bool; got 'yes'"),
]
TABLE = [
    (operator, good | change, error, message)
    for operator, good, cases in (
        (ffn_step, FFN, FFN_CASES),
        (attend_step, ATTEND, ATTEND_CASES),
        (normalize_step, NORMALIZE, NORMALIZE_CASES),
        (sphere_attend_step, SPHERE, SPHERE_CASES),
    )
    for change, error, message in cases
]


@pytest.mark.parametrize("operator, arguments, error, message", TABLE, ids=[row[3][:40] for row in TABLE])
def test_refusal(operator, arguments, error, message):
    with pytest.raises(error, match=message):
        operator(**arguments)


@pytest.mark.parametrize(
    "operator, good",
    [(ffn_step, FFN), (attend_step, ATTEND), (normalize_step, NORMALIZE), (sphere_attend_step, SPHERE)],
)
def test_the_good_arguments_reach_the_operator(operator, good):
    with pytest.raises(AssertionError, match="the operator ran"):
        operator(**good)
