"""The error family. Every text says what arrived, what is needed and what to do instead."""

import torch

__all__ = [
    "BlackBoxError",
    "BracketError",
    "DerivativeError",
    "FunctorchInverseError",
    "NoDerivativeError",
    "NotConvergedError",
    "ResidualError",
    "SingularJacobianError",
    "StructureError",
]


class FunctorchInverseError(Exception):
    """The base of all errors raised by this package."""


class StructureError(FunctorchInverseError, ValueError):
    """Structures, shapes or dtypes do not fit together."""


class SingularJacobianError(FunctorchInverseError, torch.linalg.LinAlgError):  # type: ignore[name-defined]
    """The Jacobian of some samples has no inverse, so their derivative does not exist."""


class NoDerivativeError(FunctorchInverseError, RuntimeError):
    """A derivative was asked for that nothing is known about, or that would be lost."""


class NotConvergedError(FunctorchInverseError, RuntimeError):
    """An iteration ended before it reached its tolerance; the text names the samples and what they reached."""


class BracketError(NotConvergedError):
    """No two points were found between which f(y) - x changes its sign."""


class BlackBoxError(FunctorchInverseError, RuntimeError):
    """A black box raised an error under one sample of a batch; the text names the sample."""


class ResidualError(FunctorchInverseError, ValueError):
    """The evidence does not belong to the black box: f(g(x)) is not x."""


class DerivativeError(FunctorchInverseError, ValueError):
    """The derivative of the evidence disagrees with finite differences of the black box."""
