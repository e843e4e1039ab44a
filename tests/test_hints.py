"""What g returned in place of a value, and what the error says to return instead."""

from dataclasses import dataclass

import numpy as np
import optree
import pytest
import torch
from helpers import assert_close
from problems import VECTOR
from scipy import optimize
from torch.func import jacrev

import functorch_inverse as fi

X, _, _ = VECTOR.inputs()


@dataclass
class Plain:
    y: torch.Tensor


@optree.dataclasses.dataclass(namespace="")
class Registered:
    y: torch.Tensor


RETURNED = {
    "root": (lambda x: optimize.root(lambda y: np.sinh(y) - x.numpy(), np.zeros(3)), r"return `result\.x`"),
    "root_scalar": (lambda x: optimize.root_scalar(lambda y: y - 1, bracket=(0, 3)), r"return `result\.root`"),
    "a list of numbers": (lambda x: x.asinh().tolist(), r"np\.array"),
    "a dict of numbers": (lambda x: {"y": x.asinh().tolist()}, r"np\.array"),
    "an integer": (lambda x: 3, r"return float\(y\)"),
    "nothing": (lambda x: None, "`return` missing"),
    "a dataclass": (lambda x: Plain(x.asinh()), r"optree\.dataclasses\.dataclass"),
    "text": (lambda x: "y", "a tensor, a floating NumPy array"),
    "an empty list": (lambda x: [], "a tensor, a floating NumPy array"),
}  # fmt: skip


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("rule", ["inverse", "root"])
def test_what_to_return(returned, rule):
    g, text = RETURNED[returned]
    h = fi.custom_inverse(g, torch.sinh) if rule == "inverse" else fi.custom_root(g, lambda y, x: y.sinh() - x)
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(fi.StructureError, match=text):
            h(x)


def test_a_registered_dataclass_is_a_pytree():
    h = fi.custom_inverse(lambda x: Registered(x.asinh()), lambda r: r.y.sinh())
    assert_close(jacrev(lambda x: h(x).y)(X), torch.diag((1 + X * X).rsqrt()))
