"""The exchange of rows in two steps: inside the node, then across.

Shapes: G ranks of the group on each of M nodes; i and j are places in a node, m nodes. Group rank m * G + i is the i-th of node m.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.exchange import FlatExchange, Route
from moesys.parallel.tensor import all_gather_single


class HierarchicalExchange(FlatExchange):
    """Two all-to-alls: inside the node, then across, among ranks of the same place in their nodes (DeepSpeed-MoE, 2201.05596).

    A rank talks to G - 1 + M - 1 others in the place of G M - 1, in messages G times as long between nodes; what is
    for other nodes travels inside too.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        node_group: dist.ProcessGroup,
        rail_group: dist.ProcessGroup,
        ranks_per_node: int | None = None,
    ) -> None:
        """`node_group`: the group's ranks on this node; `rail_group`: those of this place in all nodes."""
        super().__init__(group, ranks_per_node)
        self.node_group, self.rail_group = node_group, rail_group
        self.num_places, self.num_nodes = (dist.get_world_size(g) for g in (node_group, rail_group))
        if self.num_places * self.num_nodes != self.size:
            raise ValueError(
                f"{self.size} ranks are not {self.num_nodes} nodes of {self.num_places}"
            )
        self.node, self.place = divmod(self.rank, self.num_places)
        self.num_through = self.size

    def through(self, send_rows_P: Tensor) -> Tensor:
        """[i, m]: rows that the node's i-th rank sends to this place of node m."""
        gathered = send_rows_P.new_empty(self.num_places * self.size)
        all_gather_single(gathered, send_rows_P.contiguous(), group=self.node_group)
        return gathered.view(self.num_places, self.num_nodes, -1)[:, :, self.place].flatten()

    def through_known(self, rows_from: Callable[[Iterable[int]], list[list[int]]]) -> list[int]:
        first = self.node * self.num_places
        rows_GP = rows_from(range(first, first + self.num_places))
        return [rows for rows_P in rows_GP for rows in rows_P[self.place :: self.num_places]]

    def send(self, rows_ND: Tensor, route: Route, plain_row_bytes: int | None = None) -> Tensor:
        send_mj = _cut(route.send_splits_list, self.num_places)
        recv_mi = _cut(route.recv_splits_list, self.num_places)
        through_im = _cut(route.through_list, self.num_nodes)
        inside = [sum(column) for column in zip(*send_mj, strict=True)], [*map(sum, through_im)]
        across = [sum(column) for column in zip(*through_im, strict=True)], [*map(sum, recv_mi)]
        if not route.is_back:
            rows = self._inside(_transposed(rows_ND, send_mj), *inside, plain=plain_row_bytes)
            return self._across(_transposed(rows, through_im), *across, plain=plain_row_bytes)
        rows = self._across(rows_ND, *reversed(across), plain=plain_row_bytes)
        rows = _transposed(rows, _flipped(through_im))
        rows = self._inside(rows, *reversed(inside), plain=plain_row_bytes)
        return _transposed(rows, _flipped(send_mj))

    def _inside(self, rows: Tensor, send: list[int], recv: list[int], plain: int | None) -> Tensor:
        self._count(rows, send, self.place, [False] * self.num_places, plain)
        return self._send(rows, send, recv, self.node_group)

    def _across(self, rows: Tensor, send: list[int], recv: list[int], plain: int | None) -> Tensor:
        is_other = [node != self.node for node in range(self.num_nodes)]
        self._count(rows, send, self.node, is_other, plain)
        return self._send(rows, send, recv, self.rail_group)


def _cut(counts: list[int], width: int) -> list[list[int]]:
    return [counts[start : start + width] for start in range(0, len(counts), width)]


def _flipped(counts: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*counts, strict=True)]


def _transposed(rows: Tensor, counts_ab: list[list[int]]) -> Tensor:
    """Blocks of rows in order (a, b) put in order (b, a)."""
    blocks = rows.split([count for line in counts_ab for count in line])
    width = len(counts_ab[0])
    return torch.cat([block for b in range(width) for block in blocks[b::width]])
