"""Dispatch brings each token's rows to its experts; combine brings the results back and sums them.

Shapes: T tokens on this rank, D model, E experts, L local experts, K experts per token, N rows in expert order,
R rows received, P ranks of the expert group. Slot t*K + k is token t's k-th expert.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moesys.moe.compression import PLAIN, WireFormats
from moesys.ops import expert_order, permute, unpermute
from moesys.parallel.exchange import FlatExchange, Route
from moesys.plan.placement import expert_places


class DispatchPlan(Protocol):
    """Where rows go and come from: integers only, so a recomputation goes by the plan of the first pass."""

    @property
    def slots_per_expert_E(self) -> Tensor:
        """int64, this rank's slots that have the expert."""
        ...

    @property
    def expert_arguments(self) -> tuple[Any, ...]:
        """What this rank's experts take beside rows and counts: () where all are of one kind."""
        ...


class Dispatcher(Protocol):
    """The seam between routing and experts. Weights that sum to one make dispatch-then-combine the identity."""

    def exchanges(self) -> list[FlatExchange]:
        """All through which this layer's rows travel."""
        ...

    def plan(
        self, topk_ids_TK: Tensor, padded_rows: int | None = None, formats: WireFormats = PLAIN
    ) -> DispatchPlan:
        """Decide where each slot's row goes. With ranks a collective.

        With `padded_rows` every expert gets exactly that many rows from each rank, zeros where it has no token.
        Between ranks they are written in `formats`.
        """
        ...

    def dispatch(self, x_TD: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """Return rows_RD in order of local expert, and tokens_per_expert_L (int64)."""
        ...

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, plan: Any) -> Tensor:
        """Return x_TD: for each token the sum of its slots' rows times `weights_TK`, 0 where it has none."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Where each slot's row lies when rows are grouped by expert."""

    row_of_slot_TK: Tensor
    """int64, -1 = no row."""
    slot_of_row_N: Tensor
    """int64, -1 = a zero row."""
    slots_per_expert_E: Tensor
    """int64."""
    rows_per_expert_E: Tensor
    """int64, zero rows included."""
    rows_per_class_list: list[int] | None = None
    """Where all experts are here and of several widths."""

    @property
    def expert_arguments(self) -> tuple[Any, ...]:
        return () if self.rows_per_class_list is None else (self.rows_per_class_list,)

    @classmethod
    def of(cls, topk_ids_TK: Tensor, num_experts: int, padded_rows: int | None) -> "ExpertOrder":
        """Stable order by expert, or with `padded_rows` a fixed number of rows per expert. No host sync."""
        row_of_slot_TK, slot_of_row_N, counts_E = expert_order(topk_ids_TK, num_experts)
        order = cls(
            row_of_slot_TK=row_of_slot_TK,
            slot_of_row_N=slot_of_row_N,
            slots_per_expert_E=counts_E,
            rows_per_expert_E=counts_E,
        )
        return order if padded_rows is None else order._padded(topk_ids_TK, padded_rows)

    def _padded(self, topk_ids_TK: Tensor, padded_rows: int) -> "ExpertOrder":
        first_E = self.slots_per_expert_E.cumsum(0) - self.slots_per_expert_E
        ids_TK = topk_ids_TK.clamp(min=0)
        row_TK = ids_TK * padded_rows + self.row_of_slot_TK - first_E[ids_TK]
        row_TK = torch.where(topk_ids_TK >= 0, row_TK, -1)
        # One spare row takes the writes of slots without an expert.
        num_rows = first_E.numel() * padded_rows
        slot_of_row_N = row_TK.new_full((num_rows + 1,), -1)
        slots_TK = torch.arange(row_TK.numel(), device=row_TK.device).view_as(row_TK)
        slot_of_row_N[torch.where(row_TK >= 0, row_TK, num_rows)] = slots_TK
        return replace(
            self,
            row_of_slot_TK=row_TK,
            slot_of_row_N=slot_of_row_N[:num_rows],
            rows_per_expert_E=torch.full_like(first_E, padded_rows),
        )


