"""The same race on a GPU, with absolute times: not yet measured, since no machine with CUDA was at hand when it was written.

Numbers are raced against the memory itself ("traffic": reading x, v, y and writing y and the gradient once), vectors
against one batched LU and solve of a J that is already there ("batched LU"). Without CUDA it says so and exits.
"""

import dataclasses
import time

import torch

import functorch_inverse as fi
from benchmarks import _vectors, elementwise
from benchmarks._report import main, measured
from benchmarks._timing import OURS, OURS_COMPILED, Contender, Workload, both_ways, compiled

NUMBERS = (10**8,)
VECTORS = ((65536, 8), (4096, 64))


def numbers(size, dtype, effort, device="cuda"):
    """Elementwise, against the bandwidth of the memory."""
    x, v, truth = elementwise.draw(size, dtype, device)
    calls = _with_compiled(elementwise.OWN, effort)
    y, gradient = torch.empty_like(v), torch.empty_like(v)

    def traffic():
        y.copy_(x.detach())
        torch.add(y, v, out=gradient)
        return truth  # nothing to check: it computes nothing

    return _workload("elementwise", f"asin by sin, {size:.0e}", dtype, both_ways(calls, (x,), v), truth, ("traffic", traffic))


def vectors(b, n, dtype, effort, device="cuda"):
    """Vectors, against the factorisation."""
    p = _vectors.Vectors.draw(b, n, dtype, device)
    calls = _with_compiled(_vectors.own_calls(p, fi.custom_inverse(p.g, p.f, event_dim=1)), effort)
    J, truth = p.jacobian(p.y), p.truth()

    def batched_lu():
        lu, pivots, _ = torch.linalg.lu_factor_ex(J.mT)
        return p.y, torch.linalg.lu_solve(lu, pivots, p.v.unsqueeze(-1)).squeeze(-1)

    return _workload("vectors", f"{b} x {n}", dtype, both_ways(calls, (p.x,), p.v), truth, ("batched LU", batched_lu))


def _with_compiled(calls, effort):
    return calls | ({OURS_COMPILED: compiled(calls[OURS], effort)} if effort.compiler else {})


def _workload(claim, name, dtype, contenders, truth, yardstick):
    finished = [Contender(c.name, _synchronised(c.run)) for c in (*contenders, Contender(*yardstick))]
    return Workload(f"{claim}, GPU", name.replace("e+0", "e"), dtype, finished, truth)


def _synchronised(run):
    """A GPU works on while Python has gone ahead: wait for it."""

    def finish():
        found = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    return finish


def absolute(row):
    """Milliseconds in place of ratios."""
    for cell in row.cells.values():
        if cell.value is not None:
            cell.value *= row.limit_seconds * 1e3
    row.unit = "ms"
    return row


def workloads(effort):
    for dtype in effort.dtypes:
        yield from (numbers(size, dtype, effort) for size in NUMBERS)
        yield from (vectors(b, n, dtype, effort) for b, n in VECTORS)


def rows(effort):
    print(f"on {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    effort = dataclasses.replace(effort, clock=time.perf_counter)
    return [absolute(row) for row in measured(workloads(effort), effort)]


def start():
    if torch.cuda.is_available():
        main(__doc__, rows)
    else:
        print("benchmarks.gpu: this torch finds no CUDA device, so there is nothing to measure here.")


if __name__ == "__main__":
    start()
