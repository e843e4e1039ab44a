"""Vectors, directly: a batch of n x n Jacobians and their LU, forward and backward.

The problem stands in benchmarks/_vectors.py. The limit writes J by its formula and factorises it once.
"""

import functorch_inverse as fi
from benchmarks._report import main, measured
from benchmarks._timing import OURS, Workload
from benchmarks._vectors import Vectors, contenders

TARGETS = {(1, 3): 3.0, (4096, 3): 1.5, (256, 32): 1.3, (32, 128): 1.3, (4, 512): 1.3}


def workload(b, n, dtype):
    problem = Vectors.draw(b, n, dtype)
    ours = fi.custom_inverse(problem.g, problem.f, event_dim=1)
    target = {OURS: TARGETS[b, n]} if (b, n) in TARGETS else {}
    return Workload("vectors, LU", f"{b} x {n}", dtype, contenders(problem, ours), problem.truth(), target)


def rows(effort):
    sizes = [(2, 3)] if effort.tiny else TARGETS
    return measured((workload(b, n, dtype) for dtype in effort.dtypes for b, n in sizes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
