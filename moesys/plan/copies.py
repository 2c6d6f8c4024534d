"""Which ranks hold copies of which experts for a step, so that all have about equal loads. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another), C copies that a rank may hold of each layer,
X pieces of loads (donations) that overloaded ranks give away, Y ranks with room.

Loads of all layers are planned at once: each layer, or each node of each layer, is a line of its own in flat arrays.
"""

import numpy as np
from numpy.typing import NDArray

from moesys.plan.lines import begins
from moesys.plan.placement import Amounts, Integers, Nodes

LEAST = 0.01
"""Of a rank's mean load: a smaller piece is not worth a copy."""
ROUNDS = 3


def balancing_copies(
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    most_copies: int,
    near_ME: NDArray[np.bool_] | None = None,
    tolerance: float = 0.0,
) -> Integers:
    """int64 [M, P, C], -1 = none: the hottest experts of ranks with too much, on ranks with room, on their own node first.

    With `near_ME` every node first gets a copy of each of these experts, the hottest first as far as its ranks have places, so
    that rows for them need not leave it. A layer whose busiest rank then has at most `tolerance` more than the mean, of which it
    is a share, gets no more.

    What overloaded ranks then have above the mean, expert by expert from the hottest, is laid on a line beside the room of the
    others, the largest beside the largest. Where a piece lies beside a rank's room the rank gets a copy, so that about as few
    are made as there are pieces and ranks with room; a rank takes `most_copies` at most, and what is then left is laid
    again.
    """
    state = _State(loads_ME, owner_ME, num_ranks, per_node, most_copies)
    if most_copies == 0 or num_ranks == 1:
        return state.copies_MPC
    if near_ME is not None and near_ME.any():
        state.bring_near(near_ME)
    state.find_room(tolerance)
    layer_M1 = np.arange(len(loads_ME))[:, None]
    if 1 < per_node < num_ranks:
        state.lay(layer_M1 * state.nodes.number + state.nodes.node_P)
    for _ in range(ROUNDS):
        if not state.lay(np.broadcast_to(layer_M1, state.used_MP.shape)):
            break
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
        layers = len(loads_ME)
        self.owner_ME = owner_ME
        self.nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
        mean_M1 = np.maximum(loads_ME.sum(1, keepdims=True), 1e-30) / num_ranks
        self.at_owner_ME = loads_ME / mean_M1
        """Of each expert's load what its owner has."""
        self.elsewhere_MP = np.zeros((layers, num_ranks))
        """What each rank has of other ranks' experts, by copies near the rows."""
        self.used_MP = np.zeros((layers, num_ranks), dtype=np.int64)
        """Copies that each rank has."""
        self.copies_MPC = np.full((layers, num_ranks, most_copies), -1, dtype=np.int64)

    def bring_near(self, near_ME: NDArray[np.bool_]) -> None:
        """These experts to a rank of every node: from the first rank to the last and back, the hottest first."""
        near_M, nodes = near_ME.sum(1), self.nodes
        most = min(int(near_M.max()), nodes.per_node * self.copies_MPC.shape[2])
        by_load_ME = np.argsort(np.where(near_ME, -self.at_owner_ME, 1.0), axis=1, kind="stable")
        layer_M, node_N = np.arange(len(near_M)), np.arange(nodes.number)
        for turn in range(most):
            there, place = divmod(turn, nodes.per_node)
            rank_N = node_N * nodes.per_node + (
                place if there % 2 == 0 else nodes.per_node - 1 - place
            )
            expert_M = by_load_ME[:, turn]
            owner_M = self.owner_ME[layer_M, expert_M]
            is_away_MN = (nodes.node_P[owner_M][:, None] != node_N) & (turn < near_M)[:, None]
            layer_T, node_T = np.nonzero(is_away_MN & (rank_N < self.used_MP.shape[1]))
            rank_T, expert_T = rank_N[node_T], expert_M[layer_T]
            part_M = self.at_owner_ME[layer_M, expert_M] / nodes.number
            self._hold(layer_T * self.used_MP.shape[1] + rank_T, expert_T)
            self.elsewhere_MP[layer_T, rank_T] += part_M[layer_T]
            np.subtract.at(self.at_owner_ME, (layer_T, expert_T), part_M[layer_T])

    def find_room(self, tolerance: float) -> None:
        """Which ranks have too much, and of which experts, and which have room."""
        layers, num_ranks = self.used_MP.shape
        rank_of_all = self.owner_ME + np.arange(layers)[:, None] * num_ranks
        own_X = np.bincount(rank_of_all.ravel(), self.at_owner_ME.ravel(), layers * num_ranks)
        has_MP = own_X.reshape(layers, num_ranks) + self.elsewhere_MP
        is_level_M1 = has_MP.max(1, keepdims=True) <= 1.0 + tolerance
        over_MP = np.where(is_level_M1, 0.0, np.maximum(has_MP - 1.0, 0.0))
        self.over_ME = _hottest_first(self.at_owner_ME, self.owner_ME, over_MP)
        """Of each expert's load what its owner wants to give away."""
        self.room_MP = np.maximum(1.0 - has_MP, 0.0)

    def lay(self, line_MP: Integers) -> bool:
        """Once, every line by itself; return whether anything found a place."""
        _, num_ranks, most = self.copies_MPC.shape
        line_ME = np.take_along_axis(line_MP, self.owner_ME, axis=1)
        # Places in the arrays, flat.
        at_X = np.flatnonzero(self.over_ME > LEAST)
        line_X = line_ME.ravel()[at_X]
        is_used = np.zeros(int(line_MP[-1, -1]) + 1, dtype=np.bool_)
        is_used[line_X] = True
        has_room_MP = is_used[line_MP] & (self.room_MP > LEAST) & (self.used_MP < most)
        at_Y = np.flatnonzero(has_room_MP)
        if not len(at_X) or not len(at_Y):
            return False
        line_Y = line_MP.ravel()[at_Y]
        over_X, room_Y = self.over_ME.ravel()[at_X], self.room_MP.ravel()[at_Y]
        # Lines lie after one another, each longer than anything on it.
        far = 2.0 * num_ranks
        by_size_X = np.argsort(line_X * far - over_X, kind="stable")
        by_size_Y = np.argsort(line_Y * far - room_Y, kind="stable")
        at_X, line_X, over_X = at_X[by_size_X], line_X[by_size_X], over_X[by_size_X]
        at_Y, line_Y, room_Y = at_Y[by_size_Y], line_Y[by_size_Y], room_Y[by_size_Y]
        begin_X, begin_Y = begins(over_X, line_X), begins(room_Y, line_Y)
        end_X, end_Y = begin_X + over_X, begin_Y + room_Y
        first_Y = np.searchsorted(begin_X + line_X * far, begin_Y + line_Y * far, side="right") - 1
        free_Y = most - self.used_MP.ravel()[at_Y]
        found = False
        for step in range(most):
            piece_Y = np.minimum(first_Y + step, len(over_X) - 1)
            taken_Y = np.minimum(end_X[piece_Y], end_Y) - np.maximum(begin_X[piece_Y], begin_Y)
            is_taken_Y = (taken_Y > LEAST) & (free_Y > 0) & (line_X[piece_Y] == line_Y)
            if step:
                is_taken_Y &= first_Y + step < len(over_X)
            y = np.flatnonzero(is_taken_Y)
            if not len(y):
                continue
            found = True
            self._take(at_Y[y], at_X[piece_Y[y]], taken_Y[y])
            free_Y[y] = most - self.used_MP.ravel()[at_Y[y]]
        return found

    def _take(self, at_T: Integers, expert_at_T: Integers, amount_T: Amounts) -> None:
        """Each rank at most once; by flat places in [M, P] and [M, E]."""
        expert_T = expert_at_T % self.over_ME.shape[1]
        held_TC = self.copies_MPC.reshape(-1, self.copies_MPC.shape[2])[at_T]
        is_new_T = ~(held_TC == expert_T[:, None]).any(1)
        self._hold(at_T[is_new_T], expert_T[is_new_T])
        self.room_MP.reshape(-1)[at_T] -= amount_T
        taken_X = np.bincount(expert_at_T, amount_T, self.over_ME.size)
        self.over_ME -= taken_X.reshape(self.over_ME.shape)

    def _hold(self, at_T: Integers, expert_T: Integers) -> None:
        used, slots = self.used_MP.reshape(-1), self.copies_MPC.shape[2]
        self.copies_MPC.reshape(-1)[at_T * slots + used[at_T]] = expert_T
        used[at_T] += 1


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
