"""What a forward leaves in memory, whoever keeps it: autograd, a checkpoint or a memory of decisions."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesys.ops.shard import local_tensor


class LiveBytes(TorchDispatchMode):
    """Within, sees every storage that an op makes; `total` are the bytes of those that live, `known` ones not."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self.made: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A DTensor's own storage is a shape without bytes; its local tensor comes by itself.
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self.made.add(StorageWeakRef(leaf.untyped_storage()))
        return out

    @property
    def total(self) -> int:
        made = self.made - self.known
        storages = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in made)
        return sum(storage.nbytes() for storage in storages if storage is not None)


class PeakBytes(LiveBytes):
    """Within, also the most that lived after any op; `counted` tensors are there from the start."""

    def __init__(
        self, known: Iterable[torch.Tensor] = (), counted: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__(known)
        self.made |= {StorageWeakRef(tensor.untyped_storage()) for tensor in counted}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.made = {ref for ref in self.made if not ref.expired()}
        self.peak = max(self.peak, self.total)
        return out


def peak_of_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], object],
    known: Iterable[torch.Tensor] = (),
) -> int:
    """The most that lives while `step` runs, parameters and the optimizer's states among it, `known` tensors not."""
    gc.collect()
    tensors = (*model.parameters(), *state_tensors(optimizer))
    with PeakBytes(known, counted=[local_tensor(tensor.detach()) for tensor in tensors]) as live:
        step()
    return live.peak


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All of them, as they are."""
    return [tensor for state in optimizer.state.values() for tensor in state.values()]
