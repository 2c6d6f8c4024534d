"""Tests of an op run on the CPU and, where there is one, on the GPU."""

import pytest
import torch

from moesys.ops import library


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    # Without the compiled op a test would compare the reference to itself.
    assert library.runs_on(torch.empty(0, device=request.param)), library.status()
    return request.param
