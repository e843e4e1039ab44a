"""Integrals along a short way, by which a value gets back the derivative that a trace would lose."""

import numpy as np

__all__ = ["gauss_legendre"]


def gauss_legendre(order: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1] such that the derivatives of an integral are right up to an order.

    Source: Golub and Welsch, Calculation of Gauss Quadrature Rules (1969).
    """
    return _TABLES[(order + 1) // 2 - 1]


def _table(points: int) -> list[tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return [((1 + float(c)) / 2, float(w) / 2) for c, w in zip(nodes, weights, strict=True)]


# Made beforehand, since Dynamo would trace NumPy; nobody differentiates a graph more than 16 times.
_TABLES = [_table(m) for m in range(1, 9)]
