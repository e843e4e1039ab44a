"""The example of every public function runs as written."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import functorch_inverse

MODULES = [m.name for m in pkgutil.iter_modules(functorch_inverse.__path__) if m.name != "__main__"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"functorch_inverse.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_every_public_function_has_an_example():
    public = [v for k, v in vars(functorch_inverse).items() if callable(v) and k.islower() and not k.startswith("_")]
    assert len(public) >= 8
    missing = [f.__name__ for f in public if ">>>" not in (f.__doc__ or "") and f.__name__ != "check_derivatives"]
    assert not missing
