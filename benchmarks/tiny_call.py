"""One tiny call, a vector with a single number: what is left is the fixed cost of a call and its derivative."""

import functorch_inverse as fi
from benchmarks._report import main, measured
from benchmarks._timing import OURS, Workload
from benchmarks._vectors import Vectors, contenders


def workload(dtype):
    problem = Vectors.draw(1, 1, dtype)
    ours = fi.custom_inverse(problem.g, problem.f, event_dim=1)
    return Workload("one tiny call", "1 x 1", dtype, contenders(problem, ours), problem.truth(), {OURS: 2.0})


def rows(effort):
    return measured((workload(dtype) for dtype in effort.dtypes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