class LocalDispatcher:
    """All experts on this rank: rows only change their order.

    No host sync; with C > 1 classes of experts of different widths one of C ints, but for padded rows.
    """

    def __init__(self, num_experts: int, num_classes: int = 1) -> None:
        self.num_experts = num_experts
        self.num_classes = num_classes

    def exchanges(self) -> list[FlatExchange]:
        return []

    def plan(
        self, topk_ids_TK: Tensor, padded_rows: int | None = None, formats: WireFormats = PLAIN
    ) -> ExpertOrder:
        order = ExpertOrder.of(topk_ids_TK, self.num_experts, padded_rows)
        if self.num_classes == 1:
            return order
        if padded_rows is None:
            rows = order.rows_per_expert_E.view(self.num_classes, -1).sum(1).tolist()
        else:
            rows = [padded_rows * self.num_experts // self.num_classes] * self.num_classes
        return replace(
            order, slot_of_row_N=order.slot_of_row_N[: sum(rows)], rows_per_class_list=rows
        )

    def dispatch(self, x_TD: Tensor, plan: ExpertOrder) -> tuple[Tensor, Tensor]:
        return permute(x_TD, plan.slot_of_row_N, plan.row_of_slot_TK), plan.rows_per_expert_E

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, plan: ExpertOrder) -> Tensor:
        return unpermute(rows_RD, weights_TK, plan.row_of_slot_TK)


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """There, by expert and by rank, and back."""

    order: ExpertOrder
    route: Route
    slice_route: Route | None
    """Copies to every rank of `slices`, and theirs."""
    tokens_per_expert_L: Tensor
    """int64, of all ranks' rows."""
    arrival_of_row_R: Tensor | None
    """Which arrived row becomes row r in expert order; None when arrival order is expert order."""
    row_of_arrival_R: Tensor | None
    rows_per_class_list: list[int] | None
    formats: WireFormats

    @property
    def slots_per_expert_E(self) -> Tensor:
        return self.order.slots_per_expert_E

    @property
    def expert_arguments(self) -> tuple[Any, ...]:
        return () if self.rows_per_class_list is None else (self.rows_per_class_list,)


class _Sizes(NamedTuple):
    """Rows, on the host."""

    send: list[int]
    recv: list[int]
    through: list[int]
    slices: list[int]
    """Arrivals of each rank of the slices."""
    classes: list[int]
    """Of this rank's experts, by width."""


