r"""Banded systems by orthogonal cyclic reduction: log2(n) steps of plain differentiable torch, stable for every A.

Let m = max(lower, upper, 1). An element is what is left of a run of neighbouring equations once the unknowns that
occur in no other equation are eliminated: 2 m equations between the m unknowns before the run, its first m, its
last m, and the m behind it. Two neighbouring elements

    (a, b, c, d)  and  (c, d, e, f)

share c and d, and nobody else knows these: Householder reflections of their 4 m equations triangularise the columns
of c and d, which gives c and d from a, b, e, f, and leaves 2 m equations between a, b, e, f: one element. The columns of
c and d have full rank where A has an inverse, so no pivots are sought, and where there is a derivative nothing is
divided by zero. Source: Wright, Stable parallel algorithms for two-point boundary value problems (1992); Golub
and Van Loan, Matrix Computations, 4th edition, sections 4.5.4 (cyclic reduction) and 5.1 (Householder).

Layout: (equation, unknown or column, *batch, element), so that all loops run along the elements.
"""

import torch
from torch import Tensor

from functorch_inverse._bands import Width, transposed

__all__ = ["reduced_log_abs_det", "reduced_solve"]


def reduced_solve(bands: Tensor, width: Width, b: Tensor, transpose: bool) -> Tensor:
    """u with A u = b, or A^T u = b, for b of shape (*batch, k, n)."""
    if transpose:
        bands, width = transposed(bands, width), width.swapped
    m = max(width.lower, width.upper, 1)
    equations, _ = _leaves(bands, width, m, b)
    levels, counts = [], []
    while equations.shape[-1] > 1:
        counts.append(equations.shape[-1])
        solved, equations = _triangularised(_merged(equations, m), 2 * m)
        levels.append(solved)
    solved, _ = _triangularised(equations[:, m : 3 * m].contiguous(), 2 * m, equations[:, 4 * m :])
    middle = _back_substituted(solved, equations.new_zeros(0, *equations.shape[1:]), b.shape[-2])
    known = torch.cat([torch.zeros_like(middle[:m]), middle, torch.zeros_like(middle[:m])])
    for solved, count in zip(reversed(levels), reversed(counts), strict=True):
        known = _children(_back_substituted(solved, known, b.shape[-2]), known, m)[..., :count]
    return _from_leaves(known[m : 3 * m], b)


def reduced_log_abs_det(bands: Tensor, width: Width) -> Tensor:
    """log|det A|, shape (*batch): reflections keep it, so it is that of the triangles."""
    m = max(width.lower, width.upper, 1)
    equations, scale = _leaves(bands, width, m, bands.new_zeros(*bands.shape[:-2], 0, bands.shape[-1]))
    total = scale.log().sum((0, -1))
    while equations.shape[-1] > 1:
        solved, equations = _triangularised(_merged(equations, m), 2 * m)
        total = total + _log_diagonal(solved)
    solved, _ = _triangularised(equations[:, m : 3 * m].contiguous(), 2 * m)
    return total + _log_diagonal(solved)


def _log_diagonal(rows: list[Tensor]) -> Tensor:
    return torch.stack([row[0] for row in rows]).abs().log().sum((0, -1))


