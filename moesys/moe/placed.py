"""Dispatch to experts that lie where a placement says, the hottest on several ranks.

Shapes: T tokens on this rank, K experts per token, E experts, P ranks of the expert group, S of the slices, L experts that this
rank holds (its own, then copies), N rows in order of the rank and the place they are for, H pairs of an expert and a holder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moesys.moe.compression import PLAIN, WireFormats
from moesys.moe.dispatch import ExchangePlan, ExpertOrder, ExpertParallelDispatcher
from moesys.parallel.exchange import FlatExchange, Route
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.shares import Shares


class Copies(Protocol):
    """What a rank holds of other ranks' experts for some forwards and their backwards."""

    placement: Placement

    @property
    def held(self) -> list[int]:
        """Own experts, and copies of each set."""
        ...


Decide = Callable[[Integers], Copies]
"""From the rows of all ranks [P, E], the same on all, to who holds what."""


@dataclass(frozen=True, kw_only=True)
class PlacedPlan(ExchangePlan):
    """With the copies that its rows are for."""

    copies: Copies

    @property
    def expert_arguments(self) -> tuple[Any, ...]:
        return self.rows_per_class_list, self.copies


@dataclass(kw_only=True)
class Levels:
    """Rows that the busiest rank of each forward got, and the mean rank, one forward after the other; over the ranks' speeds."""

    busiest: float = 0.0
    if_owners_alone: float = 0.0
    """The busiest of each forward, had owners served all rows."""
    mean: float = 0.0

    def add(
        self,
        placement: Placement,
        counts_E: Integers,
        rows_P: Integers,
        speeds_P: Amounts | None = None,
    ) -> None:
        speeds_P = np.ones(placement.num_ranks) if speeds_P is None else speeds_P
        owned_P = np.bincount(placement.owner_E, counts_E, placement.num_ranks)
        self.busiest += float((rows_P / speeds_P).max())
        self.if_owners_alone += float((owned_P / speeds_P).max())
        self.mean += float(rows_P.sum() / speeds_P.sum())


class PlacedDispatcher(ExpertParallelDispatcher):
    """Expert parallelism in which an expert may have several holders, and a rank any number of experts.

    Every rank tells all others how many rows it has for each expert, in the place of telling each how many it will get: one
    collective and one device-to-host sync, as without copies. So all know the true loads before a row travels, and
    share them out over the holders alike (plan/shares.py).
    """

    def __init__(
        self,
        num_experts: int,
        exchange: FlatExchange,
        slices: FlatExchange | None,
        per_node: int,
        decide: Decide,
    ) -> None:
        self.num_experts = num_experts
        self.exchange, self.slices = exchange, slices
        self.per_node, self.decide = per_node, decide
        self.levels = Levels()
        """Of forwards since this was set."""
        self.speeds_P: Amounts | None = None
        """Ranks' shares of rows that several could serve go by these, the same on all; None = even."""

    def plan(
        self, topk_ids_TK: Tensor, padded_rows: int | None = None, formats: WireFormats = PLAIN
    ) -> PlacedPlan:
        if padded_rows is not None:
            raise ValueError(
                "model.moe.capacity_policy=pad sends a fixed number of rows to every expert, of which holders "
                "share out what there is: use capacity_policy=drop"
            )
        order = ExpertOrder.of(topk_ids_TK, self.num_experts, None)
        counts_SPE = self._counts(order.slots_per_expert_E)
        copies = self.decide(counts_SPE.sum(0))
        rank, pairs = self.exchange.rank, copies.placement.pairs
        by_place_H = np.argsort(pairs.place_H)
        mine_L = by_place_H[pairs.rank_H[by_place_H] == rank]
        shares_S = [
            Shares.of(counts_PE, copies.placement, self.per_node, self.speeds_P)
            for counts_PE in counts_SPE
        ]
        rows_P = np.sum([shares.loads_P() for shares in shares_S], axis=0)
        self.levels.add(copies.placement, counts_SPE.sum((0, 1)), rows_P, self.speeds_P)
        received_SPL = np.stack([shares.received_PI(mine_L) for shares in shares_S])
        own_slice = 0 if self.slices is None else self.slices.rank
        own = shares_S[own_slice]
        route = Route(
            send_splits_list=own.sent_P(rank).tolist(),
            recv_splits_list=received_SPL[own_slice].sum(1).tolist(),
            through_list=self.exchange.through_known(
                lambda sources: [own.sent_P(source).tolist() for source in sources]
            ),
        )
        arrivals = received_SPL.sum((1, 2)).tolist()
        slice_route = None
        if self.slices is not None:
            copied = [sum(route.recv_splits_list)] * self.slices.size
            slice_route = Route(send_splits_list=copied, recv_splits_list=arrivals)
        counts_SPL = torch.from_numpy(received_SPL).to(topk_ids_TK.device)
        counts_PL = counts_SPL.flatten(0, 1)
        arrival_of_row_R, row_of_arrival_R = self._expert_major(counts_PL, sum(arrivals))
        sets = np.cumsum(copies.held)[:-1]
        rows_L = received_SPL.sum((0, 1))
        return PlacedPlan(
            order=_in_order_of_place(order, by_place_H, own.sent_H(rank)),
            route=route,
            slice_route=slice_route,
            tokens_per_expert_L=counts_PL.sum(0),
            arrival_of_row_R=arrival_of_row_R,
            row_of_arrival_R=row_of_arrival_R,
            rows_per_class_list=[int(part_L.sum()) for part_L in np.split(rows_L, sets)],
            formats=formats,
            copies=copies,
        )

    def _counts(self, slots_per_expert_E: Tensor) -> Integers:
        """[S, P, E] of all ranks that send to this one, on the host."""
        counts_SPE = self.exchange.gather(slots_per_expert_E)[None]
        if self.slices is not None:
            counts_SPE = self.slices.gather(counts_SPE[0])
        return counts_SPE.cpu().numpy()


def _in_order_of_place(order: ExpertOrder, by_place_H: Integers, sent_H: Integers) -> ExpertOrder:
    """From rows grouped by expert to rows grouped by holder and expert: an expert's are cut into as many runs as it has
    holders, and runs change places."""
    device = order.slot_of_row_N.device
    starts_H = sent_H.cumsum() - sent_H  # pairs are in order of expert
    lengths_H = sent_H[by_place_H]
    shifts_H = starts_H[by_place_H] - (lengths_H.cumsum() - lengths_H)
    num_rows = int(sent_H.sum())
    shifts, lengths = torch.from_numpy(np.stack([shifts_H, lengths_H])).to(device)
    rows_N = torch.arange(num_rows, device=device)
    row_before_N = rows_N + torch.repeat_interleave(shifts, lengths, output_size=num_rows)
    row_after_X = rows_N.new_full((num_rows + 1,), -1)
    row_after_X[row_before_N] = rows_N
    return replace(
        order,
        slot_of_row_N=order.slot_of_row_N[row_before_N],
        row_of_slot_TK=row_after_X[order.row_of_slot_TK],
    )