class ExpertParallelDispatcher:
    """Experts spread over the ranks of a group, rank p owning experts p*L .. p*L + L-1; dropless.

    plan: order by expert, tell counts, one device-to-host sync (about 2P ints; none with padded rows). dispatch: exchange
    rows, order the arrivals (grouped by source rank) by local expert. combine is the mirror.

    With C > 1 classes of experts of different widths each rank owns an equal share of each class, experts are ordered by
    their places (plan/placement.py).

    With `slices` (expert tensor parallelism) each expert's matrices are cut over a second group of ranks, each of which
    has arrivals of its own: they are copied to all, and the partial results are summed where they came from.
    """

    def __init__(
        self,
        num_experts: int,
        exchange: FlatExchange,
        slices: FlatExchange | None = None,
        num_classes: int = 1,
    ) -> None:
        if num_experts % (num_classes * exchange.size):
            times = f"{num_classes} widths * " if num_classes > 1 else ""
            raise ValueError(
                f"moe.num_experts={num_experts} must be a multiple of {times}parallel.ep={exchange.size}"
            )
        self.num_experts = num_experts
        self.num_classes = num_classes
        self._place_of_expert_X = torch.tensor(
            [*expert_places(num_experts, num_classes, exchange.size), -1], device="cpu"
        )
        self.num_local_experts = num_experts // exchange.size
        self.exchange = exchange
        self.slices = slices

    def exchanges(self) -> list[FlatExchange]:
        return [self.exchange] if self.slices is None else [self.exchange, self.slices]

    def plan(
        self, topk_ids_TK: Tensor, padded_rows: int | None = None, formats: WireFormats = PLAIN
    ) -> ExchangePlan:
        order = self._order(topk_ids_TK, padded_rows)
        send_counts_PL = order.rows_per_expert_E.view(self.exchange.size, self.num_local_experts)
        if padded_rows is None:
            counts_SPL, sizes = self._told(send_counts_PL)
        else:
            counts_SPL, sizes = self._known(send_counts_PL, padded_rows)
        counts_PL = counts_SPL.flatten(0, 1)
        arrival_of_row_R, row_of_arrival_R = self._expert_major(counts_PL, sum(sizes.slices))
        slice_route = None
        if self.slices is not None:
            copies = [sum(sizes.recv)] * self.slices.size
            slice_route = Route(send_splits_list=copies, recv_splits_list=sizes.slices)
        return ExchangePlan(
            order=replace(order, slot_of_row_N=order.slot_of_row_N[: sum(sizes.send)]),
            route=Route(
                send_splits_list=sizes.send,
                recv_splits_list=sizes.recv,
                through_list=sizes.through,
            ),
            slice_route=slice_route,
            tokens_per_expert_L=counts_PL.sum(0),
            arrival_of_row_R=arrival_of_row_R,
            row_of_arrival_R=row_of_arrival_R,
            rows_per_class_list=sizes.classes if self.num_classes > 1 else None,
            formats=formats,
        )

    def _told(self, send_counts_PL: Tensor) -> tuple[Tensor, "_Sizes"]:
        """Rows per expert of each slice's source ranks, as these tell; one device-to-host sync."""
        send_rows_P = send_counts_PL.sum(1)
        recv_counts_PL = self.exchange.counts(send_counts_PL)
        counts_SPL = recv_counts_PL[None]
        if self.slices is not None:
            counts_SPL = self.slices.gather(recv_counts_PL)
        counts_L = counts_SPL.sum((0, 1))
        sizes = [
            send_rows_P,
            recv_counts_PL.sum(1),
            self.exchange.through(send_rows_P),
            counts_SPL.sum((1, 2)),
            counts_L.view(self.num_classes, -1).sum(1),
        ]
        on_host = iter(torch.cat(sizes).tolist())
        return counts_SPL, _Sizes(*(list(itertools.islice(on_host, s.numel())) for s in sizes))

    def _known(self, send_counts_PL: Tensor, padded_rows: int) -> tuple[Tensor, "_Sizes"]:
        """The same where every expert gets so many rows from each rank: nothing is told, nothing waited for."""
        size, num_slices = self.exchange.size, 1 if self.slices is None else self.slices.size
        per_rank = padded_rows * self.num_local_experts
        per_class = per_rank * size * num_slices // self.num_classes
        return send_counts_PL.expand(num_slices, -1, -1), _Sizes(
            send=[per_rank] * size,
            recv=[per_rank] * size,
            through=[per_rank] * self.exchange.num_through,
            slices=[per_rank * size] * num_slices,
            classes=[per_class] * self.num_classes,
        )

    def _order(self, topk_ids_TK: Tensor, padded_rows: int | None) -> ExpertOrder:
        """By place; its slots_per_expert_E by expert."""
        if self.num_classes == 1:
            return ExpertOrder.of(topk_ids_TK, self.num_experts, padded_rows)
        device = topk_ids_TK.device
        self._place_of_expert_X = place_X = self._place_of_expert_X.to(device)
        order = ExpertOrder.of(place_X[topk_ids_TK], self.num_experts, padded_rows)
        return replace(order, slots_per_expert_E=order.slots_per_expert_E[place_X[:-1]])

    def dispatch(self, x_TD: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
        order = plan.order
        rows_RD = self.exchange.permuted_rows(
            x_TD, order.slot_of_row_N, order.row_of_slot_TK, plan.route, plan.formats.dispatch
        )
        if self.slices is not None and plan.slice_route is not None:
            rows_RD = self.slices.rows(rows_RD.repeat(self.slices.size, 1), plan.slice_route)
        if plan.arrival_of_row_R is not None and plan.row_of_arrival_R is not None:
            rows_RD = permute(rows_RD, plan.arrival_of_row_R, plan.row_of_arrival_R[:, None])
        return rows_RD, plan.tokens_per_expert_L

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, plan: ExchangePlan) -> Tensor:
        if plan.arrival_of_row_R is not None and plan.row_of_arrival_R is not None:
            rows_RD = permute(rows_RD, plan.row_of_arrival_R, plan.arrival_of_row_R[:, None])
        if self.slices is not None and plan.slice_route is not None:
            parts = self.slices.rows(rows_RD, plan.slice_route.back())
            rows_RD = parts.unflatten(0, (self.slices.size, plan.route.num_arrivals)).sum(0)
        rows_ND = self.exchange.rows(rows_RD, plan.route.back(), plan.formats.combine)
        return unpermute(rows_ND, weights_TK, plan.order.row_of_slot_TK)

    def _expert_major(
        self, recv_counts_PL: Tensor, num_rows: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Arrivals are grouped by (source rank, expert); the experts want (expert, source rank)."""
        num_sources, num_local = recv_counts_PL.shape
        if num_local <= 1 or num_sources == 1:
            return None, None
        experts_L = torch.arange(num_local, device=recv_counts_PL.device)
        expert_of_arrival_R = torch.repeat_interleave(
            experts_L.repeat(num_sources), recv_counts_PL.flatten(), output_size=num_rows
        )
        row_of_arrival_R1, arrival_of_row_R, _ = expert_order(
            expert_of_arrival_R[:, None], num_local
        )
        return arrival_of_row_R, row_of_arrival_R1[:, 0]
