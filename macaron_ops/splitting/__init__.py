"""Splitting schemes as data: how one step of ``dx/dt = A(x) + B(x)`` is made of substeps of A and of B.

tables/, catalogue    the schemes: coefficients, orders, sources; by name
scheme, algebra       what a scheme is, and its order conditions
integrate, substeps   a path by a scheme, in flat space or on the sphere
convergence, problems order and precision as they are measured
"""

from .catalogue import CATALOGUE, find, register
from .convergence import Convergence, fitted_order, observed_order, work_precision
from .integrate import UNSPLIT, integrate
from .problems import PROBLEMS, Problem
from .retraction import tangent, to_sphere
from .scheme import AffineSplitting, Cost, Scheme, Splitting, Stage
from .substeps import RUNGE_KUTTA, Operator, RungeKutta, bracket
from .tables import sandwich

__all__ = [
    "CATALOGUE",
    "PROBLEMS",
    "RUNGE_KUTTA",
    "UNSPLIT",
    "AffineSplitting",
    "Convergence",
    "Cost",
    "Operator",
    "Problem",
    "RungeKutta",
    "Scheme",
    "Splitting",
    "Stage",
    "bracket",
    "find",
    "fitted_order",
    "integrate",
    "observed_order",
    "register",
    "sandwich",
    "tangent",
    "to_sphere",
    "work_precision",
]
