"""gradcheck and gradgradcheck with every flag: against finite differences of the black box itself."""

import pytest
import torch
from helpers import every_batchable_problem, every_problem, live, some_problems, with_batch
from torch.autograd import gradcheck, gradgradcheck

FIRST = [
    {},
    {"fast_mode": True},
    {"check_forward_ad": True},
    {"check_forward_ad": True, "check_backward_ad": False},
    {"check_forward_ad": True, "fast_mode": True},
    {"check_batched_grad": True},
    {"check_undefined_grad": False},
    {"check_forward_ad": True, "check_batched_forward_grad": True, "check_batched_grad": True},
]
SECOND = [
    {},
    {"fast_mode": True},
    {"check_batched_grad": True},
    {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False},
    {"check_fwd_over_rev": True, "fast_mode": True},
    {"gen_non_contig_grad_outputs": True},
]


def named(flags):
    return "+".join(f"{k}={v}" for k, v in flags.items()) or "default"


@every_problem
@pytest.mark.parametrize("flags", FIRST, ids=named)
def test_gradcheck(problem, flags):
    assert gradcheck(problem.custom(), live(problem.inputs()), **flags)


@every_batchable_problem
def test_gradcheck_with_leading_batch_dims(problem):
    assert gradcheck(problem.custom(), live(with_batch(problem, 2)), check_forward_ad=True, check_batched_grad=True)


@some_problems
@pytest.mark.parametrize("flags", SECOND, ids=named)
def test_gradgradcheck(problem, flags):
    assert gradgradcheck(problem.custom(), live(problem.inputs()), **flags)


@some_problems
def test_gradcheck_of_vmap(problem):
    assert gradcheck(torch.vmap(problem.custom()), live(problem.stacked(2)), check_batched_grad=True)
