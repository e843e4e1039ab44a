"""The benchmarks run at tiny sizes and tell right from wrong; nothing is said about time here."""

import importlib
import json
import sys

import pytest
import torch

from benchmarks import _peers, _report, _timing, gpu, transforms
from benchmarks.__main__ import CLAIMS
from benchmarks._timing import LIMIT, OURS, TINY, TOLERANCE, Cell, Contender, Effort, Row, Workload, judge, measure
from benchmarks._vectors import Vectors

LOOSE = TOLERANCE[torch.float64]
TRUTH = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]))


@pytest.fixture
def _no_peers(monkeypatch):
    monkeypatch.setattr(_peers, "installed", lambda *names: False)


def returning(*values):
    return Contender("planted", lambda: values)


# --- right or wrong --------------------------------------------------------------------------------


def test_right_is_right():
    assert judge(returning(*TRUTH), TRUTH, LOOSE) == Cell(None)


@pytest.mark.parametrize(
    "gradient",
    [
        None,
        torch.zeros(2),
        torch.tensor([3.0, -4.0]) * 1.001,
        torch.tensor([3.0, float("nan")]),
        torch.tensor([3.0, float("inf")]),
        torch.tensor([[3.0, -4.0]]),
        torch.tensor([3.0, 4.0]),
    ],
    ids=["missing", "zero", "slightly off", "nan", "inf", "shape", "sign"],
)
def test_wrong_is_wrong(gradient):
    assert judge(returning(TRUTH[0], gradient), TRUTH, LOOSE).status == "wrong"
    assert judge(returning(TRUTH[1], TRUTH[1]), TRUTH, LOOSE).status == "wrong"


def broken():
    raise ValueError("not\ntoday")


def test_an_error_is_told():
    assert judge(Contender("planted", broken), TRUTH, LOOSE) == Cell(None, "fails", "ValueError: not")


def planted():
    contenders = [
        Contender(LIMIT, lambda: TRUTH),
        Contender(OURS, lambda: TRUTH),
        Contender("half", lambda: (TRUTH[0], TRUTH[1] / 2)),
        Contender("broken", broken),
    ]
    return Workload("claim", "work", torch.float64, contenders, TRUTH, {OURS: 1e9})


def test_a_planted_contender_is_marked_in_the_table():
    row = measure(planted(), TINY)
    assert {name: cell.status for name, cell in row.cells.items()} == {
        LIMIT: "right",
        OURS: "right",
        "half": "wrong",
        "broken": "fails",
    }
    text = _report.document([row], "tiny")
    assert "| wrong (" in text and "| fails |" in text
    assert "half wrong: error 0e+00, error 5e-01 (claim)" in text


def test_a_limit_that_fails_is_no_limit():
    work = planted()
    alone = Workload(work.claim, work.name, work.dtype, [Contender(LIMIT, broken), *work.contenders[1:]], work.truth)
    with pytest.raises(RuntimeError, match="the limit failed"):
        measure(alone, TINY)


def test_a_wrong_limit_is_no_limit():
    work = planted()
    wrong = Contender(LIMIT, lambda: (TRUTH[0], -TRUTH[1]))
    alone = Workload(work.claim, work.name, work.dtype, [wrong, *work.contenders[1:]], work.truth)
    with pytest.raises(RuntimeError, match="the limit is wrong"):
        measure(alone, TINY)


def test_slow_ones_leave_the_race_and_the_limit_runs_in_every_round(monkeypatch):
    cost = {"limit": 1.0, "slow": 50.0}
    monkeypatch.setattr(_timing, "_clock", lambda contender, calls, clock: cost[contender.name])
    monkeypatch.setattr(_timing, "_block", lambda contender, clock: 1)
    effort = Effort("test", 6.0, 5, (torch.float64,))
    times = _timing.race([Contender("limit", None), Contender("slow", None)], effort)
    assert times["slow"] == [(50.0, 1.0)] * 3
    assert times["limit"] == [(1.0, 1.0)] * 6


# --- the table -------------------------------------------------------------------------------------


def row(value, status="right"):
    return Row("c", "w", "float64", "times the limit", {OURS: 2.0}, {LIMIT: Cell(1.0), OURS: Cell(value, status)}, 1e-3)