# The window of element e holds the columns 2 m e - m ... 2 m e + 3 m - 1. In it, entry (p, q) stands in band row
# upper + m + p - q: reading the columns one after the other with one row too few shifts column q down by q.
def _leaves(bands: Tensor, width: Width, m: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of 2 m equations each, with b behind, every equation divided by a power of two; and these."""
    n = bands.shape[-1]
    count = -(-n // (2 * m))
    surplus = 2 * m * count - n
    unit = torch.zeros_like(bands[..., :1, :1]).expand(*bands.shape[:-1], surplus)
    unit = torch.cat([unit[..., : width.upper, :], torch.ones_like(unit[..., :1, :]), unit[..., width.upper + 1 :, :]], -2)
    margin = torch.zeros_like(bands[..., :1]).expand(*bands.shape[:-1], m)
    columns = torch.cat([margin, bands, unit, margin], -1).unflatten(-1, (count + 1, 2 * m))
    windows = torch.cat([columns[..., :-1, :], columns[..., 1:, :]], -1)
    windows = windows.movedim((-1, -3), (0, 1))
    height = width.diagonals + 4 * m
    below = torch.zeros_like(windows[:, :1]).expand(4 * m, 4 * m, *windows.shape[2:])
    skewed = torch.cat([windows, below], 1).flatten(0, 1)[: 4 * m * (height - 1)].unflatten(0, (4 * m, height - 1))
    entries = skewed[:, width.upper + m : width.upper + 3 * m].transpose(0, 1)
    sides = torch.cat([b, torch.zeros_like(b[..., :1]).expand(*b.shape[:-1], surplus)], -1)
    sides = sides.unflatten(-1, (count, 2 * m)).movedim((-1, -3), (0, 1))
    scale = _row_sizes(entries)
    return torch.cat([entries, sides], 1) / scale.unsqueeze(1), scale


def _row_sizes(entries: Tensor) -> Tensor:
    """A power of two near the largest entry of each equation."""
    largest = entries.detach().abs().amax(1)
    return torch.exp2(torch.where(largest > 0, largest, 1).log2().round())


def _merged(equations: Tensor, m: int) -> Tensor:
    """The equations of neighbours: (c, d | a, b | e, f | b), 4 m of them for each pair."""
    if equations.shape[-1] % 2:
        equations = torch.cat([equations, _trivial(equations, m)], -1)
    first, second = equations[..., 0::2], equations[..., 1::2]
    nothing = torch.zeros_like(first[:, : 2 * m])
    upper = torch.cat([first[:, 2 * m : 4 * m], first[:, : 2 * m], nothing, first[:, 4 * m :]], 1)
    lower = torch.cat([second[:, : 2 * m], nothing, second[:, 2 * m :]], 1)
    return torch.cat([upper, lower])


def _trivial(equations: Tensor, m: int) -> Tensor:
    """An element that says b = c = 0."""
    zeros = torch.zeros_like(equations[..., :1])
    eye = torch.eye(2 * m, dtype=zeros.dtype, device=zeros.device)
    eye = torch.nn.functional.pad(eye, (m, equations.shape[1] - 3 * m))
    return zeros + eye.view(*eye.shape, *(1,) * (zeros.ndim - 2))


def _triangularised(rows: Tensor, count: int, sides: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """The first `count` columns made upper triangular: their rows from the diagonal on, and the equations left."""
    rows = rows if sides is None else torch.cat([rows, sides], 1)
    solved = []
    for _ in range(count):
        row, rows = _reflected(rows)
        solved.append(row)
    return solved, rows


# H = I - v v^H / (|x| (|x| + |x_1|)) with v = x + phase(x_1) |x| e_1 maps the first column x to -phase(x_1) |x| e_1.
def _reflected(rows: Tensor) -> tuple[Tensor, Tensor]:
    """H rows for the reflection that empties the first column: its first row, and the rest without that column."""
    x, others = rows[:, 0], rows[:, 1:]
    size = (x * x.conj()).real.sum(0).sqrt()
    first = x[0].abs()
    phase = torch.where(first == 0, 1, x[0] / torch.where(first == 0, 1, first))
    v = torch.cat([(x[0] + phase * size).unsqueeze(0), x[1:]])
    along = (v.conj().unsqueeze(1) * others).sum(0) / (size * (size + first))
    others = others - v.unsqueeze(1) * along
    return torch.cat([(-phase * size).unsqueeze(0), others[0]]), others[1:]


def _back_substituted(rows: list[Tensor], known: Tensor, k: int) -> Tensor:
    """The unknowns (*, k, *batch, element) of a triangle from those that stand behind them in its rows."""
    count = len(rows)
    for row in reversed(rows):
        coefficients, side = row[1 : row.shape[0] - k], row[row.shape[0] - k :]
        moved = (coefficients.unsqueeze(1) * known).sum(0) if coefficients.shape[0] else torch.zeros_like(side)
        found = (side - moved) / row[0]
        known = torch.cat([found.unsqueeze(0), known]) if known.shape[0] else found.unsqueeze(0)
    return known[:count]


def _children(middle: Tensor, known: Tensor, m: int) -> Tensor:
    """(a, b, c, d) and (c, d, e, f) in turns, from (c, d) and (a, b, e, f)."""
    left, right = torch.cat([known[: 2 * m], middle]), torch.cat([middle, known[2 * m :]])
    return torch.stack([left, right], -1).flatten(-2)


def _from_leaves(x: Tensor, like: Tensor) -> Tensor:
    return x.movedim((0, 1), (-1, -3)).flatten(-2)[..., : like.shape[-1]]
