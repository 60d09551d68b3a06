"""Splines in a skops file, whichever version of SciPy has saved them.

A spline's attributes are ``t`` and ``c`` up to SciPy 1.16, and ``_t`` and ``_c`` in 1.17. From 1.18
on they are those of an object of a private class. Each version loads only its own files, and does
not check them: compiled code reads beyond coefficients that are too few. So :func:`rename` has
skops load :class:`SavedSpline` instead, which makes the spline by SciPy's public function.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from scipy.interpolate import BSpline

_SCIPY = "scipy.interpolate._bsplines"
_NAMES: dict[tuple[object, object], tuple[str, str]] = {
    (_SCIPY, "BSpline"): (__name__, "SavedSpline"),
    (_SCIPY, "_BSpline"): (__name__, "SavedSpline"),
    # An attribute of SciPy 1.17's splines; 1.18 has no such module.
    ("scipy._lib.array_api_compat.numpy._aliases", "asarray"): ("numpy", "asarray"),
}


class SavedSpline:
    """The spline of a file while skops loads it, a ``BSpline`` afterwards."""

    def __setstate__(self, state: Any) -> None:
        """Become the spline that any version of SciPy has saved.

        Raises ``ValueError``, ``TypeError`` or ``LookupError`` for one that none has saved.
        """
        if isinstance(state, tuple):  # the object of the private class, and an empty array
            spline = state[0]
            if type(spline) is not BSpline:
                raise TypeError("a spline has no knots or coefficients")
        else:
            prefix = "_" if "_t" in state else ""
            knots, coefficients = (
                np.asarray(state[prefix + name]).astype(np.float64, "C", casting="safe")
                for name in "tc"
            )
            degree = operator.index(state["k"])
            num_functions = len(knots) - degree - 1
            # SciPy's constructor also refuses equal knots, which a constant feature has.
            if (
                knots.ndim != 1
                or not 0 <= degree < num_functions <= len(coefficients)
                or not np.all(np.diff(knots) >= 0)
            ):
                raise ValueError("a spline's knots, coefficients and degree do not match")
            spline = BSpline.construct_fast(
                knots, coefficients, degree, state["extrapolate"], state["axis"]
            )
        self.__class__ = BSpline
        vars(self).update(vars(spline))


def rename(node: dict[str, Any]) -> bool:
    """Have skops load a :class:`SavedSpline` for a spline's node; returns whether it is one."""
    name = _NAMES.get((node.get("__module__"), node.get("__class__")))
    if name is not None:
        node["__module__"], node["__class__"] = name
    return name is not None
