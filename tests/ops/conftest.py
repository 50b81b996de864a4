"""Fixtures: every implementation of the kernels."""

import pytest

from outrider.ops.base import Ops
from tests.kernels import ALL_KERNELS, CPU_FLAGS, make_ops


@pytest.fixture(scope="session", params=ALL_KERNELS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """Every implementation in turn."""
    return make_ops(request.param)


@pytest.fixture(scope="session", params=CPU_FLAGS)
def cpu(request: pytest.FixtureRequest) -> Ops:
    """The C++ kernels, built for each instruction set they know."""
    return make_ops(request.param)
