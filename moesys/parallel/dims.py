"""Who works with whom, as integers. No torch, no process group.

Ranks 0..world-1 are factored as (edp, ep), ep varying fastest, so that an expert group is a run of
neighbouring ranks (inside one node where it fits). Every rank is also a data-parallel rank: dp == edp * ep.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degrees of one run. Raises ValueError when they do not factor the world."""

    world_size: int
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.ep < 1:
            raise ValueError(f"world_size={self.world_size} and ep={self.ep} must be at least 1")
        if self.world_size % self.ep:
            raise ValueError(f"parallel.ep={self.ep} must divide the world size {self.world_size}")

    @property
    def dp(self) -> int:
        """Ranks that see different tokens; dense parameters are replicated over them."""
        return self.world_size

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // self.ep

    def ep_ranks(self, rank: int) -> list[int]:
        """The ranks that share out one set of experts with `rank`, in the order of their experts."""
        first = rank - rank % self.ep
        return list(range(first, first + self.ep))

    def edp_ranks(self, rank: int) -> list[int]:
        """The ranks that hold the same experts as `rank`."""
        return list(range(rank % self.ep, self.world_size, self.ep))
