"""python -m functorch_inverse: what it prints, and that its exit status notices a wrong derivative."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version

import pytest
import torch

from functorch_inverse.__main__ import COLUMNS, EXAMPLES, Column, compiled_cells, main

EAGER = [
    "backward", "double backward", "grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "jacfwd(jacfwd)",
    "jacrev(jacfwd)", "jacfwd(jacrev(grad))", "vmap(grad)", "vmap(jacrev)", "vmap(jacfwd)", "vmap(hessian)",
    "grad(vmap)", "linearize",
]  # fmt: skip
COMPILED = [f"compile {name}" for name in ("backward", "grad", "vmap(grad)", "jvp", "jacrev", "hessian")]
ONLY_EAGER = ["--processes", "0"]


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "functorch_inverse", *options], capture_output=True, text=True, timeout=300, check=False
    )


def test_everything_is_right_as_json():
    done = run("--json")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["compositions"] == {c.name: dict.fromkeys(EAGER + COMPILED, "right") for c in COLUMNS}
    assert [len(report["derivatives"][e.name]) for e in EXAMPLES] == [3 * 2 * 2 + 3 * 2 * 2, 5 + 5]
    assert all(n["right"] and n["error"] < 1e-6 for numbers in report["derivatives"].values() for n in numbers)
    assert report["versions"]["torch"] == version("torch")
    assert set(report["versions"]) == {"python", "torch", "optree", "numpy", "functorch_inverse"}
    assert report["devices"][0] == "cpu"
    assert report["right"] is True
    assert done.returncode == 0


def test_text():
    done = run(*ONLY_EAGER)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith("  ") and line[2:24].strip() in EAGER]
    assert [line[2:24].strip() for line in table] == EAGER
    assert all([line[i : i + 18].strip() for i in (24, 42, 60, 78)] == ["right"] * 4 for line in table)
    assert sum("dq2/dl1" in line for line in lines) == 3
    assert f"torch {version('torch')}," in done.stdout
    assert lines[-1] == "all right"
    assert done.returncode == 0


def test_the_numbers_are_the_derivatives(capsys):
    main(["--json", *ONLY_EAGER], columns=[])
    report = json.loads(capsys.readouterr().out)
    w = {(n["x"], n["derivative"]): n["value"] for n in report["derivatives"][EXAMPLES[1].name]}
    # W = 0.567143290409784 at x = 1; W' = W / (x (1 + W)).
    assert w[1.0, "W'"] == pytest.approx(0.567143290409784 / 1.567143290409784, rel=1e-12)


# One row of f scaled: what depends on x2 is wrong, and nothing else.
def wrong_arm(q, lengths):
    return EXAMPLES[0].f(q, lengths) * torch.tensor([1.0, 1.001], dtype=q.dtype)


def no_lengths(q, lengths):
    return EXAMPLES[0].f(q, lengths.detach())


@pytest.mark.parametrize(
    ("planted", "count"),
    [(replace(EXAMPLES[0], f=wrong_arm), 6), (replace(EXAMPLES[0], f=no_lengths), 12),
     (replace(EXAMPLES[1], f=lambda w: 1.0001 * w * w.exp()), 10)],
    ids=["arm", "theta", "lambert"],
)  # fmt: skip
def test_a_wrong_example_shows(planted, count, capsys):
    assert main(ONLY_EAGER, examples=[planted], columns=[]) == 1
    out = capsys.readouterr().out
    assert out.count("  WRONG\n") == count
    assert out.endswith("NOT ALL RIGHT\n")


@dataclass(frozen=True)
class Planted(Column):
    change: object = None

    def functions(self):
        return self.change(*super().functions())


def planted(change):
    return Planted(**vars(COLUMNS[2]), change=change)


def refuse(y, c):
    raise KeyError("no derivative here")


def test_a_wrong_f_shows_in_the_table(capsys):
    column = planted(lambda g, f, exact: (g, lambda y, c: 1.001 * f(y, c), exact))
    assert main([*ONLY_EAGER, "--json"], examples=[], columns=[COLUMNS[1], column]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["right"] is False
    assert set(report["compositions"][COLUMNS[1].name].values()) == {"right"}
    cells = report["compositions"][column.name]
    assert list(cells) == EAGER
    assert all(found.startswith("WRONG ") and 1e-4 < float(found.split()[1]) < 1e-1 for found in cells.values())


def test_a_missing_second_derivative_shows_in_the_table(capsys):
    # f with the right Jacobian at each y, but one that torch takes for a constant.
    def f_(g, f, exact):
        return g, lambda y, c: f(y.detach(), c) + (y - y.detach()) @ jacobian(f, y.detach(), c).mT, exact

    def jacobian(f, y, c):
        return torch.func.jacrev(f)(y, c)

    column = replace(planted(f_), event_dim=None, x=COLUMNS[0].x)
    main([*ONLY_EAGER, "--json"], examples=[], columns=[column])
    cells = json.loads(capsys.readouterr().out)["compositions"][column.name]
    assert cells["grad"] == cells["jacfwd"] == "right"
    assert all(cells[name] != "right" for name in EAGER if name.count("jac") > 1 or "hessian" in name)


def test_an_error_shows_by_its_class(capsys):
    column = planted(lambda g, f, exact: (g, refuse, exact))
    assert main(ONLY_EAGER, examples=[], columns=[column]) == 1
    assert capsys.readouterr().out.count("KeyError") == len(EAGER)


def test_a_process_that_dies_costs_one_cell():
    jobs = [("theta", "no such stack"), ("event_dim=0", "grad")]
    assert compiled_cells(jobs) == {jobs[0]: "exit status 1", jobs[1]: "right"}


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
