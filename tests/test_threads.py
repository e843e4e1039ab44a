"""Reverse mode from several threads at once; torch's forward mode is not thread-safe (torch_facts 1.14)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import all_of, assert_close, every_problem, live, loss, total
from torch.func import grad

THREADS = 8


def plain(h, inputs):
    inputs = live(inputs)
    first = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    return first, torch.autograd.grad(total(first), inputs)


def functional(h, inputs):
    return grad(loss(h), all_of(inputs))(*inputs)


@every_problem
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
