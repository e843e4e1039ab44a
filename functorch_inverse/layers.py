"""The original layer: batch first, one Jacobian a sample, evidence as a function or as a Jacobian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse.custom import custom_inverse, custom_jacobian
from functorch_inverse.errors import NoDerivativeError

__all__ = ["ImplicitInverseLayer", "ImplicitInverseLayerAuto", "implicit_inverse_layer"]

TensorFunction: TypeAlias = Callable[[Tensor], Tensor]

_CALLER = "implicit_inverse_layer"


def implicit_inverse_layer(
    x: Tensor,
    inverse_func: Callable[[Tensor], Any],
    *,
    forward_func: TensorFunction | None = None,
    forward_jacobian: Tensor | TensorFunction | None = None,
    check: bool | float = False,
) -> Tensor:
    r"""y = inverse_func(x) with the derivative that the inverse function theorem gives.

    .. math:: f(y) = x \;\Rightarrow\; \partial y / \partial x = J_f(y)^{-1}

    Args:
        x: shape (batch, *event). A 1-d x is taken as one sample, which is right for a vector as for a
            batch of independent numbers; a 0-d x is one number.
        inverse_func: the black box, x to y of shape (batch, *event); called once.
        forward_func: f, from y back to x, made of differentiable torch operations. Gradients also reach
            the parameters and tensors that it closes over.
        forward_jacobian: instead of f its Jacobian at y, shape (batch, *x_event, *y_event); either a tensor or
            a function of y. For a 1-d x also (n,), the derivatives of n independent numbers.
        check: compare forward_func(y) with x, as in `custom_inverse`.

    Returns:
        y, differentiable to any order, except that a Jacobian given as a tensor is a constant: differentiating
        a second time raises an error.

    Raises:
        ValueError: not exactly one of forward_func and forward_jacobian; check without forward_func.
        SingularJacobianError: the Jacobian of some samples has no inverse; the error names them.
        NoDerivativeError: a second derivative of a Jacobian given as a tensor, or a Jacobian function that
            closes over something live, whose derivative it cannot know.

    Example:
        >>> data = torch.tensor([[0.1, -0.2], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
        >>> y = implicit_inverse_layer(data, torch.asin, forward_func=torch.sin)
        >>> (gradient,) = torch.autograd.grad(y.sum(), data)
        >>> torch.allclose(gradient, 1 / (1 - data**2).sqrt())
        True

    Source: Krantz and Parks, The Implicit Function Theorem (2002), theorem 3.3.1.
    """
    if (forward_func is None) == (forward_jacobian is None):
        raise ValueError(
            f"`{_CALLER}`: exactly one of `forward_func` and `forward_jacobian` is needed, "
            f"{'neither' if forward_func is None else 'both'} arrived. Pass the inverse of inverse_func as forward_func, "
            "or its Jacobian as forward_jacobian."
        )
    event_dim = x.ndim - 1 if x.ndim > 1 else None
    if forward_func is None:
        if check is not False:
            raise ValueError(f"`{_CALLER}`: `check` compares forward_func(y) with x; pass forward_func to use it.")
        forward_func = _from_jacobian(x, forward_jacobian)
    # One call a sample under vmap: a batch-first function need not take more leading dims.
    layer = custom_inverse(inverse_func, forward_func, event_dim=event_dim, vmap_method="sequential", check=check)
    return layer(x)


def _from_jacobian(x: Tensor, jacobian: Any) -> TensorFunction:
    """A stand-in for f: nobody looks at its values, and its derivative is the Jacobian."""
    if isinstance(jacobian, Tensor) and torch.compiler.is_dynamo_compiling() and _torch.derivative_order() > 1:
        # A trace cannot tell whether the second derivative will be asked for.
        _refuse()
    event_dim = None if x.ndim < 2 else x.ndim - 1
    evidence = _Constant(jacobian.detach(), x.shape) if isinstance(jacobian, Tensor) else _Shaped(jacobian, x.shape)
    return custom_jacobian(_Zeros(x.shape), evidence, event_dim=event_dim)


@dataclass(frozen=True)
class _Zeros:
    shape: torch.Size

    def __call__(self, y: Tensor) -> Tensor:
        return y.new_zeros((*y.shape[: y.ndim - len(self.shape)], *self.shape))


@dataclass(frozen=True, eq=False)
class _Shaped:
    """A Jacobian function; that of independent numbers becomes a diagonal matrix."""

    jacobian: TensorFunction
    shape: torch.Size

    def __call__(self, y: Tensor) -> Tensor:
        return _as_matrix(self.jacobian(y), self.shape)


@dataclass(frozen=True, eq=False)
class _Constant:
    """A Jacobian given as a tensor, which nobody may differentiate."""

    jacobian: Tensor
    shape: torch.Size

    def __call__(self, y: Tensor) -> Tensor:
        # A trace has made sure that no second derivative is asked for, and refuses a Function with a jvp.
        tracing = torch.compiler.is_dynamo_compiling()
        return _as_matrix(self.jacobian if tracing else _NotDifferentiable.apply(self.jacobian, y), self.shape)


def _as_matrix(jacobian: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 1 and jacobian.shape in ((shape[0],), (shape[0], 1, 1)):
        return torch.diag_embed(jacobian.reshape(shape))
    return jacobian.reshape(()) if not shape and jacobian.numel() == 1 else jacobian


class _NotDifferentiable(Function):
    """A tensor that depends on y in an unknown way."""

    @staticmethod
    def forward(jacobian: Tensor, y: Tensor) -> Tensor:
        return jacobian.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        _refuse()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        _refuse()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], jacobian: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        y = y if in_dims[1] is None else y.movedim(in_dims[1], 0)
        return _NotDifferentiable.apply(jacobian, y), in_dims[0]


def _refuse() -> None:
    raise NoDerivativeError(
        f"`{_CALLER}`: a second derivative needs to know how the Jacobian changes with y, and it was given as a tensor. "
        "Pass forward_jacobian as a function of y, or forward_func."
    )


class ImplicitInverseLayer:
    """The layer with a Jacobian: ImplicitInverseLayer.apply(x, inverse_func, forward_jacobian)."""

    @staticmethod
    def apply(x: Tensor, inverse_func: TensorFunction, forward_jacobian: Tensor | TensorFunction) -> Tensor:
        """`implicit_inverse_layer` with forward_jacobian."""
        return implicit_inverse_layer(x, inverse_func, forward_jacobian=forward_jacobian)


class ImplicitInverseLayerAuto:
    """The layer with a function: ImplicitInverseLayerAuto.apply(x, inverse_func, forward_func)."""

    @staticmethod
    def apply(x: Tensor, inverse_func: TensorFunction, forward_func: TensorFunction) -> Tensor:
        """`implicit_inverse_layer` with forward_func."""
        return implicit_inverse_layer(x, inverse_func, forward_func=forward_func)
