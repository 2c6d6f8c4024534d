"""Which ranks hold copies of which experts for a step, so that all have about equal loads. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another), C copies that a rank may hold of each layer,
I items: experts at their owners, and copies near the rows; X pieces of their loads that overloaded ranks give away, Y ranks with
room.

Loads of all layers are planned at once: each layer, or each node of each layer, is a line of its own in flat arrays.
"""

import numpy as np
from numpy.typing import NDArray

from moesys.plan.lines import begins
from moesys.plan.placement import Amounts, Integers, Nodes

GRID = 2.0**24
"""Loads are whole numbers of so many parts of a rank's mean."""
LEAST = (0.2, 0.05, 0.01)
"""Of a rank's mean load: pieces that are laid in each round. Small ones would take the places that large ones want; the smallest
are not worth a copy."""


def balancing_copies(
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    most_copies: int,
    near_ME: NDArray[np.bool_] | None = None,
    tolerance: float = 0.0,
    far_load: float = 0.0,
    speeds_P: Amounts | None = None,
) -> Integers:
    """int64 [M, P, C], -1 = none: the hottest experts of ranks with too much, on ranks with room, on their own node first.

    With `near_ME` every node first gets a copy of each of these experts, the hottest first as far as its ranks have places, so
    that rows for them need not leave it. A layer whose busiest rank then has at most `tolerance` more than the mean, of which it
    is a share, gets no more.

    A rank's mean is by its speed. What overloaded ranks then have above it, expert by expert from the hottest, is laid on a
    line beside the room of the others, the largest beside the largest, on each node and then over all. Where a piece lies
    beside a rank's room the rank gets a copy, so that about as few are made as there are pieces and ranks with room; a rank
    takes `most_copies` at most, and what is then left, and what was too small, is laid again (`LEAST`). Over all nodes the
    ranks of each lie beside each other, those of the node with the most room first, so that few copies cross; a node that would
    get less than `far_load` of an expert gets nothing of it.
    """
    state = _State(loads_ME, owner_ME, num_ranks, per_node, most_copies)
    if most_copies == 0 or num_ranks == 1:
        return state.copies_MPC
    if near_ME is not None and near_ME.any():
        state.bring_near(near_ME)
    state.find_room(tolerance, np.ones(num_ranks) if speeds_P is None else speeds_P)
    layer_M1 = np.arange(len(loads_ME))[:, None]
    layer_MP = np.broadcast_to(layer_M1, state.used_MP.shape)
    node_MP = layer_M1 * state.nodes.number + state.nodes.node_P
    for least in LEAST:
        if 1 < per_node < num_ranks:
            state.lay(least, node_MP, node_MP)
        state.lay(least, layer_MP, state.by_room_MP(), far_load if per_node < num_ranks else 0.0)
    return state.copies_MPC


