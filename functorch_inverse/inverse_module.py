"""A module that runs another one backwards."""

from typing import Any

from torch import nn

from functorch_inverse._iterate import Inverter
from functorch_inverse._solvers import SolverLike
from functorch_inverse._tree import Tree
from functorch_inverse.invert import Inverted, invert

__all__ = ["InverseModule"]


class InverseModule(nn.Module):
    r"""The inverse of a module, as a module with the same parameters.

    .. math:: y = \mathrm{module}^{-1}(x), \qquad
              \frac{\partial y}{\partial \theta} = -A^{-1} \frac{\partial\, \mathrm{module}(y)}{\partial \theta}

    Training it trains the parameters of `module`, which are its own: in its state_dict their names start with
    "module.", as in DistributedDataParallel. An InverseModule of an InverseModule runs the inner module itself,
    where no inverter or linear_solver is asked for.

    The search runs `module` many times, so what changes with each run has no inverse: dropout and batch norm are
    refused in train mode, call eval() on them. Under torch.func.functional_call a module must not stand beside its
    inverse: torch swaps twice what is registered twice.

    Args:
        module: maps y, and further arguments, to x; one to one.
        event_dim, out_event_dim, inverter, linear_solver: as for `invert`.

    Shape:
        x: (*batch, *event), or a pytree as `module` returns it. y: what `module` takes, of the same size a sample.

    Raises:
        TypeError: `module` is no nn.Module.

    What else is raised, when called, stands in `invert`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> linear = torch.nn.Linear(3, 3)
        >>> inverse = InverseModule(linear, event_dim=1)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(linear(inverse(x)), x, atol=1e-5)
        True
        >>> inverse(x).sum().backward()
        >>> linear.weight.grad.shape
        torch.Size([3, 3])

    Source: as for `invert`; Behrmann et al., Invertible Residual Networks (2019).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        event_dim: Tree = None,
        out_event_dim: Tree = None,
        inverter: Inverter | None = None,
        linear_solver: SolverLike = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"`InverseModule`: `module` is {module!r}; an nn.Module is needed, or use invert() for a function.")
        self.module = module
        self.event_dim, self.out_event_dim = event_dim, out_event_dim
        self.inverter, self.linear_solver = inverter, linear_solver
        self._inverse()  # options are checked here

    def extra_repr(self) -> str:
        """The options that were given."""
        names = ("event_dim", "out_event_dim", "inverter", "linear_solver")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None)

    def forward(self, x: Tree, *args: Tree, init: Tree = None) -> Tree:
        """y with module(y, *args) = x; the search starts at init, which is not needed where `module` is an inverse itself."""
        inverse = self._inverse()
        return inverse(x, *args, init=init) if isinstance(inverse, Inverted) else inverse(x, *args)

    def _inverse(self) -> Any:
        options: dict[str, Any] = {"inverter": self.inverter, "linear_solver": self.linear_solver}
        dims = {"event_dim": self.event_dim, "out_event_dim": self.out_event_dim}
        inner = self.module
        if isinstance(inner, InverseModule):
            direct = inner._inverse()
            inverse = invert(direct, **options, **dims) if isinstance(direct, Inverted) else None
            if inverse is not None and not isinstance(inverse, Inverted):
                return inverse
        return invert(inner, **options, **dims)
