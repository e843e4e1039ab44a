from functorch_inverse.custom import custom_inverse as custom_inverse
from functorch_inverse.custom import custom_jacobian as custom_jacobian
from functorch_inverse.errors import *
from functorch_inverse.jacobians import batch_jacobian as batch_jacobian
from functorch_inverse.linear_solvers import LU as LU
