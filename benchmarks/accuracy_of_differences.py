"""How accurate finite differences are: the largest errors of the derivatives of exp(x) sin(2x), as the README shows them."""

import json
from pathlib import Path

import numpy as np
import torch

import functorch_inverse as fi
from benchmarks._report import arguments

RULES = [("central", order) for order in (2, 4, 6, "auto")]
RULES += [("forward", order) for order in (1, 2, 3)] + [("complex", 2)]


def black_box(x):
    return np.exp(x.numpy()) * np.sin(2 * x.numpy())


def exact(x):
    return torch.exp(x) * torch.sin(2 * x)


def derivatives(fn, x, times):
    """The first derivatives of an elementwise function."""
    y, found = fn(x), []
    for _ in range(times):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(y)
    return found


def error(got, expected):
    return ((got - expected).abs() / (expected.abs() + expected.abs().mean())).max().item()


def errors(points):
    """For each rule: the errors of the first three derivatives, and of the first of float32 input."""
    x = torch.linspace(-2, 2, points, dtype=torch.float64).requires_grad_()
    single, expected, found = x.detach().float().requires_grad_(), derivatives(exact, x, 3), {}
    for method, order in RULES:
        fn = fi.finite_difference(black_box, method=method, order=order, event_dim=0)
        name = method if method == "complex" else f"{method}, {order}"
        found[name] = [error(got, want) for got, want in zip(derivatives(fn, x, 3), expected, strict=True)]
        found[name].append(error(derivatives(fn, single, 1)[0].double(), expected[0]))
    return found


def draw(found, path):
    """A group of bars for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k, label in enumerate(("1st", "2nd", "3rd", "1st, float32 input")):
        axes.bar([i + 0.2 * k for i in range(len(found))], [row[k] for row in found.values()], 0.2, label=label)
    axes.set_xticks([i + 0.3 for i in range(len(found))], list(found), rotation=20)
    axes.set(yscale="log", ylabel="largest error")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    options = arguments(__doc__).parse_args(argv)
    found = errors(11 if options.quick else 41)
    print("| method, order | 1st | 2nd | 3rd | 1st, float32 input |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        print("|", name, "|", " | ".join(f"{e:.0e}" for e in row), "|")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
