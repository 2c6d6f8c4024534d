"""Who holds which experts of one layer, on this rank, for a step: what was planned, as it is carried out."""

import time
from collections.abc import Callable

from moesys.moe.copy_set import CopySet
from moesys.moe.held_experts import HeldExperts
from moesys.moe.layer_copies import LayerCopies
from moesys.parallel.sparse import SparseCollectives
from moesys.plan.chunk_routes import ChunkRoute, chunk_route, in_order_of_arrival
from moesys.plan.placement import Integers, Placement, owners_alone

Placed = tuple[Placement, ChunkRoute]
Plan = Callable[[Integers], Placed]
"""From the rows of each expert [E]; the same on all ranks."""
More = Callable[[Integers, Placement], Placed | None]
"""From the rows of each rank and expert [P, E], and what is held; the same on all ranks."""


class LayerPlacement:
    """Of one MoE layer. Copies are those of a step: its first forward starts to gather them, its last backward sends their
    gradients home. Without training, and before anything was planned, rows go to owners."""

    def __init__(
        self,
        experts: HeldExperts,
        owner_E: Integers,
        collectives: SparseCollectives,
        releases: bool = False,
    ) -> None:
        """`releases`: as `LayerCopies`."""
        self.experts, self.collectives, self.releases = experts, collectives, releases
        self.earlier: LayerPlacement | None = None
        """The layer whose backward comes next, on this rank."""
        self.later: LayerPlacement | None = None
        self.ahead_s: list[float] = []
        """Of training forwards, for how long copies might be on their way before they are needed."""
        self.added = 0
        """Copies that this rank held beside the planned ones."""
        self._entered_s = 0.0
        self._ahead_from_s: float | None = None
        self.own(owner_E)

    def own(self, owner_E: Integers) -> None:
        """From now on these are the owners: parameters and their optimizer states have moved."""
        self.owner_E = owner_E
        owners = owners_alone(owner_E, self.collectives.size)
        self.experts.own(owners.own(self.collectives.rank))
        nowhere = chunk_route(owners, self.collectives.per_node, "direct")
        self._without = self._made(owners, nowhere, 1)
        self._copies: LayerCopies | None = None
        self._plan: Plan | None = None
        self._more: More | None = None

    def take(self, placement: Placement, route: ChunkRoute, backwards: int) -> None:
        """For the next step, of so many micro-steps. What the last step had is finished."""
        self._copies = self._made(placement, route, backwards)

    def taken_ahead_s(self) -> list[float]:
        """`ahead_s`, from now on without these."""
        taken, self.ahead_s = self.ahead_s, []
        return taken

    def taken_added(self) -> int:
        """`added`, from now on without these."""
        taken, self.added = self.added, 0
        return taken

    def calibrate_after_routing(self, more: More) -> None:
        """In the next step: the first forward's rows decide whether there are more copies than were taken, for which it waits."""
        self._more = more

    def plan_after_routing(self, plan: Plan, backwards: int) -> None:
        """For the next step: the first forward's rows decide, and copies are waited for there."""
        self._plan, self._backwards = plan, backwards

    def enter(self) -> None:
        """The forward of its block begins. Collective."""
        self._entered_s = time.perf_counter()
        self.begin()

    def begin(self) -> None:
        """Start to gather, where that is still to be done in this step. Collective."""
        if self._copies is not None and self.experts.training:
            self._copies.begin()

    def begin_ahead(self) -> None:
        """Where nothing was gathered in this step: a recomputation of the block before comes when copies may be gone. Collective."""
        self._ahead_from_s = time.perf_counter()
        if self._copies is not None and not self._copies.was_begun:
            self.begin()

    def decide(self, counts_PE: Integers) -> LayerCopies:
        """Who serves the rows of one forward, of which each rank has so many."""
        if not self.experts.training:
            return self._without
        self.ahead_s.append(time.perf_counter() - (self._ahead_from_s or self._entered_s))
        if self._plan is not None:
            self.take(*self._plan(counts_PE.sum(0)), self._backwards)
            self._plan = None
        if self._copies is None:
            return self._without
        self._copies.advance()
        if self._more is not None:
            self._extend(self._copies, self._more(counts_PE, self._copies.placement))
            self._more = None
        return self._copies

    def finish(self) -> None:
        """Of a step: add the gradients of copies to those of owners. Collective."""
        if self._copies is not None:
            self._copies.finish()
            self._copies = None

    def _extend(self, copies: LayerCopies, found: Placed | None) -> None:
        if found is not None:
            more = self._set(*found)
            self.added += more.number
            copies.extend(more)

    def _set(self, placement: Placement, route: ChunkRoute) -> CopySet:
        return CopySet(
            experts=self.experts,
            placement=in_order_of_arrival(placement, route),
            route=route,
            collectives=self.collectives,
        )

    def _made(self, placement: Placement, route: ChunkRoute, backwards: int) -> LayerCopies:
        return LayerCopies(
            planned=self._set(placement, route),
            backwards=backwards,
            releases=self.releases,
            at_forward=self._at_forward,
            at_backward=self._at_backward,
            after_backward=self._after_backward,
        )

    # What crosses nodes while experts compute is in no exchange's way.

    def _at_forward(self) -> None:
        """Copies of the next layer set out under this one's experts."""
        if self.later is not None:
            self.later.begin_ahead()

    def _at_backward(self) -> None:
        """Gradients of the next layer's copies set out under the backward of this one's experts."""
        if self.later is not None:
            self.later._send_gradients()

    def _after_backward(self) -> None:
        """Released copies of the earlier layer come once this one's are gone. Nothing computes after the first layer's experts
        that its gradients could wait for."""
        if self.earlier is None:
            self._send_gradients()
        elif self.releases:
            self.earlier.begin()

    def _send_gradients(self) -> None:
        """Those of the next layer are through the first stage of their way meanwhile, and those of the one after it have come
        home: of two layers at most are on their way."""
        following = self.later
        if following is not None and following.later is not None:
            following.later._settle()
        if following is not None and following._copies is not None:
            following._copies.advance()
        if self._copies is not None:
            self._copies.send_gradients()

    def _settle(self) -> None:
        if self._copies is not None:
            self._copies.settle()
