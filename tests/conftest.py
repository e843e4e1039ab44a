"""Options and settings of the whole suite."""

import problems
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device of the problems' tensors, for example cuda")


def pytest_configure(config):
    torch.set_num_threads(1)
    problems.DEVICE = torch.device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return problems.DEVICE
