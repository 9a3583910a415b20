"""Compositions of substeps, by order.

Real schemes of an order above 2 have substeps that go backwards (Sheng 1989, Suzuki 1991), the two complex ones have
not. "TU Wien" is the collection of Auzinger, Koch and others, http://www.asc.tuwien.ac.at/~winfried/splitting.
"""

import math

from ..scheme import Splitting, alternating, palindrome

__all__ = ["COMPOSITIONS"]

_LIE_TROTTER = "Trotter 1959, Proc. AMS 10:545-551, doi:10.1090/S0002-9939-1959-0108732-6; Godunov 1959"
_STRANG = (
    "Strang 1968, SIAM J. Numer. Anal. 5:506-517, doi:10.1137/0705041; "
    "Marchuk 1968, Aplikace Matematiky 13:103-132, doi:10.21136/AM.1968.103142"
)
_MCLACHLAN = "McLachlan 1995, SIAM J. Sci. Comput. 16:151-168, doi:10.1137/0916010"
_TRIPLE_JUMP = (
    "Yoshida 1990, Phys. Lett. A 150:262-268, doi:10.1016/0375-9601(90)90092-3; Forest, Ruth 1990, "
    "Physica D 43:105-117; Creutz, Gocksch 1989; Suzuki 1990"
)
_SUZUKI = "Suzuki 1990, Phys. Lett. A 146:319-323, doi:10.1016/0375-9601(90)90962-N"
_YOSHIDA = "Yoshida 1990, Phys. Lett. A 150:262-268, doi:10.1016/0375-9601(90)90092-3, solution A"
_BLANES_MOAN = "Blanes, Moan 2002, J. Comput. Appl. Math. 142:313-330, doi:10.1016/S0377-0427(01)00492-7"
_COMPLEX = "Castella, Chartier, Descombes, Vilmart 2009, BIT 49:487; Hansen, Ostermann 2009, BIT 49:527"


def _both(scheme: Splitting) -> tuple[Splitting, Splitting]:
    """The scheme, and with A and B in each other's place."""
    return scheme, scheme.swap()


def _composed(name: str, gammas: tuple, source: str, note: str = "") -> tuple[Splitting, Splitting]:
    """Strang steps by ``gammas``, merged, beginning with A and beginning with B."""
    return _both(_STRANG_ABA.compose(gammas, name, source, note).merge())


_STRANG_ABA = Splitting(
    "strang_ABA",
    order=2,
    stages=palindrome("A", 0.5, 1.0),
    source=_STRANG,
    note="Strang-Marchuk, with the attention halved",
)
_STRANG_BAB = Splitting(
    "strang_BAB",
    order=2,
    stages=palindrome("B", 0.5, 1.0),
    source=_STRANG,
    note="Strang-Marchuk; the Macaron layer: half FFN, attention, half FFN (Lu et al. 2019, arXiv 1906.02762)",
)

_triple_jump = 1 / (2 - 2 ** (1 / 3))
_five_jump = 1 / (4 - 4 ** (1 / 3))
_mclachlan2 = 0.19318332750378357
_root = math.sqrt(19)
_yoshida6 = (0.78451361047755727, 0.23557321335935813, -1.1776799841788710)
_complex3 = complex(0.5, math.sqrt(3) / 6)
_complex4 = 0.32439640402017117 + 0.13458627249080670j

FIRST = (
    Splitting(
        "lie_trotter_AB",
        order=1,
        stages=alternating("A", 1.0, 1.0),
        source=_LIE_TROTTER,
        note="the standard Transformer layer: attention, then FFN (Vaswani et al. 2017, arXiv 1706.03762)",
    ),
    Splitting(
        "lie_trotter_BA",
        order=1,
        stages=alternating("B", 1.0, 1.0),
        source=_LIE_TROTTER,
        note="FFN, then attention",
    ),
)

SECOND = (
    _STRANG_BAB,
    _STRANG_ABA,
    Splitting(
        "ak_best_2_2",
        order=2,
        stages=alternating("A", 1 - math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5), 1 - math.sqrt(0.5)),
        source="TU Wien, best scheme of two stages; McLachlan 1995",
        note="its own adjoint but for A <-> B, so not symmetric",
    ),
    *_both(
        Splitting(
            "mclachlan2_ABA",
            order=2,
            stages=palindrome("A", _mclachlan2, 0.5, 1 - 2 * _mclachlan2),
            source=f"{_MCLACHLAN}; digits of Omelyan, Mryglod, Folk 2002, Comput. Phys. Commun. 146:188",
        )
    ),
)

