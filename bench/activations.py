"""What a layer of macaron_ops keeps between its forward and its backward pass, by formula.

Numbers a token, in the dtype of x unless said otherwise, of width D, whole hidden width F and H heads:

    the output, and the input of every substep but the first      D each: 2 substeps in Lie-Trotter, 3 in Strang
    the attention's output                                        D
    of its scores, a maximum and a reciprocal sum a head          2 H, float32
    save="fast": hidden pre-activations and projections           F + 3 D; native keeps the latter in float32,
                                                                  in bf16 where the CPU multiplies that

The layer's input and its parameters are there anyway. Both halves of a Strang layer's FFN together have F. Nothing else
grows with the tokens; the allocator rounds each tensor up. Where the core of attention is PyTorch's, it keeps one
number of the scores, H.
"""

from __future__ import annotations

import torch

from macaron_ops.native import words_are_pairs

SUBSTEPS = {"Lie-Trotter": 2, "Strang": 3}
SAVE = ("fast", "lean")
BACKENDS = ("native", "triton")


def kept_bytes(
    tokens: int, width: int, hidden: int, heads: int, scheme: str, save: str, itemsize: int, backend: str
) -> int:
    """Of one pre-norm layer without dropout; ``itemsize`` is that of x and the parameters, ``backend`` a fused one.

    Raises:
        ValueError: an unknown scheme, policy or backend.
    """
    for name, value, known in (("scheme", scheme, SUBSTEPS), ("save", save, SAVE), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    numbers = (SUBSTEPS[scheme] + 1) * width
    projections = 0
    if save == "fast":
        numbers += hidden
        floats = backend == "native" and not (itemsize == 2 and words_are_pairs(torch.bfloat16))
        projections = 3 * width * (4 if floats else itemsize)
    return tokens * (itemsize * numbers + projections + 4 * 2 * heads)
