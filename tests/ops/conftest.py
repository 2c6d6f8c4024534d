"""Every test of an op runs on the CPU and, where there is one, on the GPU."""

import pytest
import torch

from moesys.ops import library

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request: pytest.FixtureRequest) -> str:
    # Without the compiled op a test would compare the reference to itself.
    assert library.runs_on(torch.empty(0, device=request.param)), library.status()
    return request.param
