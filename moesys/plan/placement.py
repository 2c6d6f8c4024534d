"""Where experts lie. Pure.

Shapes: E experts, P ranks, C copies that a rank may hold, H pairs of an expert and a rank that holds it.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Amounts = NDArray[np.float64]


def expert_places(num_experts: int, num_classes: int, num_ranks: int) -> list[int]:
    """The place of each of several widths' experts; the same numbers with one class or one rank.

    Experts are numbered class by class, whatever ep is. Every rank has an equal share of each class, so that ranks hold the
    same shapes. Places are numbered rank by rank, and within a rank class by class. `num_classes * num_ranks` divides experts.
    """
    per_class, share = num_experts // num_classes, num_experts // (num_classes * num_ranks)
    places = []
    for expert in range(num_experts):
        in_class, index = divmod(expert, per_class)
        rank, local = divmod(index, share)
        places.append((rank * num_classes + in_class) * share + local)
    return places


def even_owners(num_experts: int, num_ranks: int) -> Integers:
    """Rank p has experts p * E / P to (p + 1) * E / P - 1."""
    return np.arange(num_experts) // (num_experts // num_ranks)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nodes:
    """Ranks 0 .. P-1, `per_node` after one another on each node."""

    num_ranks: int
    per_node: int

    @property
    def node_P(self) -> Integers:
        return np.arange(self.num_ranks) // self.per_node

    @property
    def number(self) -> int:
        return -(-self.num_ranks // self.per_node)

    def sums(self, values_PX: NDArray) -> NDArray:
        """[N, X]: over the ranks of each node."""
        firsts = np.arange(0, self.num_ranks, self.per_node)
        return np.add.reduceat(values_PX, firsts, axis=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """One layer's experts. Each has an owner, which keeps its optimizer state; other ranks may hold copies of it."""

    owner_E: Integers
    copies_PC: Integers
    """Experts, -1 = none at the end of a row."""

    @property
    def num_experts(self) -> int:
        return len(self.owner_E)

    @property
    def num_ranks(self) -> int:
        return len(self.copies_PC)

    def own(self, rank: int) -> list[int]:
        """Experts whose owner the rank is, ascending."""
        return np.flatnonzero(self.owner_E == rank).tolist()

    def copies(self, rank: int) -> list[int]:
        """Of which it holds a copy, in their order."""
        return [e for e in self.copies_PC[rank].tolist() if e >= 0]

    def held(self, rank: int) -> list[int]:
        """In the order of its places: its own, then copies."""
        return self.own(rank) + self.copies(rank)

    @cached_property
    def places_per_rank(self) -> int:
        """Of the rank that holds the most. Place p * places_per_rank + i is the i-th of rank p."""
        own_P = np.bincount(self.owner_E, minlength=self.num_ranks)
        return int((own_P + (self.copies_PC >= 0).sum(1)).max())

    @cached_property
    def pairs(self) -> "Pairs":
        """Who holds what."""
        rank_X, column_X = np.nonzero(self.copies_PC >= 0)
        expert_H = np.concatenate([np.arange(self.num_experts), self.copies_PC[rank_X, column_X]])
        rank_H = np.concatenate([self.owner_E, rank_X])
        # Of each rank in the order of `held`: a stable sort keeps that of its own, and of its copies.
        by_place_H = np.argsort(rank_H, kind="stable")
        ranks = rank_H[by_place_H]
        local = np.arange(len(ranks)) - np.searchsorted(ranks, ranks)
        place_H = np.empty_like(rank_H)
        place_H[by_place_H] = ranks * self.places_per_rank + local
        by_expert_H = np.lexsort((rank_H, expert_H))
        expert_H = expert_H[by_expert_H]
        return Pairs(
            expert_H=expert_H,
            rank_H=rank_H[by_expert_H],
            place_H=place_H[by_expert_H],
            start_X=np.searchsorted(expert_H, np.arange(self.num_experts + 1)),
        )

    def holders_EP(self) -> NDArray[np.bool_]:
        """Which rank holds which expert."""
        holders_EP = np.zeros((self.num_experts, self.num_ranks), dtype=np.bool_)
        holders_EP[self.pairs.expert_H, self.pairs.rank_H] = True
        return holders_EP


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Experts and who holds them, in order of expert and rank."""

    expert_H: Integers
    rank_H: Integers
    place_H: Integers
    start_X: Integers
    """[E + 1]: those of expert e are start_X[e] to start_X[e + 1] - 1."""

    @cached_property
    def shared(self) -> Integers:
        """Experts that several ranks hold."""
        return np.flatnonzero(np.diff(self.start_X) > 1)

    def loads(self, amounts_H: NDArray, num_ranks: int) -> Amounts:
        """[P]: of all that each rank holds, if these are the pairs' amounts."""
        return np.bincount(self.rank_H, amounts_H, num_ranks).astype(np.float64)

    def of(self, expert: int) -> slice:
        return slice(int(self.start_X[expert]), int(self.start_X[expert + 1]))


def placement_of(owner_E: Integers, copies_PC: Integers) -> Placement:
    """With each rank's copies ascending."""
    last = len(owner_E)
    ordered = np.sort(np.where(copies_PC < 0, last, copies_PC), axis=-1)
    return Placement(owner_E=owner_E, copies_PC=np.where(ordered == last, -1, ordered))


def with_more_copies(placement: Placement, more_PC: Integers) -> Placement:
    """Each rank's copies, and after them those of `more_PC`, of which it has none yet."""
    both_PC = np.concatenate([placement.copies_PC, more_PC], axis=1)
    order_PC = np.argsort(both_PC < 0, axis=1, kind="stable")
    return replace(placement, copies_PC=np.take_along_axis(both_PC, order_PC, axis=1))


def owners_alone(owner_E: Integers, num_ranks: int) -> Placement:
    """Expert parallelism without copies."""
    return Placement(owner_E=owner_E, copies_PC=np.full((num_ranks, 0), -1, dtype=np.int64))


def problems(placement: Placement, most_copies: int) -> list[str]:
    """What keeps a placement from being executed, in words."""
    found = []
    owner_E, num_ranks = placement.owner_E, placement.num_ranks
    if ((owner_E < 0) | (owner_E >= num_ranks)).any():
        found.append(f"owners must be ranks 0 to {num_ranks - 1}: {owner_E.tolist()}")
    for rank, row in enumerate(placement.copies_PC.tolist()):
        copies = [e for e in row if e >= 0]
        if len(copies) > most_copies:
            found.append(
                f"rank {rank} holds {len(copies)} copies, at most {most_copies} are allowed"
            )
        if len(set(copies)) < len(copies) or copies != row[: len(copies)]:
            found.append(f"rank {rank}'s copies must be distinct, and -1 after them: {row}")
        if any(e >= placement.num_experts for e in copies):
            found.append(
                f"rank {rank} holds experts of {placement.num_experts} that there are not: {row}"
            )
        elif any(owner_E[e] == rank for e in copies):
            found.append(f"rank {rank} holds copies of experts that it owns: {row}")
    return found
