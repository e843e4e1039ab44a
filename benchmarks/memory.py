"""The memory of a forward and a backward beyond J and its factors, in sizes of the input: it must not grow with n.

Each figure comes from a process of its own: the peak of its resident memory above what it held before, less J and its LU
(n inputs each; numbers have none). "O(input)" is read as: no more than sixteen inputs. Linux only.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

import functorch_inverse as fi
from benchmarks import _vectors, elementwise
from benchmarks._report import main
from benchmarks._timing import AFTERNOON, LIMIT, OURS, TOLERANCE, Cell, Contender, Row, judge, there_and_back

CODE = "import sys; from benchmarks.memory import report; report(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
SIZES = {"numbers": (10**7, 0), "vectors, n = 16": (2**16, 16), "vectors, n = 64": (2**13, 64)}


def prepare(name, b, n):
    """One contender and its truth; n = 0 means numbers."""
    if n == 0:
        x, v, truth = elementwise.draw(b, torch.float64)
        return Contender(name, there_and_back(elementwise.OWN[name], (x,), v)), truth
    p = _vectors.Vectors.draw(b, n, torch.float64)
    calls = _vectors.own_calls(p, fi.custom_inverse(p.g, p.f, event_dim=1))
    return Contender(name, there_and_back(calls[name], (p.x,), p.v)), p.truth()


def grown(name, b, n):
    """(peak above what was held before, in bytes; right or wrong), after a small call has loaded what is lazy."""
    prepare(name, 4, n)[0].run()
    contender, truth = prepare(name, b, n)
    before = _resident()
    contender.run()
    peak = _status("VmHWM")
    return peak - before, judge(contender, truth, TOLERANCE[torch.float64])


def report(name, b, n):
    torch.set_num_threads(1)
    size, cell = grown(name, b, n)
    print(json.dumps([size, cell.status, cell.note]))


def _resident():
    """Bytes held now, from where the peak is counted anew."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what NumPy has given back must not be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def figure(name, b, n):
    """The figure from a process of its own, in inputs."""
    root = Path(__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", CODE, name, str(b), str(n)], cwd=root, capture_output=True, text=True)
    if child.returncode:
        return Cell(None, "fails", (child.stderr.splitlines() or [""])[-1][:200])
    size, status, note = json.loads(child.stdout.splitlines()[-1])
    return Cell(max(0.0, size / (8 * b * max(n, 1)) - 2 * n), status, note)


def row(problem, b, n, names=(LIMIT, OURS, AFTERNOON)):
    cells = {name: figure(name, b, n) for name in names}
    return Row("memory beyond J and LU", f"{problem}, {b} samples", "float64", "inputs", {OURS: 16.0}, cells)


def rows(effort):
    if effort.tiny:
        return [row("vectors, n = 2", 3, 2, (OURS,))]
    return [row(problem, *size) for problem, size in SIZES.items()]


if __name__ == "__main__":
    main(__doc__, rows)