THIRD = (
    Splitting(
        "ruth3",
        order=3,
        stages=alternating("A", 7 / 24, 2 / 3, 3 / 4, -2 / 3, -1 / 24, 1.0),
        source="Ruth 1983, IEEE Trans. Nucl. Sci. NS-30:2669",
    ),
    Splitting(
        "ak_suzuki3",
        order=3,
        stages=alternating(
            "A",
            *(0.26833009578175992, 0.91966152301739986, -0.18799161879915978),
            *(-0.18799161879915978, 0.91966152301739986, 0.26833009578175992),
        ),
        source='Suzuki 1992; "Emb 3/2 AKS", TU Wien',
        note="its own adjoint but for A <-> B; the mean with its swap has order 4",
    ),
    Splitting(
        "complex3_strang2",
        order=3,
        stages=alternating("A", _complex3 / 2, _complex3, 0.5, _complex3.conjugate(), _complex3.conjugate() / 2),
        source=f"Bandrauk, Shen 1991; {_COMPLEX}",
        note="two Strang steps of complex length, all with a real part above 0",
    ),
)

FOURTH = (
    *_composed(
        "yoshida4_ABA", (_triple_jump, 1 - 2 * _triple_jump, _triple_jump), _TRIPLE_JUMP, "triple jump, Forest-Ruth"
    ),
    *_composed("suzuki4_ABA", (*[_five_jump] * 2, 1 - 4 * _five_jump, *[_five_jump] * 2), _SUZUKI),
    Splitting(
        "mclachlan4",
        order=4,
        stages=palindrome(
            "A",
            *((14 - _root) / 108, 2 / 5, (20 - 7 * _root) / 108, -1 / 10),
            *((20 + 8 * _root) / 108, 2 / 5),
        ),
        source=f"{_MCLACHLAN}, five stages, with sqrt(19)",
    ),
    Splitting(
        "mclachlan_ak4_s6",
        order=4,
        stages=palindrome(
            "A",
            *(0.093500348726330576, 0.43905172781715856, -0.069094369881095038, -0.13653631407151121),
            *(0.47559402115476446, 0.39496917250870531),
        ),
        source='"Emb 4/3 M/AK", TU Wien',
    ),
    *_both(
        Splitting(
            "blanes_moan4_ABA",
            order=4,
            stages=palindrome(
                "A",
                *(0.0792036964311955997, 0.209515106613361967, 0.353172906049774063, -0.143851773179818185),
                *(-0.0420650803577194907, 0.434336666566456219, 0.219376955753499656),
            ),
            source=f"{_BLANES_MOAN}, S6; 18 digits of TU Wien",
            note="the smallest error of order 4 here",
        )
    ),
    Splitting(
        "complex4_triple_jump",
        order=4,
        stages=palindrome("A", _complex4 / 2, _complex4, 0.5 - _complex4 / 2, 1 - 2 * _complex4),
        source=f"Chambers 2003; {_COMPLEX}",
        note="the triple jump with a complex cube root",
    ),
    Splitting(
        "chin4A",
        order=4,
        stages=(("B", 1 / 6), ("A", 1 / 2), ("B", 2 / 3, 1 / 72), ("A", 1 / 2), ("B", 1 / 6)),
        source="Suzuki 1995, Phys. Lett. A 201:425; Chin 1997, Phys. Lett. A 226:344-348",
        note="order 4 without backward substeps, at the price of a commutator: the field 2/3 B + h^2/72 [B,[A,B]]",
    ),
)

SIXTH = (
    *_composed("yoshida6_ABA", (*_yoshida6, 1 - 2 * sum(_yoshida6), *_yoshida6[::-1]), _YOSHIDA),
    Splitting(
        "blanes_moan6_ABA",
        order=6,
        stages=palindrome(
            "A",
            *(0.050262764400392723, 0.14881644790104328, 0.41351430042834348, -0.13238586576778376),
            *(0.045079889794398111, 0.067307604692184399, -0.18805485381956862, 0.43266640257817372),
            *(0.54196067845078001, -0.016404589403617635, -0.72552555850869141),
        ),
        source=f"{_BLANES_MOAN}, S10",
    ),
)

COMPOSITIONS = (*FIRST, *SECOND, *THIRD, *FOURTH, *SIXTH)