@pytest.mark.parametrize(("value", "shown"), [(1.5, "| 1.50 |"), (2.5, "| **2.50** |"), (25.4, "| **25** |")])
def test_missed_targets_are_bold(value, shown):
    assert shown in _report.markdown([row(value)])
    assert row(value).met() == (value <= 2)


def test_wrong_never_meets_a_target():
    assert row(0.1, "wrong").met() is False


def test_json_there_and_back(tmp_path):
    rows = [row(1.5), row(None, "fails")]
    _report.save(rows, tmp_path / "rows.json")
    assert _report.load(tmp_path / "rows.json") == rows


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    _report.draw([row(1.5), row(3.0, "wrong"), row(None, "fails")], tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_a_claim_from_the_command_line(tmp_path, capsys):
    _report.main("A claim.", lambda effort: [row(1.5)], ["--quick", "--json", str(tmp_path / "rows.json")])
    assert "| 1.50 |" in capsys.readouterr().out
    assert _report.load(tmp_path / "rows.json") == [row(1.5)]


# --- the claims ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_peers")
@pytest.mark.parametrize("claim", CLAIMS)
def test_claims(claim):
    if claim == "banded":
        pytest.importorskip("scipy")
    if claim == "memory" and sys.platform != "linux":
        pytest.skip("reads /proc")
    rows = importlib.import_module(f"benchmarks.{claim}").rows(TINY)
    assert rows
    for row in rows:
        wanted = {name for name, cell in row.cells.items() if name in (LIMIT, OURS)}
        assert wanted, row
        assert {name: row.cells[name] for name in wanted if row.cells[name].status != "right"} == {}
        numbers = [cell.value for cell in row.cells.values() if cell.status != "fails" and row.unit != "verdict"]
        assert None not in numbers
    assert _report.markdown(rows)


def test_peers_that_are_installed_are_right_about_numbers():
    [row] = importlib.import_module("benchmarks.elementwise").rows(TINY)
    assert {name: cell for name, cell in row.cells.items() if cell.status != "right"} == {}


@pytest.mark.usefixtures("_no_peers")
def test_compiled_contenders_are_right():
    [row] = importlib.import_module("benchmarks.kepler").rows(Effort("tiny", 0.0, 1, (torch.float64,), "eager"))
    assert {name: cell.status for name, cell in row.cells.items()} == dict.fromkeys(row.cells, "right")
    assert len(row.cells) == 5


def test_hessian_against_differences():
    """The truth of that claim is its limit in float64, so it needs a witness of its own."""
    p = Vectors.draw(2, 3, torch.float64)

    def gradient(y):
        moved = Vectors(p.A, p.x, y, torch.cos(y))
        return torch.from_numpy(moved.truth()[1])

    dy = torch.linalg.solve(p.jacobian(p.y), p.v.unsqueeze(-1)).squeeze(-1)
    h = 1e-6
    differences = (gradient(p.y + h * dy) - gradient(p.y - h * dy)) / (2 * h)
    assert torch.allclose(transforms.product(p), differences, rtol=1e-7, atol=1e-8)


def test_gpu_on_a_machine_without(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu.start()
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_peers")
def test_the_work_for_the_gpu_is_right_on_the_cpu():
    for work in (gpu.numbers(7, torch.float64, TINY, "cpu"), gpu.vectors(2, 3, torch.float64, TINY, "cpu")):
        row = gpu.absolute(measure(work, TINY))
        assert {name: cell.status for name, cell in row.cells.items()} == dict.fromkeys(row.cells, "right")
        assert " ms |" in _report.markdown([row])


def test_the_accuracy_of_differences(tmp_path, capsys):
    claim = importlib.import_module("benchmarks.accuracy_of_differences")
    claim.main(["--quick", "--json", str(tmp_path / "errors.json")])
    found = json.loads((tmp_path / "errors.json").read_text())
    assert len(found) == len(claim.RULES)
    assert all(0 < error < 1e-2 for row in found.values() for error in row)
    assert found["central, 6"][0] < found["central, 2"][0] < found["forward, 1"][0]
    assert capsys.readouterr().out.count("\n") == 2 + len(claim.RULES)
