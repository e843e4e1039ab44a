"""Rows as a Markdown table, as JSON, as a picture; and the command line that every claim shares."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._timing import FULL, LIMIT, OURS, OURS_COMPILED, QUICK, Cell, Effort, Row, Workload, measure

PEERS = ("torchopt", "zuko", "xitorch", "jax", "optimistix")
SUFFIX = {"times the limit": "", "calls": "", "inputs": " inputs", "ms": " ms", "verdict": ""}

# --- table -----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """One table, a column for each contender."""
    names = contenders(rows)
    head = ["claim", "work", "dtype", "target", *names, "limit"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_line(row, names)) + " |" for row in rows]
    return "\n".join(lines)


def contenders(rows: Iterable[Row]) -> list[str]:
    """All names but the limit's, ours first, the others as they came."""
    found = dict.fromkeys(name for row in rows for name in row.cells)
    ours = [name for name in (OURS, OURS_COMPILED) if name in found]
    return ours + [name for name in found if name not in (LIMIT, *ours)]


def _line(row: Row, names: Sequence[str]) -> list[str]:
    target = ", ".join(f"{value:g}" + (" compiled" if name == OURS_COMPILED else "") for name, value in row.target.items())
    cells = [_figure(row, name) for name in names]
    return [row.claim, row.workload, row.dtype, target + SUFFIX[row.unit] * bool(target), *cells, _limit(row)]


def _figure(row: Row, name: str) -> str:
    cell = row.cells.get(name)
    if cell is None:
        return ""
    if cell.status == "fails" or cell.value is None:
        return cell.status
    number = f"{cell.value:.0f}" if row.unit == "calls" else _digits(cell.value) + SUFFIX[row.unit]
    if cell.status == "wrong":
        return f"wrong ({number})"
    return f"**{number}**" if row.met(name) is False else number


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def _limit(row: Row) -> str:
    """What the limit takes."""
    if row.limit_seconds is None or row.unit != "times the limit":
        return _figure(row, LIMIT)
    seconds = row.limit_seconds
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def document(rows: Sequence[Row], effort: str) -> str:
    """The table with what a reader must know about it."""
    legend = (
        "Times are CPU times, as multiples of the limit, a handwritten autograd.Function with the analytic derivative: the\n"
        "median of the ratios of neighbouring runs, lower is better. The last column is the limit itself. **Bold**: our\n"
        "target is missed. wrong: the gradient is not the derivative. fails: an error. Empty: not its kind of problem, or\n"
        "not installed."
    )
    notes = [f"* {note}" for note in remarks(rows)]
    verdicts = [row for row in rows if row.unit == "verdict"]
    figures = [row for row in rows if row.unit != "verdict"]
    tables = [markdown(group) for group in (figures, verdicts) if group]
    return "\n\n".join([f"Measured {conditions(effort)}.", legend, *tables, *(["\n".join(notes)] if notes else [])])


def remarks(rows: Sequence[Row]) -> list[str]:
    """Why who is wrong or fails, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.note:
                found.setdefault((name, f"{cell.status}: {cell.note[:120]}"), []).append(row.claim)
    return [f"{name} {reason} ({'; '.join(dict.fromkeys(where))})" for (name, reason), where in found.items()]


def conditions(effort: str) -> str:
    found = {name: _version(name) for name in PEERS}
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name, version in found.items() if version]
    missing = [name for name, version in found.items() if not version]
    machine = f"{platform.machine().replace('_', '-')}, {os.cpu_count()} cores, one thread"
    text = f"{datetime.date.today()} ({effort}) on {machine}; {', '.join(versions)}"
    return text + (f"; not installed: {', '.join(missing)}" if missing else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- JSON ------------------------------------------------------------------------------------------


def save(rows: Sequence[Row], path: str | Path) -> None:
    Path(path).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def load(path: str | Path) -> list[Row]:
    return [_row(entry) for entry in json.loads(Path(path).read_text())]


def _row(entry: dict[str, Any]) -> Row:
    return Row(**{**entry, "cells": {name: Cell(**cell) for name, cell in entry["cells"].items()}})


# --- picture ---------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Every workload a line, every contender a mark, the limit at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.unit == "times the limit"]
    if not rows:
        return
    names = contenders(rows)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.27 * len(rows)), layout="constrained")
    for name, marker in zip(names, "oDsv^<>pPX*hd"[: len(names)], strict=True):
        _marks(axes, rows, name, marker)
    for i, row in enumerate(rows):
        if OURS in row.target:
            axes.plot([row.target[OURS]] * 2, [i - 0.4, i + 0.4], color="black", lw=1)
    axes.axvline(1, color="gray", lw=1)
    axes.set(
        xscale="log",
        xlabel="time / the handwritten limit (black bars: our targets; crosses: wrong)",
        ylim=(len(rows) - 0.4, -0.6),
    )
    axes.set_yticks(range(len(rows)), [f"{row.claim}: {row.workload}, {row.dtype}" for row in rows], fontsize=7)
    axes.grid(axis="x", color="0.9")
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _marks(axes: Any, rows: Sequence[Row], name: str, marker: str) -> None:
    points = [(row.cells[name], i) for i, row in enumerate(rows) if name in row.cells and row.cells[name].value is not None]
    right = [(cell.value, i) for cell, i in points if cell.status == "right"]
    wrong = [(cell.value, i) for cell, i in points if cell.status == "wrong"]
    size = 40 if name in (OURS, OURS_COMPILED) else 18
    (xs, ys) = zip(*right, strict=True) if right else ((), ())
    drawn = axes.scatter(xs, ys, s=size, marker=marker, label=name, zorder=3)
    if wrong:
        axes.scatter(*zip(*wrong, strict=True), s=size, marker="x", color=drawn.get_facecolor()[0], zorder=3)


# --- command line ----------------------------------------------------------------------------------


def measured(workloads: Iterable[Workload], effort: Effort) -> list[Row]:
    """Rows of workloads, one after the other, so that only one is in memory."""
    rows = []
    for workload in workloads:
        rows.append(measure(workload, effort))
        print(f"  {workload.claim}: {workload.name}, {rows[-1].dtype}", file=sys.stderr, flush=True)
    return rows


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fraction of the time")
    parser.add_argument("--json", metavar="PATH", help="write the figures")
    parser.add_argument("--plot", metavar="PATH", help="draw the figures")
    return parser


def main(description: str | None, rows: Callable[[Effort], list[Row]], argv: Sequence[str] | None = None) -> None:
    """The command line of one claim."""
    options = arguments(description).parse_args(argv)
    effort = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    found = rows(effort)
    print(document(found, effort.name))
    if options.json:
        save(found, options.json)
    if options.plot:
        draw(found, options.plot)
