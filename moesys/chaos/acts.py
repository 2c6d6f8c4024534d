"""What a rank does to itself for each kind of fault. An act says what it will do, and does it when called."""

import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesys.chaos import cut, disk
from moesys.chaos.faults import Fault
from moesys.checkpoint import folder as folders
from moesys.ops.shard import local_tensor
from moesys.parallel.gradients import lies_with_experts
from moesys.train.agent import find_agent
from moesys.train.trainer import Trainer

_CHECKPOINT_PATIENCE_S = 60.0


class ChaosError(RuntimeError):
    """The fault `exception`."""


Act = tuple[str, Callable[[], object]]
"""What, for the record, and the deed."""


def act_of(fault: Fault, trainer: Trainer) -> Act:
    """What `fault` is on this rank now."""
    return _ACTS[fault.kind](fault, trainer)


def problem_here(fault: Fault, checkpoints: Path) -> str | None:
    """Why this machine cannot have `fault`; None if it can."""
    if fault.kind == "agent" and find_agent(os.environ) is None:
        return f"{str(fault)!r}: torchrun did not start this rank: start the job with launch/run.sh"
    if fault.kind == "partition" and (reason := cut.why_not()):
        return f"{str(fault)!r}: {reason}"
    if fault.kind == "read_only" and not disk.is_small_mount(checkpoints):
        return (
            f"{str(fault)!r}: {checkpoints} is no file system of its own: `moesys chaos` makes it one, which "
            "takes root"
        )
    return None


def _kill(fault: Fault, trainer: Trainer) -> Act:
    return "SIGKILL", lambda: os.kill(os.getpid(), signal.SIGKILL)


def _agent(fault: Fault, trainer: Trainer) -> Act:
    agent = find_agent(os.environ)
    assert agent is not None, "told by problem_here"
    return f"SIGKILL to process {agent.pid}", lambda: os.kill(agent.pid, signal.SIGKILL)


def _stop(fault: Fault, trainer: Trainer) -> Act:
    def stop() -> None:
        if fault.seconds:
            disk.wake_later(os.getpid(), fault.seconds)
        os.kill(os.getpid(), signal.SIGSTOP)

    return "SIGSTOP", stop


def _exception(fault: Fault, trainer: Trainer) -> Act:
    def fail() -> None:
        raise ChaosError(f"chaos: {fault}")

    return f"an error in thread {threading.current_thread().name}", fail


def _slow(fault: Fault, trainer: Trainer) -> Act:
    return f"asleep for {fault.seconds:g} s", lambda: time.sleep(fault.seconds or 0.0)


def _partition(fault: Fault, trainer: Trainer) -> Act:
    return f"deaf for {fault.seconds:g} s", lambda: cut.cut(fault.seconds or 0.0)


def _disk_full(fault: Fault, trainer: Trainer) -> Act:
    seconds, directory = fault.seconds or 0.0, trainer.saver.directory
    if disk.is_small_mount(directory):
        return f"{directory} is full", lambda: disk.fill(directory, seconds)
    return "a quota on file sizes", lambda: disk.set_quota(trainer.run.folder, seconds)


def _read_only(fault: Fault, trainer: Trainer) -> Act:
    directory = trainer.saver.directory
    return f"{directory} is read-only", lambda: disk.make_read_only(directory, fault.seconds or 0.0)


def _corrupt_checkpoint(fault: Fault, trainer: Trainer) -> Act:
    file = _newest_shard(trainer.saver.directory)
    size_bytes = file.stat().st_size
    draw = _draw(fault)
    offset = size_bytes // 2 + draw % (size_bytes - size_bytes // 2)  # not in the header
    bit = draw // size_bytes % 8

    def damage_and_die() -> None:
        with file.open("r+b") as shard:
            shard.seek(offset)
            (byte,) = shard.read(1)
            shard.seek(offset)
            shard.write(bytes([byte ^ 1 << bit]))
        os.kill(os.getpid(), signal.SIGKILL)

    return f"bit {bit} of byte {offset} of {file.parent.name}/{file.name}, SIGKILL", damage_and_die


def _newest_shard(directory: Path) -> Path:
    """The largest file of the newest checkpoint, once there is one: the first may be on its way."""
    until_s = time.monotonic() + _CHECKPOINT_PATIENCE_S
    while (newest := folders.latest(directory)) is None:
        if time.monotonic() > until_s:
            raise ChaosError(
                f"chaos: no checkpoint to damage in {directory} after {_CHECKPOINT_PATIENCE_S:g} s: name a "
                "later step"
            )
        time.sleep(0.01)
    return max(newest.glob("*.safetensors"), key=lambda path: (path.stat().st_size, path.name))


@torch.no_grad()
def _nan(fault: Fault, trainer: Trainer) -> Act:
    gradients = {
        name: local_tensor(parameter.grad)
        for name, parameter in trainer.run.model.named_parameters()
        if parameter.grad is not None
    }
    name, gradient, index = _element(fault, gradients)
    return f"gradient of {name} at {list(index)}", lambda: _set(gradient, index, float("nan"))


@torch.no_grad()
def _bit_flip(fault: Fault, trainer: Trainer) -> Act:
    # Of what every data rank has: nobody else holds what ep ranks share out, to compare.
    parameters = {
        name: local_tensor(parameter).detach()
        for name, parameter in trainer.run.model.named_parameters()
        if not lies_with_experts(name)
    }
    name, parameter, index = _element(fault, parameters)
    num_bits = 8 * parameter.element_size()
    bit = _draw(fault) // 7 % num_bits
    return (
        f"bit {bit} of {name} at {list(index)}",
        lambda: flip_bit(parameter, index, bit),
    )


@torch.no_grad()
def flip_bit(tensor: Tensor, index: tuple[int, ...], bit: int) -> None:
    """Flip one bit of one element of a floating tensor in place; bit 0 is the last of the mantissa."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    num_bits = 8 * tensor.element_size()
    bits = tensor.view(integers[tensor.element_size()])
    # The sign bit of a two's complement number.
    bits[index] ^= -(1 << bit) if bit == num_bits - 1 else 1 << bit


@torch.no_grad()
def _set(tensor: Tensor, index: tuple[int, ...], value: float) -> None:
    tensor[index] = value


def _element(fault: Fault, tensors: Mapping[str, Tensor]) -> tuple[str, Tensor, tuple[int, ...]]:
    """One element of those that this rank holds."""
    names = sorted(name for name, tensor in tensors.items() if tensor.numel())
    if not names:
        raise ChaosError(f"chaos: rank {fault.rank} holds nothing for {str(fault)!r}")
    draw = _draw(fault)
    name = names[draw % len(names)]
    tensor = tensors[name]
    flat = draw // len(names) % tensor.numel()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))
    return name, tensor, index


def _draw(fault: Fault) -> int:
    """A number by chance, always the same for the same fault."""
    return zlib.crc32(str(fault).encode()) << 32 | zlib.crc32(repr(fault).encode())


_ACTS: Mapping[str, Callable[[Fault, Trainer], Act]] = {
    "kill": _kill,
    "stop": _stop,
    "exception": _exception,
    "slow": _slow,
    "partition": _partition,
    "disk_full": _disk_full,
    "read_only": _read_only,
    "corrupt_checkpoint": _corrupt_checkpoint,
    "agent": _agent,
    "nan": _nan,
    "bit_flip": _bit_flip,
}
