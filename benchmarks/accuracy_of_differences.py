"""How accurate finite differences are, as the Markdown table of the README: python benchmarks/accuracy_of_differences.py"""

import numpy as np
import torch

import functorch_inverse as fi

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


def main():
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    single = x.detach().float().requires_grad_()
    expected = derivatives(exact, x, 3)
    print("| method, order | 1st | 2nd | 3rd | 1st, float32 input |")
    print("|---|---|---|---|---|")
    for method, order in RULES:
        fn = fi.finite_difference(black_box, method=method, order=order, event_dim=0)
        errors = [error(got, want) for got, want in zip(derivatives(fn, x, 3), expected, strict=True)]
        errors.append(error(derivatives(fn, single, 1)[0].double(), expected[0]))
        name = method if method == "complex" else f"{method}, {order}"
        print("|", name, "|", " | ".join(f"{e:.0e}" for e in errors), "|")


if __name__ == "__main__":
    main()
