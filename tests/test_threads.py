"""Reverse mode from several threads at once; torch's forward mode is not thread-safe (torch_facts 1.14)."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import all_of, assert_close, every_problem, live, loss, total
from problems import PROBLEMS, VECTOR, Parameters, vector_f, vector_g
from torch.func import grad

import functorch_inverse as fi

THREADS = 8


def plain(h, inputs):
    inputs = live(inputs)
    first = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    return first, torch.autograd.grad(total(first), inputs)


def functional(h, inputs):
    return grad(loss(h), all_of(inputs))(*inputs)


# functional_call itself swaps parameters in place, so it is no case for threads.
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.way != "module"], ids=repr)
@pytest.mark.parametrize("transform", [plain, functional])
def test_one_function_in_many_threads(problem, transform):
    h, exact, seeds = problem.custom(), problem.closed_form(), range(3 * THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda seed: transform(h, problem.inputs(seed)), seeds))
    assert_close(got, [transform(exact, problem.inputs(seed)) for seed in seeds])


@every_problem
def test_backward_in_another_thread_than_forward(problem):
    inputs = live(problem.inputs())
    y = loss(problem.custom())(*inputs)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(torch.autograd.grad, y, inputs).result()
    assert_close(got, torch.autograd.grad(loss(problem.closed_form())(*inputs), inputs))


@pytest.fixture
def hasty_threads():
    """Threads take turns so often that what one does half is seen by the others."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("_", range(5))
def test_one_module_in_many_threads(_, hasty_threads):
    """The rule swaps the module's parameters while f runs, which other threads must not notice."""
    _, *theta = VECTOR.inputs()
    module = Parameters(theta)
    solve = fi.custom_inverse(lambda x: vector_g(x, *module.inner), lambda y: vector_f(y, *module.inner), event_dim=1)

    parameters = tuple(module.parameters())

    def transform(h, seed):
        x = VECTOR.inputs(seed)[0].requires_grad_()
        first = torch.autograd.grad(total((h(x),)), (x, *parameters), create_graph=True)
        return first, torch.autograd.grad(total(first), (x, *parameters))

    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda seed: transform(solve, seed), range(3 * THREADS)))
    exact = lambda x: VECTOR.exact(x, *module.inner)  # noqa: E731
    assert_close(got, [transform(exact, seed) for seed in range(3 * THREADS)])
