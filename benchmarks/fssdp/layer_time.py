"""How long a layer's forwards and backwards of a step take, by what its busiest ranks and links have to do. Pure.

All ranks wait for the busiest one four times a micro-step: rows go to experts and back, in forward and backward. An exchange takes
as long as its busiest link; a backward multiplies twice as much as a forward. A step's copies are on their way while the experts of
the layer before and attention compute, and their gradients while the backward of these does (twice as long); what does not fit there
is waited for.

Left out: latencies (each message here takes milliseconds), work that is not matrix products, the host's, and all that is the
same with every policy and not of the layer.

Shapes: P ranks (of a node one after another).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.fssdp.machines import ACHIEVED_BYTES, Cluster, Layer
from moesys.plan.chunk_routes import ROUTE_KINDS, chunk_route
from moesys.plan.placement import Integers, Placement
from moesys.plan.shares import Shares

ROW_BYTES, CHUNK_BYTES, GRADIENT_BYTES, STATE_BYTES = 2, 2, 4, 12
"""Of a number: rows and copies have 16 bits, gradients of copies 32, parameters with Adam's moments three times 32."""


def exchange_seconds(cluster: Cluster, amounts_PP: Integers, each_bytes: int) -> float:
    """Of an exchange in which rank p sends amounts_PP[p, q] to rank q: inside nodes and between them at once, both ways at once."""
    node_P = np.arange(len(amounts_PP)) // cluster.per_node
    is_near_PP = node_P[:, None] == node_P
    near_PP = np.where(is_near_PP, amounts_PP, 0)
    far_PP = amounts_PP - near_PP
    np.fill_diagonal(near_PP, 0)
    near = max(near_PP.sum(0).max(), near_PP.sum(1).max())
    firsts = np.arange(0, len(amounts_PP), cluster.per_uplink)
    far = max(np.add.reduceat(far_PP.sum(axis), firsts).max() for axis in (0, 1))
    slowest = max(near / cluster.inside_bytes_per_s, far / cluster.uplink_bytes_per_s)
    return float(slowest) * each_bytes / ACHIEVED_BYTES


def rows_PP(shares: Shares) -> Integers:
    """That each rank sends to each."""
    rank_H, num_ranks = shares.pairs.rank_H, shares.nodes.num_ranks
    received_PP = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    np.add.at(received_PP, rank_H, shares.received_PI(np.arange(len(rank_H))).T)
    return received_PP.T


def rows_per_copy(layer: Layer) -> float:
    """Rows, there and back in forward and backward, that are as many bytes as a copy of their expert and its gradient."""
    return (
        layer.expert_parameters * (CHUNK_BYTES + GRADIENT_BYTES) / (4 * ROW_BYTES * layer.d_model)
    )


def micro_step_seconds(cluster: Cluster, layer: Layer, sent_PP: Integers) -> float:
    """Forward and backward, without what copies take."""
    experts = int(sent_PP.sum(0).max()) * 2 * layer.expert_parameters
    multiplied = 3 * (layer.dense_flops + experts) / cluster.flops_per_s
    return multiplied + 4 * exchange_seconds(cluster, sent_PP, ROW_BYTES * layer.d_model)


def copies_seconds(
    cluster: Cluster, layer: Layer, routes: Sequence[Sequence[Integers]]
) -> tuple[float, float]:
    """Of a step's copies to their ranks, and of their gradients home, by the fastest of `routes_of`."""
    per_byte = min(
        sum(exchange_seconds(cluster, hops_PP, 1) for hops_PP in stages) for stages in routes
    )
    there = per_byte * CHUNK_BYTES * layer.expert_parameters
    return there, there * GRADIENT_BYTES / CHUNK_BYTES


def waited_seconds(
    cluster: Cluster, layer: Layer, routes: Sequence[Sequence[Integers]], ahead: bool
) -> float:
    """For copies and their gradients. `ahead`: copies were planned before the step, and the mean rank computes meanwhile."""
    there, home = copies_seconds(cluster, layer, routes)
    forward = (layer.dense_flops + layer.expert_flops) / cluster.flops_per_s
    return max(0.0, there - forward * ahead) + max(0.0, home - 2 * forward)


def routes_of(placement: Placement, per_node: int) -> list[list[Integers]]:
    """Of each kind of route its stages, each as the copies that every rank sends to every other [P, P]."""
    num_ranks = placement.num_ranks
    return [
        [
            matrix(((hop.source, hop.dest) for hop in stage), num_ranks)
            for stage in chunk_route(placement, per_node, kind).stages
        ]
        for kind in ROUTE_KINDS
    ]


def moving_seconds(
    cluster: Cluster, layer: Layer, before_E: Integers, after_E: Integers, num_ranks: int
) -> float:
    """Of experts with optimizer states that change owners, all at once."""
    moved_PP = matrix(zip(before_E.tolist(), after_E.tolist(), strict=True), num_ranks)
    np.fill_diagonal(moved_PP, 0)
    return exchange_seconds(cluster, moved_PP, STATE_BYTES * layer.expert_parameters)


def matrix(ways: Iterable[tuple[int, int]], num_ranks: int) -> Integers:
    """[P, P]: how often each way from a rank to a rank is there."""
    flat = [source * num_ranks + dest for source, dest in ways]
    return np.bincount(flat, minlength=num_ranks**2).reshape(num_ranks, num_ranks)
