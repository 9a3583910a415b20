"""The schemes that the package knows. A new one is one entry here."""

import difflib

from .scheme import AffineSplitting, Splitting

__all__ = ["CATALOGUE", "find"]

_LIE_TROTTER = "Trotter 1959, Proc. AMS 10:545-551, doi:10.1090/S0002-9939-1959-0108732-6; Godunov 1959"
_STRANG = (
    "Strang 1968, SIAM J. Numer. Anal. 5:506-517, doi:10.1137/0705041; "
    "Marchuk 1968, Aplikace Matematiky 13:103-132, doi:10.21136/AM.1968.103142"
)

_SCHEMES = (
    Splitting(
        "lie_trotter_AB",
        order=1,
        stages=(("A", 1.0), ("B", 1.0)),
        source=_LIE_TROTTER,
        note="the standard Transformer layer: attention, then FFN (Vaswani et al. 2017, arXiv 1706.03762)",
    ),
    Splitting(
        "lie_trotter_BA",
        order=1,
        stages=(("B", 1.0), ("A", 1.0)),
        source=_LIE_TROTTER,
        note="FFN, then attention",
    ),
    Splitting(
        "strang_BAB",
        order=2,
        stages=(("B", 0.5), ("A", 1.0), ("B", 0.5)),
        source=_STRANG,
        note="Strang-Marchuk; the Macaron layer: half FFN, attention, half FFN (Lu et al. 2019, arXiv 1906.02762)",
    ),
    Splitting(
        "strang_ABA",
        order=2,
        stages=(("A", 0.5), ("B", 1.0), ("A", 0.5)),
        source=_STRANG,
        note="Strang-Marchuk, with the attention halved",
    ),
    AffineSplitting(
        "parallel",
        order=1,
        terms=((1.0, (("A", 1.0),)), (1.0, (("B", 1.0),)), (-1.0, ())),
        source="additive splitting; Wang, Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM), arXiv 2204.02311",
        note="x + A(x) + B(x): with Euler substeps it is the unsplit Euler step",
    ),
)

CATALOGUE = {scheme.name: scheme for scheme in _SCHEMES}


def find(name: str) -> Splitting | AffineSplitting:
    """The scheme of this name.

    Raises:
        ValueError: there is none; the message lists the choices and the nearest name.
    """
    if isinstance(name, str) and name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(str(name), CATALOGUE, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"scheme: expected one of {', '.join(map(repr, CATALOGUE))}; got {name!r}.{hint}")
