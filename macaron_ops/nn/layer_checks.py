"""The constructor arguments that all layers with torch's signature share."""

from macaron_ops.ops.checks import choice, number, positive_int, probability
from macaron_ops.ops.run import SAVE

__all__ = ["check_layer"]


def check_layer(
    d_model: object,
    nhead: object,
    dim_feedforward: object,
    dropout: object,
    layer_norm_eps: object,
    save: object,
    *,
    halves: bool = False,
) -> None:
    """Refuse what no layer can be built from; ``halves``: the FFN is two of half the width.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    positive_int("d_model", d_model)
    positive_int("nhead", nhead)
    positive_int("dim_feedforward", dim_feedforward)
    if d_model % nhead:
        raise ValueError(f"nhead: expected a divisor of d_model = {d_model}; got {nhead}")
    if halves and dim_feedforward % 2:
        raise ValueError(f"dim_feedforward: expected an even width, for two halves; got {dim_feedforward}")
    probability("dropout", dropout)
    number("layer_norm_eps", layer_norm_eps, minimum=0.0)
    choice("save", save, SAVE)
