"""Sums of compositions, each of which begins at the same x: their terms can run side by side.

None has a backward substep but ``pp34_avg4``; from order 2 on the price is a negative weight or twice the work.
"""

from ..scheme import AffineSplitting, Stage, alternating, palindrome
from .compositions import COMPOSITIONS

__all__ = ["SUMS"]

_EXTRAPOLATION = "Chin 2010, Celest. Mech. Dyn. Astr. 106:391-406 (multi-product expansion)"


def _strang_BAB(k: int) -> tuple[Stage, ...]:
    """k Strang steps of 1 / k, merged."""
    return alternating("B", 1 / (2 * k), *[1 / k] * (2 * k - 1), 1 / (2 * k))


def _lie_trotter(first: str, k: int) -> tuple[Stage, ...]:
    """k Lie-Trotter steps of 1 / k."""
    return alternating(first, *[1 / k] * (2 * k))


_suzuki3 = next(scheme for scheme in COMPOSITIONS if scheme.name == "ak_suzuki3")

SUMS = (
    AffineSplitting(
        "parallel",
        order=1,
        terms=((1.0, (("A", 1.0),)), (1.0, (("B", 1.0),)), (-1.0, ())),
        source="additive splitting; Wang, Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM), arXiv 2204.02311",
        note="x + A(x) + B(x): with Euler substeps it is the unsplit Euler step",
    ),
    AffineSplitting(
        "sws",
        order=2,
        terms=((0.5, _lie_trotter("A", 1)), (0.5, _lie_trotter("B", 1))),
        source="Strang 1963, Arch. Rat. Mech. Anal. 12:392-402; Csomos, Farago, Havasi 2005, "
        "Comput. Math. Appl. 50:1017-1031",
        note="symmetrically weighted sequential splitting; not its own adjoint",
    ),
    AffineSplitting(
        "lie_richardson2",
        order=2,
        terms=((2.0, _lie_trotter("A", 2)), (-1.0, _lie_trotter("A", 1))),
        source="Richardson extrapolation; Hairer, Norsett, Wanner, Solving ODEs I, II.9",
        note="the one scheme here that has order 2 with Euler substeps",
    ),
    AffineSplitting(
        "burstein_mirin3",
        order=3,
        terms=(
            (2 / 3, palindrome("A", 0.5, 1.0)),
            (2 / 3, palindrome("B", 0.5, 1.0)),
            (-1 / 6, _lie_trotter("A", 1)),
            (-1 / 6, _lie_trotter("B", 1)),
        ),
        source="Burstein, Mirin 1970, J. Comput. Phys. 5:547",
    ),
    AffineSplitting(
        "affine_drs4",
        order=4,
        terms=(
            (-1 / 6, _lie_trotter("A", 1)),
            (-1 / 6, _lie_trotter("B", 1)),
            (2 / 3, _lie_trotter("A", 2)),
            (2 / 3, _lie_trotter("B", 2)),
        ),
        source="De Leo, Rial, Sanchez de la Vega 2016, IMA J. Numer. Anal. 36:1842-1866",
    ),
    AffineSplitting(
        "richardson_strang4",
        order=4,
        terms=((4 / 3, _strang_BAB(2)), (-1 / 3, _strang_BAB(1))),
        source=f"Richardson extrapolation; {_EXTRAPOLATION}",
    ),
    AffineSplitting(
        "pp34_avg4",
        order=4,
        terms=((0.5, _suzuki3.stages), (0.5, _suzuki3.swap().stages)),
        source='"PP 3/4 A", http://www.asc.tuwien.ac.at/~winfried/splitting',
        note="the mean of ak_suzuki3 and its swap; with backward substeps",
    ),
    AffineSplitting(
        "mpe6",
        order=6,
        terms=((1 / 24, _strang_BAB(1)), (-16 / 15, _strang_BAB(2)), (81 / 40, _strang_BAB(3))),
        source=_EXTRAPOLATION,
    ),
)
