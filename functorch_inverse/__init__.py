"""Differentiate what autograd cannot see, by what you know about it.

What do you know about your black box?
    its inverse                  custom_inverse(g, f)
    an equation that it solves   custom_root(solve, residual)
    a map that it leaves fixed   custom_fixed_point(solve, step)
    its Jacobian                 custom_jacobian(fn, jacobian)
    only its values              finite_difference(fn)
You have f, and no g at all?
                                 invert(f), InverseModule(module); by Newton, Chandrupatla, FixedPoint
How do I call NumPy and the like on tensors?
                                 black_box(fn)
Which Jacobian, and how is it solved with?
                                 batch_jacobian, numerical_jacobian, log_abs_det_jacobian
    directly                     LU, Cholesky, Triangular, LeastSquares, Banded
    by products with vectors     CG, NormalCG, GMRES, BiCGStab
Is it right?
                                 check_inverse, check_derivatives
The original layer:
                                 implicit_inverse_layer, ImplicitInverseLayer, ImplicitInverseLayerAuto
"""

from functorch_inverse.banded import Banded as Banded
from functorch_inverse.black_box import black_box as black_box
from functorch_inverse.custom import custom_inverse as custom_inverse
from functorch_inverse.custom import custom_jacobian as custom_jacobian
from functorch_inverse.errors import BlackBoxError as BlackBoxError
from functorch_inverse.errors import BracketError as BracketError
from functorch_inverse.errors import DerivativeError as DerivativeError
from functorch_inverse.errors import FunctorchInverseError as FunctorchInverseError
from functorch_inverse.errors import NoDerivativeError as NoDerivativeError
from functorch_inverse.errors import NotConvergedError as NotConvergedError
from functorch_inverse.errors import ResidualError as ResidualError
from functorch_inverse.errors import SingularJacobianError as SingularJacobianError
from functorch_inverse.errors import StructureError as StructureError
from functorch_inverse.finite_difference import finite_difference as finite_difference
from functorch_inverse.finite_difference import numerical_jacobian as numerical_jacobian
from functorch_inverse.inverse_module import InverseModule as InverseModule
from functorch_inverse.invert import invert as invert
from functorch_inverse.inverters import Chandrupatla as Chandrupatla
from functorch_inverse.inverters import FixedPoint as FixedPoint
from functorch_inverse.inverters import Newton as Newton
from functorch_inverse.jacobians import batch_jacobian as batch_jacobian
from functorch_inverse.jacobians import log_abs_det_jacobian as log_abs_det_jacobian
from functorch_inverse.krylov import CG as CG
from functorch_inverse.krylov import GMRES as GMRES
from functorch_inverse.krylov import BiCGStab as BiCGStab
from functorch_inverse.krylov import NormalCG as NormalCG
from functorch_inverse.layers import ImplicitInverseLayer as ImplicitInverseLayer
from functorch_inverse.layers import ImplicitInverseLayerAuto as ImplicitInverseLayerAuto
from functorch_inverse.layers import implicit_inverse_layer as implicit_inverse_layer
from functorch_inverse.linear_solvers import LU as LU
from functorch_inverse.linear_solvers import Cholesky as Cholesky
from functorch_inverse.linear_solvers import LeastSquares as LeastSquares
from functorch_inverse.linear_solvers import Triangular as Triangular
from functorch_inverse.roots import custom_fixed_point as custom_fixed_point
from functorch_inverse.roots import custom_root as custom_root
from functorch_inverse.testing import check_derivatives as check_derivatives
from functorch_inverse.testing import check_inverse as check_inverse

__version__ = "0.1.0"