class _State:
    """Of all layers, in units of a rank's mean load."""

    def __init__(
        self,
        loads_ME: Amounts,
        owner_ME: Integers,
        num_ranks: int,
        per_node: int,
        most_copies: int,
    ) -> None:
        layers, num_experts = loads_ME.shape
        self.owner_ME = owner_ME
        self.nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
        self.mean_M1 = np.maximum(loads_ME.sum(1, keepdims=True), 1e-30) / num_ranks
        self.expert_MI = np.broadcast_to(np.arange(num_experts), loads_ME.shape)
        self.rank_MI = owner_ME
        self.load_MI = _on_grid(loads_ME / self.mean_M1)
        self.used_MP = np.zeros((layers, num_ranks), dtype=np.int64)
        """Copies that each rank has."""
        self.copies_MPC = np.full((layers, num_ranks, most_copies), -1, dtype=np.int64)

    def bring_near(self, near_ME: NDArray[np.bool_]) -> None:
        """These experts to a rank of every node: from the first rank to the last and back, the hottest first."""
        near_M, nodes = near_ME.sum(1), self.nodes
        layers, num_ranks, most = self.copies_MPC.shape
        turns = min(int(near_M.max()), nodes.per_node * most)
        by_load_ME = np.argsort(np.where(near_ME, -self.load_MI, 1.0), axis=1, kind="stable")
        layer_M, node_N = np.arange(layers), np.arange(nodes.number)
        shape = layers, turns, nodes.number
        expert_MTN, rank_MTN = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        load_MTN = np.zeros(shape)
        for turn in range(turns):
            there, place = divmod(turn, nodes.per_node)
            rank_N = node_N * nodes.per_node + (
                place if there % 2 == 0 else nodes.per_node - 1 - place
            )
            expert_M = by_load_ME[:, turn]
            node_M = nodes.node_P[self.owner_ME[layer_M, expert_M]]
            part_M = _on_grid(self.load_MI[layer_M, expert_M] / nodes.number)
            is_away_MN = (node_M[:, None] != node_N) & (turn < near_M)[:, None]
            m, n = np.nonzero(is_away_MN & (rank_N < num_ranks))
            at = m, turn, n
            expert_MTN[at], rank_MTN[at], load_MTN[at] = expert_M[m], rank_N[n], part_M[m]
            self._hold(m * num_ranks + rank_N[n], expert_M[m])
            np.subtract.at(self.load_MI, (m, expert_M[m]), part_M[m])
        self.expert_MI = np.concatenate([self.expert_MI, expert_MTN.reshape(layers, -1)], axis=1)
        self.rank_MI = np.concatenate([self.rank_MI, rank_MTN.reshape(layers, -1)], axis=1)
        self.load_MI = np.concatenate([self.load_MI, load_MTN.reshape(layers, -1)], axis=1)

    def find_room(self, tolerance: float, speeds_P: Amounts) -> None:
        """Which ranks have too much, and of which items, and which have room."""
        mean_P = _on_grid(speeds_P / speeds_P.mean())
        self.most_room = float(mean_P.max())
        layers, num_ranks = self.used_MP.shape
        rank_of_all = self.rank_MI + np.arange(layers)[:, None] * num_ranks
        has_X = np.bincount(rank_of_all.ravel(), self.load_MI.ravel(), layers * num_ranks)
        has_MP = has_X.reshape(layers, num_ranks)
        is_level_M1 = (has_MP / mean_P).max(1, keepdims=True) <= 1.0 + tolerance
        over_MP = np.where(is_level_M1, 0.0, np.maximum(has_MP - mean_P, 0.0))
        self.over_MI = _hottest_first(self.load_MI, self.rank_MI, over_MP)
        """Of each item's load what its rank wants to give away."""
        self.room_MP = np.maximum(mean_P - has_MP, 0.0)

    def lay(
        self, least: float, line_MP: Integers, stretch_MP: Integers, far_load: float = 0.0
    ) -> None:
        """Once, every line by itself, with room stretch by stretch."""
        _, num_ranks, most = self.copies_MPC.shape
        line_MI = np.take_along_axis(line_MP, self.rank_MI, axis=1)
        # Places in the arrays, flat.
        at_X = np.flatnonzero(self.over_MI > least)
        line_X = line_MI.ravel()[at_X]
        is_used = np.zeros(int(line_MP[-1, -1]) + 1, dtype=np.bool_)
        is_used[line_X] = True
        has_room_MP = is_used[line_MP] & (self.room_MP > least) & (self.used_MP < most)
        at_Y = np.flatnonzero(has_room_MP)
        if not len(at_X) or not len(at_Y):
            return
        line_Y = line_MP.ravel()[at_Y]
        stretch_Y = stretch_MP.ravel()[at_Y]
        over_X, room_Y = self.over_MI.ravel()[at_X], self.room_MP.ravel()[at_Y]
        # Lines lie after one another, each longer than anything on it.
        far = 2.0 * num_ranks
        by_size_X = np.argsort(line_X * far - over_X, kind="stable")
        by_size_Y = _by_stretch(stretch_Y, room_Y, self.most_room)
        at_X, line_X, over_X = at_X[by_size_X], line_X[by_size_X], over_X[by_size_X]
        at_Y, line_Y, room_Y = at_Y[by_size_Y], line_Y[by_size_Y], room_Y[by_size_Y]
        begin_X, begin_Y = begins(over_X, line_X), begins(room_Y, line_Y)
        end_X, end_Y = begin_X + over_X, begin_Y + room_Y
        first_Y = np.searchsorted(begin_X + line_X * far, begin_Y + line_Y * far, side="right") - 1
        from_Y, to_Y, least_Y = begin_Y, end_Y, None
        if far_load:
            from_Y, to_Y = _of_stretches(begin_Y, end_Y, stretch_Y[by_size_Y])
            least_Y = far_load / self.mean_M1[at_Y // num_ranks, 0]
        for step in range(most):
            piece_Y = np.minimum(first_Y + step, len(over_X) - 1)
            taken_Y = np.minimum(end_X[piece_Y], end_Y) - np.maximum(begin_X[piece_Y], begin_Y)
            is_taken_Y = (taken_Y > least) & (line_X[piece_Y] == line_Y)
            if step:
                is_taken_Y &= (first_Y + step < len(over_X)) & (self.used_MP.ravel()[at_Y] < most)
            if least_Y is not None:
                there_Y = np.minimum(end_X[piece_Y], to_Y) - np.maximum(begin_X[piece_Y], from_Y)
                is_taken_Y &= there_Y >= least_Y
            if self.rank_MI is not self.owner_ME:
                is_taken_Y &= self._owner_X(at_X)[piece_Y] != at_Y % num_ranks
            y = np.flatnonzero(is_taken_Y)
            if not len(y):
                continue
            self._move(at_Y[y], at_X[piece_Y[y]], taken_Y[y])

    def by_room_MP(self) -> Integers:
        """Nodes of all layers by number: of each layer those with the most room first."""
        layers, number = len(self.room_MP), self.nodes.number
        is_free_MP = self.used_MP < self.copies_MPC.shape[2]
        firsts = np.arange(0, self.room_MP.shape[1], self.nodes.per_node)
        room_MN = np.add.reduceat(self.room_MP * is_free_MP, firsts, axis=1)
        place_MN = np.empty((layers, number), dtype=np.int64)
        places_MN = np.arange(layers * number).reshape(layers, number)
        np.put_along_axis(place_MN, np.argsort(-room_MN, axis=1, kind="stable"), places_MN, axis=1)
        return place_MN.repeat(self.nodes.per_node, axis=1)[:, : self.room_MP.shape[1]]

    def _owner_X(self, at_X: Integers) -> Integers:
        """Of the experts of items, by flat places in [M, I]."""
        return self.owner_ME[at_X // self.expert_MI.shape[1], self.expert_MI.ravel()[at_X]]

    def _move(self, at_T: Integers, item_T: Integers, amount_T: Amounts) -> None:
        """From items to each rank at most once; by flat places in [M, P] and [M, I]."""
        self._hold(at_T, self.expert_MI.ravel()[item_T])
        self.room_MP.reshape(-1)[at_T] -= amount_T
        moved_X = np.bincount(item_T, amount_T, self.over_MI.size)
        self.over_MI -= moved_X.reshape(self.over_MI.shape)

    def _hold(self, at_T: Integers, expert_T: Integers) -> None:
        """A copy more on each of these ranks, flat in [M, P], that has none of the expert."""
        used, most = self.used_MP.reshape(-1), self.copies_MPC.shape[2]
        is_new_T = used[at_T] == 0
        some = np.flatnonzero(~is_new_T)
        held_XC = self.copies_MPC.reshape(-1, most)[at_T[some]]
        is_new_T[some] = (held_XC != expert_T[some, None]).all(1)
        at_T, expert_T = at_T[is_new_T], expert_T[is_new_T]
        self.copies_MPC.reshape(-1)[at_T * most + used[at_T]] = expert_T
        used[at_T] += 1


def _on_grid(amounts: Amounts) -> Amounts:
    """Rounded so that sums over all layers are exact: a layer's plan does not hang on those that are planned with it."""
    return np.round(amounts * GRID) / GRID


def _hottest_first(loads_ME: Amounts, owner_ME: Integers, over_MP: Amounts) -> Amounts:
    """[M, E]: of each expert's load what is given away if each rank gives `over_MP`, its hottest expert first."""
    is_over_ME = np.take_along_axis(over_MP, owner_ME, axis=1) > 0
    layer_X, expert_X = np.nonzero(is_over_ME)
    rank_X = owner_ME[layer_X, expert_X] + layer_X * over_MP.shape[1]
    load_X = loads_ME[layer_X, expert_X]
    order = np.lexsort((-load_X, rank_X))
    load_X, rank_X = load_X[order], rank_X[order]
    left_X = over_MP.ravel()[rank_X] - begins(load_X, rank_X)
    given_ME = np.zeros_like(loads_ME)
    given_ME[layer_X[order], expert_X[order]] = np.clip(left_X, 0.0, load_X)
    return given_ME


def _of_stretches(begin_Y: Amounts, end_Y: Amounts, stretch_Y: Integers) -> tuple[Amounts, Amounts]:
    """Where the stretch of each begins and ends; those of a stretch are next to each other."""
    first_N = np.flatnonzero(np.diff(stretch_Y, prepend=-1))
    number_N = np.diff(first_N, append=len(stretch_Y))
    return begin_Y[first_N].repeat(number_N), end_Y[first_N + number_N - 1].repeat(number_N)


def _by_stretch(stretch_Y: Integers, room_Y: Amounts, most: float) -> Integers:
    """An order in which those of a stretch are next to each other, the ones with the most room first, of at most `most`."""
    # Numbers of 16 bits are sorted by radix, ten times as fast.
    by_room_Y = np.argsort(((1.0 - room_Y / most) * 65535).astype(np.uint16), kind="stable")
    stretch_Y = stretch_Y[by_room_Y]
    short = stretch_Y.max() < 2**16
    return by_room_Y[np.argsort(stretch_Y.astype(np.uint16) if short else stretch_Y, kind="stable")]
