"""Dispatch that sends a token to a node once, however many of its experts are there.

Shapes: T tokens on this rank, D model, K experts per token, M nodes, a slot t * M + m is a token at a node,
N rows that leave, U rows that arrive at this rank's place, R rows received for the experts of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesys.moe.compression import PLAIN, WireFormats
from moesys.moe.dispatch import ExchangePlan, ExpertParallelDispatcher
from moesys.ops import expert_order, tokens_per_expert, unpermute
from moesys.parallel.exchange import FlatExchange, Route
from moesys.plan.placement import expert_places


@dataclass(frozen=True, kw_only=True)
class DeduplicatedPlan:
    """To the nodes, inside them, and back."""

    row_of_slot_TM: Tensor
    """Which row a token's is at each node, -1 = none of its experts is there."""
    slot_of_row_N: Tensor
    rail: Route
    """To the rank of this place in each node."""
    inside: ExchangePlan
    """Of the rows that arrived, among the ranks of this node."""
    slots_per_expert_E: Tensor
    formats: WireFormats

    @property
    def expert_arguments(self) -> tuple[Any, ...]:
        return self.inside.expert_arguments


class DeduplicatingDispatcher:
    """Two levels: nodes are the experts of the outer one, whose rows carry which experts of the node they are for, and with
    what weights; the inner one is that of expert parallelism inside a node. A row's results are summed where they are made.

    A rank (node n, place i) sends a token's row to (m, i) for each node m that has any of its experts, at most min(K, M)
    rows in the place of K; there it goes to its experts. Rows are written in `formats` between nodes alone.

    plan: two device-to-host syncs (2 M integers, and the inner one's). Beside rows travel int16 ids forward, and fp32 weights
    forward and their gradients backward: K numbers a row each.
    """

    def __init__(
        self,
        num_experts: int,
        rail: FlatExchange,
        node: FlatExchange,
        slices: FlatExchange | None = None,
        num_classes: int = 1,
    ) -> None:
        """`rail`: among the ranks of this place in all nodes; `node`: among those of this node."""
        self.num_experts, self.num_nodes = num_experts, rail.size
        self.rail = rail
        self.inside = ExpertParallelDispatcher(
            num_experts // rail.size, node, slices, num_classes=num_classes
        )
        places = expert_places(num_experts, num_classes, rail.size)
        self._place_of_expert_X = torch.tensor([*places, -1], device="cpu")

    def exchanges(self) -> list[FlatExchange]:
        return [self.rail, *self.inside.exchanges()]

    def plan(
        self, topk_ids_TK: Tensor, padded_rows: int | None = None, formats: WireFormats = PLAIN
    ) -> DeduplicatedPlan:
        if padded_rows is not None:
            raise ValueError(
                "model.moe.capacity_policy=pad sends a fixed number of rows to every expert, and "
                "dispatch.exchange=deduplicated one to every node: use capacity_policy=drop"
            )
        self._place_of_expert_X = place_X = self._place_of_expert_X.to(topk_ids_TK.device)
        place_TK, per_node = place_X[topk_ids_TK], self.num_experts // self.num_nodes
        node_TK = torch.where(place_TK < 0, self.num_nodes, place_TK // per_node)
        nodes_M = torch.arange(self.num_nodes, device=place_TK.device)
        is_at_TM = (node_TK[:, :, None] == nodes_M).any(1)
        row_of_slot_TM, slot_of_row_N, rows_M = expert_order(
            torch.where(is_at_TM, nodes_M, -1), self.num_nodes
        )
        sizes = torch.stack([rows_M, self.rail.counts(rows_M[:, None])[:, 0]]).tolist()
        rail = Route(send_splits_list=sizes[0], recv_splits_list=sizes[1])
        slot_of_row_N = slot_of_row_N[: sum(sizes[0])]
        token_N, node_N = slot_of_row_N // self.num_nodes, slot_of_row_N % self.num_nodes
        is_there_NK = node_TK[token_N] == node_N[:, None]
        ids_NK = torch.where(is_there_NK, place_TK[token_N] % per_node, -1)
        return DeduplicatedPlan(
            row_of_slot_TM=row_of_slot_TM,
            slot_of_row_N=slot_of_row_N,
            rail=rail,
            inside=self.inside.plan(self._sent_ids(ids_NK, rail)),
            slots_per_expert_E=tokens_per_expert(topk_ids_TK, self.num_experts),
            formats=formats,
        )

    def _sent_ids(self, ids_NK: Tensor, rail: Route) -> Tensor:
        """int64 [U, K]."""
        bytes_NW = ids_NK.to(torch.int16).view(torch.uint8)
        return self.rail.send(bytes_NW, rail).view(torch.int16).long()

    def dispatch(self, x_TD: Tensor, plan: DeduplicatedPlan) -> tuple[Tensor, Tensor]:
        rows_UD = self.rail.permuted_rows(
            x_TD, plan.slot_of_row_N, plan.row_of_slot_TM, plan.rail, plan.formats.dispatch
        )
        return self.inside.dispatch(rows_UD, plan.inside)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, plan: DeduplicatedPlan) -> Tensor:
        # Of a row's K weights the inner dispatcher reads those of its node's experts.
        weights_UK = self.rail.permuted_rows(
            weights_TK, plan.slot_of_row_N, plan.row_of_slot_TM, plan.rail
        )
        sums_UD = self.inside.combine(rows_RD, weights_UK, plan.inside)
        sums_ND = self.rail.rows(sums_UD, plan.rail.back(), plan.formats.combine)
        ones_TM = torch.ones_like(plan.row_of_slot_TM, dtype=weights_TK.dtype)
        return unpermute(sums_ND, ones_TM, plan.row_of_slot_TM)
