r"""What all Krylov solvers share: their options, the way from (*lead, n) to rounds of a method and back, and their errors."""

import threading
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._preconditioner import Apply, Preconditioner, identity, prepare
from functorch_inverse._systems import Ahead, LinearSolution, Maps, Round, Systems, conjugated, flattened, named, norm, refine
from functorch_inverse.errors import NotConvergedError

__all__ = ["Krylov"]


class _Memory:
    """The last solutions, one for each shape, dtype, device and direction; copies and pickles begin empty."""

    limit: ClassVar[int] = 16

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Memory, ()

    def recall(self, b: Tensor, transpose: bool) -> Tensor | None:
        with self._lock:
            return self._kept.get((b.shape, b.dtype, b.device, transpose))

    def keep(self, value: Tensor, transpose: bool) -> None:
        key = (value.shape, value.dtype, value.device, transpose)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = value
            if len(self._kept) > self.limit:
                del self._kept[next(iter(self._kept))]


@dataclass(frozen=True, eq=False, kw_only=True)
class Krylov:
    r"""What the matrix-free solvers share: :math:`\|b - A u\| \le \max(\text{rtol}\,\|b\|, \text{atol})` for each system.

    Args:
        rtol, atol: the tolerances; `rtol=None` is 1e-10 in float64 and 1e-6 in float32, or where A is so ill-conditioned
            that rounding forbids it the residual that a direct solver would leave, :math:`8 \epsilon \|A\| \|u\|`.
        max_steps: the most steps of one system; None is 10 n, and at least 100.
        preconditioner: an approximate inverse M, see `apply_preconditioner`.
        on_failure: "raise" gives a `NotConvergedError`, "warn" a RuntimeWarning and what was reached.
        warm_start: begin at the last solution of a system of the same shape, dtype, device and direction.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Preconditioner = None
    on_failure: Literal["raise", "warn"] = "raise"
    warm_start: bool = False
    _memory: _Memory = field(default_factory=_Memory, init=False, compare=False, repr=False)

    # What a round of the method must bring the residual down by, so as not to count as a failure.
    _progress: ClassVar[float] = 0.5
    _hint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.on_failure not in ("raise", "warn"):
            raise ValueError(f"`{name}`: `on_failure` is {self.on_failure!r}; choose 'raise' or 'warn'.")
        if not (self.atol >= 0 and (self.rtol is None or self.rtol >= 0)):
            raise ValueError(f"`{name}`: rtol={self.rtol}, atol={self.atol}; tolerances are numbers >= 0.")
        if not (self.preconditioner is None or isinstance(self.preconditioner, Tensor) or callable(self.preconditioner)):
            raise ValueError(
                f"`{name}`: `preconditioner` is {self.preconditioner!r}; pass a callable v -> M v, a tensor (n,) or (n, n), "
                "or None."
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"`{name}`: `max_steps` is {self.max_steps}; it must be at least 1, or None for 10 n.")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(map(_same, self._options(), other._options()))

    def __hash__(self) -> int:
        return hash((type(self), *(v.shape if isinstance(v, Tensor) else v for v in self._options())))

    def _options(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self) if f.compare]

    @torch.no_grad()
    def run(
        self, mv: Apply, b: Tensor, *, transposed: Apply | None = None, init: Tensor | None = None, transpose: bool = False
    ) -> LinearSolution:
        r"""u with :math:`A u = b` for each leading index.

        Args:
            mv: v -> A v, of (\*lead, n) to (\*lead, n), where no leading index touches another.
            b: shape (\*lead, n).
            transposed: v -> A^T v in the same way. `NormalCG` needs it; `CG` checks with it that A is symmetric.
            init: where to begin, shape (\*lead, n).
            transpose: A is itself the transpose of what `preconditioner` inverts: use M^T.

        Returns:
            A `LinearSolution` (value, converged, steps, residual). Systems in which A, M or b have nan or inf are nan.

        Raises:
            NotConvergedError: names the flat indices of the systems that missed their tolerance (unless "warn").
            StructureError: a map or a preconditioner does not fit b, or A is not what the method needs.
        """
        self._look(b)
        b = b.detach()
        if not b.numel():
            return _nothing(b)
        return self._solution(self._systems(mv, b, transposed, init, transpose), b.shape, transpose)

    @torch.no_grad()
    def value(
        self, mv: Apply, b: Tensor, *, transposed: Apply | None = None, transpose: bool = False, ahead: Ahead | None = None
    ) -> Tensor:
        r"""u with :math:`A u = b` alone, for each leading index: all may move together, which takes less than to watch each.

        Args:
            mv, b, transposed, transpose: as for `run`.
            ahead: (b, u) -> b + u - A u of (\*lead, n), where it costs less than A u.

        Returns:
            u of b's shape, with the residuals that `run` promises; nan as there.

        Raises:
            NotConvergedError, StructureError: as `run` does.
        """
        self._look(b)
        b = b.detach()
        if not b.numel():
            return b.clone()
        systems = self._systems(mv, b, transposed, None, transpose, ahead)
        if not self._together(systems):
            return self._solution(systems, b.shape, transpose).value
        value = systems.value().reshape(b.shape)
        if self.warm_start:
            self._memory.keep(value.clone(), transpose)
        return value

    def _solution(self, systems: Systems, shape: torch.Size, transpose: bool) -> LinearSolution:
        refine(systems, self._round(), self._progress)
        solution = self._report(systems, shape)
        if self.warm_start and bool(solution.converged.all()):
            self._memory.keep(solution.value.clone(), transpose)
        return solution

    def _look(self, b: Tensor) -> None:
        """Whether there are values to look at."""
        if not _torch.can_inspect(b):
            raise NotImplementedError(
                f"`{type(self).__name__}`: an iteration looks at values, which meta tensors and a trace (torch.func.linearize, "
                "make_fx, export, CUDA graph capture) do not have. Use a direct solver such as LU()."
            )

    def _systems(
        self,
        mv: Apply,
        b: Tensor,
        transposed: Apply | None,
        init: Tensor | None,
        transpose: bool,
        ahead: Ahead | None = None,
    ) -> Systems:
        M = self.preconditioner
        maps = Maps(
            flattened(mv, b.shape, "mv"),
            None if transposed is None else conjugated(flattened(transposed, b.shape, "transposed")),
            flattened(prepare(M, b, transpose), b.shape, "preconditioner"),
            conjugated(flattened(self._other_side(b, not transpose), b.shape, "preconditioner")),
            None if M is not None else ahead if ahead is None or b.ndim == 2 else flattened(ahead, b.shape, "mv"),
        )
        init = self._memory.recall(b, transpose) if init is None and self.warm_start else init
        if init is not None:
            init = init.detach().to(b.dtype).expand(b.shape).reshape(-1, b.shape[-1])
        rtol = (1e-10 if torch.finfo(b.dtype).eps < 1e-10 else 1e-6) if self.rtol is None else self.rtol
        steps = max(100, 10 * b.shape[-1]) if self.max_steps is None else self.max_steps
        systems = Systems(maps, b.reshape(-1, b.shape[-1]), init, (rtol, self.atol), steps)
        self._check(systems)
        return systems

    def _other_side(self, b: Tensor, transpose: bool) -> Apply:
        """v -> M^T v, for the methods that use it."""
        return identity

    def _check(self, systems: Systems) -> None:
        """Whether A is what the method needs."""

    def _together(self, systems: Systems) -> bool:
        """Whether all are solved by what is cheap where nobody asks for the steps of each."""
        return False

    def _round(self) -> Round:
        raise NotImplementedError

    def _report(self, s: Systems, shape: torch.Size) -> LinearSolution:
        converged = s.residual.isfinite() & (s.residual <= s.target)
        if not converged.all():
            undefined = s.undefined()
            s.u.masked_fill_(undefined.unsqueeze(-1), torch.nan)
            s.residual = s.residual.masked_fill(undefined, torch.nan)
            if self.rtol is None:
                converged = converged | s.at_rounding()
            converged = converged & ~undefined
            self._complain(s, ~(converged | undefined))
        size = s.residual if s.scale is None else s.residual * s.scale
        return LinearSolution(s.value().reshape(shape), *(t.reshape(shape[:-1]) for t in (converged, s.steps, size)))

    def _complain(self, s: Systems, failed: Tensor) -> None:
        which = failed.nonzero().flatten()
        if not which.numel():
            return
        reached = (s.residual / norm(s.b))[which[:10]].tolist()
        text = (
            f"`{type(self).__name__}`: {len(which)} of {failed.numel()} linear systems did not reach rtol={s.rtol:g}, "
            f"atol={self.atol:g} within {s.max_steps} steps (flat indices over all leading dims: {named(which)}; relative "
            f"residuals reached: {', '.join(f'{r:.2e}' for r in reached)}). {self._advice(s, which)}"
        )
        if self.on_failure == "raise":
            raise NotConvergedError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=6)  # past the no_grad of `run`

    def _advice(self, s: Systems, which: Tensor) -> str:
        return (
            f"Likely causes: A is singular or too ill-conditioned for the tolerance; {self._hint}. Give a `preconditioner`, "
            "more `max_steps` or a larger `rtol`, or use linear_solver=LU() where A fits into memory."
        )


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b))
    return bool(a == b)


def _nothing(b: Tensor) -> LinearSolution:
    residual = norm(b)
    return LinearSolution(b.clone(), residual == 0, residual.long(), residual)
