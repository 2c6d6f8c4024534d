"""What the shim answers, and that nothing of it stays."""

import os

import torch
import torch.distributed as dist

from tests.oracles.shim import cuda_on_cpu


def _current() -> tuple[object, ...]:
    cuda = torch.cuda
    return cuda.Stream, cuda.Event, cuda.current_device, cuda.synchronize, dist.all_to_all_single


def test_cuda_is_the_cpu_inside_and_itself_after() -> None:
    before, type_name = _current(), torch.zeros(1).type()
    environment = dict(os.environ)
    with cuda_on_cpu():
        x = torch.zeros(2, device="cuda")
        assert x.device.type == x.cuda().device.type == x.to("cuda").device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_stream() == torch.cuda.Stream()
        torch.cuda.Stream().record_event().synchronize()
    assert _current() == before
    assert torch.zeros(1).type() == type_name
    assert dict(os.environ) == environment
