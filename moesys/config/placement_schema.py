"""The section `placement` of schema.py: which ranks hold which experts, from step to step. Standard library only."""

from dataclasses import dataclass
from typing import Literal

PlacementPolicy = Literal["fixed", "balanced", "hecate", "everywhere", "eplb"]
Predictor = Literal["mean", "exponential", "last", "slope"]
RouteKind = Literal["direct", "star", "relay"]
SharesBy = Literal["even", "measured"]
RouteChoice = Literal["auto", RouteKind]


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Copies of experts on other ranks of parallel.ep than their owner, in training, so that all have as many rows to work
    on (FSSDP, 2502.02581). A copy is made before a step's first forward; its gradient goes to the owner, which alone has
    optimizer state."""

    policy: PlacementPolicy = "fixed"
    """fixed = no copies; balanced = those that level the loads, near the rows where that is as good; hecate = of each layer's
    hottest experts, in proportion to their loads (Hecate's algorithm 1); everywhere = each layer's hottest ones, once it has
    routed, on all ranks (FasterMoE); eplb = copies and owners packed anew, first over nodes (EPLB)."""
    copies: int | None = 2
    """Experts of each layer, beside its own, that a rank may hold. null = as many as the memory of a GPU allows, by formula."""
    tolerance: float = 0.05
    """balanced: a layer whose busiest rank is expected to have at most so much more than the mean, of which it is a share, gets
    no copies for its level."""
    spare: int = 0
    """balanced: in a layer that has copies a rank holds at least so many, of up to copies: those that level the predicted loads, and
    others in case loads come otherwise. In groups of up to 64 ranks."""
    near: bool = True
    """balanced: bytes between nodes count, where no codec leaves open how many rows there are. An expert of which a node has more
    rows than a copy and its gradient are bytes may get a copy there, so that the rows need not leave it; one on another node
    must take as many rows off its owner."""
    overlap_degree: int | None = 8
    """hecate: so many of each layer's hottest experts have copies. When owners change, the others are spread by their loads.
    null = as many as travel before a layer's experts need them, as measured in the first steps."""
    every_steps: int = 1
    """Optimizer steps between plans; until the next one the same experts are copied. Not of everywhere, which plans in the step."""
    reshard_every_steps: int = 0
    """Optimizer steps between looks whether with other owners, to whom experts move with their optimizer states, steps would take
    less time (balanced: nodes with equal loads; hecate: its algorithm 2); a multiple of every_steps. 0 = never."""
    predictor: Predictor = "exponential"
    """From the loads of the steps before to the next step's: mean of the last window_steps; exponential mean; last; slope =
    a line through them, as far as that was right before."""
    window_steps: int = 5
    """Optimizer steps that mean and slope look back, at least 1."""
    calibrate: bool = False
    """Once a layer has routed a step's first micro-step, more copies are made, on ranks that hold fewer than copies, where these save
    more time than they take: by links, and by how long rows took in the steps before. In groups of up to 64 ranks."""
    release: bool = False
    """Copies are freed after a forward and gathered again for its backward (Hecate-RM): memory for those of two layers, and
    half as many bytes again, of each micro-step. false = they stay for the step."""
    route: RouteChoice = "auto"
    """A copy's way: direct = from its owner; star = once from its owner to each node, and on from there; relay = from node
    to node, twice as many having it each time; auto = of each layer's copies the fastest, by links as measured at the start."""
    speeds: SharesBy = "even"
    """By which ranks that hold the same expert share its rows: even = all alike; measured = by how many rows a second each rank's
    experts took in the forwards of the last steps, where ranks differ by more than a few percent. balanced plans its copies by
    them too."""

    @property
    def makes_copies(self) -> bool:
        """Whether experts have other holders than their owners."""
        return self.policy != "fixed"

    @property
    def most_copies(self) -> int:
        """`copies` of a run, where memory has decided."""
        assert self.copies is not None, "config.copies.with_copies finds them before a run is built"
        return self.copies

    @property
    def plans_ahead(self) -> bool:
        """Whether copies are planned before a step, from the loads of those before."""
        return self.policy in ("balanced", "hecate", "eplb")
