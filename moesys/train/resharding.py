"""Experts that change their owner, with their optimizer states: an exchange that was planned, checked by hashes.

Shapes: E experts of a layer, O own experts of this rank, P ranks of the expert group, X what one expert has of a tensor.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.moe.copy_set import PARAMETERS
from moesys.moe.layer_placement import LayerPlacement
from moesys.plan.placement import Integers
from moesys.train.replicas import device_hash


def reshard(
    layers: Mapping[int, LayerPlacement],
    owners: Mapping[int, Integers],
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup,
) -> int:
    """Give each of these layers its new owners [E], between two steps; return the bytes that this rank sent to others.
    Collective in `group`, whose ranks are the owners.

    Raises:
        RuntimeError: the same on all ranks of the group, if any number arrived otherwise than it was sent.
    """
    sent_bytes = 0
    for index, layer in layers.items():
        before_E, after_E = layer.owner_E, owners[index]
        if np.array_equal(before_E, after_E):
            continue
        move = _Move(before_E, after_E, group)
        for name in PARAMETERS:
            parameter = getattr(layer.experts, name)
            assert parameter.grad is None, "experts change owners between steps"
            for what, tensor in _with_states(name, parameter, optimizer):
                moved = move(tensor.to_local(), f"{what} of MoE layer {index}")
                tensor._local_tensor = (
                    moved  # as torch's own FSDP2 does: the whole stays what it is
                )
        sent_bytes += move.sent_bytes
        layer.own(after_E)
    return sent_bytes


def _with_states(
    name: str, parameter: DTensor, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, DTensor]]:
    yield name, parameter
    for key, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, DTensor):
            yield f"{key} of {name}", state


class _Move:
    """Of one layer's experts, tensor by tensor."""

    def __init__(self, before_E: Integers, after_E: Integers, group: dist.ProcessGroup) -> None:
        rank, self.group = dist.get_rank(group), group
        size = dist.get_world_size(group)
        had, gets = np.flatnonzero(before_E == rank), np.flatnonzero(after_E == rank)
        self.send_order = np.argsort(after_E[had], kind="stable").tolist()
        """Places of own rows, by the rank that each goes to."""
        arrival = np.argsort(before_E[gets], kind="stable")
        self.arrive: list[int] = gets[arrival].tolist()
        """Experts in the order in which they come, by the rank that each is from."""
        self.place_of_arrival: list[int] = arrival.tolist()
        self.send_to = np.bincount(after_E[had], minlength=size).tolist()
        self.come_from = np.bincount(before_E[gets], minlength=size).tolist()
        self.source_E = before_E
        self.to_others = len(had) - self.send_to[rank]
        self.sent_bytes = 0

    @torch.no_grad()
    def __call__(self, rows: Tensor, what: str) -> Tensor:
        """[O, ...] of the experts that are now this rank's, from those that were."""
        send = rows[self.send_order].contiguous()
        self.sent_bytes += self.to_others * (rows[0].nbytes if len(rows) else 0)
        arrived = self._exchanged(send)
        sums = self._exchanged(_hashes(send))
        self._check(_hashes(arrived), sums, what)
        moved = torch.empty_like(arrived)
        moved[self.place_of_arrival] = arrived
        return moved

    def _exchanged(self, send: Tensor) -> Tensor:
        received = send.new_empty(len(self.arrive), *send.shape[1:])
        dist.all_to_all_single(received, send, self.come_from, self.send_to, group=self.group)
        return received

    def _check(self, found: Tensor, sent: Tensor, what: str) -> None:
        bad = (found != sent).nonzero().flatten().tolist()
        said = "; ".join(
            f"expert {self.arrive[i]} from rank {int(self.source_E[self.arrive[i]])} of the group"
            for i in bad[:4]
        )
        number = torch.tensor(len(bad), device=found.device)
        dist.all_reduce(number, group=self.group)
        if number.item():
            raise RuntimeError(
                f"{what}: {int(number)} rows arrived otherwise than they were sent"
                + (f" ({said})" if said else " on other ranks")
                + ": go on from the last checkpoint"
            )


def _hashes(rows: Tensor) -> Tensor:
    """int64, of each row."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.int64, device=rows.device)
    return torch.stack([device_hash(row.contiguous()) for row in rows])
