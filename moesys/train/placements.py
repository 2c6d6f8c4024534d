"""Which ranks hold copies of which experts, planned before each step from the loads of the steps before.

Shapes: M MoE layers of all pipeline stages, E experts of the layer with the most, W ranks.
"""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import RunConfig
from moesys.models.transformer import Transformer
from moesys.moe.layer_placement import LayerPlacement
from moesys.moe.placed import Levels, PlacedDispatcher
from moesys.parallel.exchange import Traffic
from moesys.parallel.links import measured_links
from moesys.parallel.mesh import Meshes
from moesys.plan.calibration import Pace, calibrated
from moesys.plan.chunk_routes import ChunkRoute, chunk_route, fastest_route
from moesys.plan.copy_bytes import chunk_bytes, copy_in_rows, row_bytes, travels
from moesys.plan.costs import expert_parameters
from moesys.plan.expert_copies import MOST_RANKS, better_owners, planned_placements
from moesys.plan.links import Links
from moesys.plan.load_prediction import predicted_loads, prediction_errors, steps_needed
from moesys.plan.overlap import AHEAD_STEPS, overlap_degree
from moesys.plan.pipeline import layers_of_ranks
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.sharding import first_owners, moved
from moesys.train.placement_figures import PlacementFigures
from moesys.train.rank_speeds import RankSpeeds
from moesys.train.resharding import reshard


class _Loads(NamedTuple):
    """Of a step, over all ranks."""

    step: int
    load_ME: Integers
    """Of experts; of layers that have fewer, 0 at the end."""


class _Layer(NamedTuple):
    """Of this rank."""

    placement: LayerPlacement
    dispatcher: PlacedDispatcher


class _Plan(NamedTuple):
    """Of all layers."""

    placed_M: list[Placement]
    predicted_ME: Amounts
    """The loads that it was made from."""
    overlap_degree: int
    """That it was made by, set or measured."""


class Placements:
    """Of one run, on every rank. Every rank finds the same plan from the same loads."""

    def __init__(
        self,
        config: RunConfig,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        meshes: Meshes,
    ) -> None:
        self._config, self._optimizer, self._meshes = config.placement, optimizer, meshes
        has_copies = meshes.copies_group is not None
        self._per_node = meshes.ep_per_node if has_copies else 1
        self._nodes = meshes.ep_nodes if has_copies else 1
        self._layers = {
            index: _Layer(layer.placement, layer.dispatcher)
            for index, layer in model.moe_places().items()
            if layer.placement is not None and isinstance(layer.dispatcher, PlacedDispatcher)
        }
        """Of this rank, by their place among all."""
        experts_M = [config.model.moe_of(layer).num_experts for layer in config.model.moe_layers]
        self._owners_M = first_owners(experts_M, meshes.dims.ep) if meshes.dims.ep > 1 else []
        self._layers_of_ranks = [
            [
                config.model.moe_layers.index(layer)
                for layer in layers
                if layer in config.model.moe_layers
            ]
            for layers in layers_of_ranks(config.model, config.parallel, config.data.seq_len)
        ]
        """Of each pipeline rank, places of its MoE layers."""
        # The same for all steps, also where these differ: a resume makes the plan in force again.
        micro_steps = config.train.micro_steps(meshes.dims.dp)
        self._rows_per_copy = copy_in_rows(config, micro_steps) * meshes.dims.edp
        """Of a step's loads, which are of all groups."""
        self._chunk_bytes = chunk_bytes(config, micro_steps)
        """Of an expert on its way, there or back."""
        self._travels = sum(travels(config, micro_steps))
        self._row_bytes = row_bytes(config)
        self._products = 3 if config.train.recompute == "none" else 4
        """A forward's, of which each has two in the backward, where it may be done again."""
        self._copy_bytes = (
            expert_parameters(config.model) * config.train.compute_bytes / config.parallel.etp
        )
        """There."""
        self._links: Links | None = None
        self._ahead: list[tuple[int, float]] = []
        """Of the first steps, their numbers and how many seconds a copy may travel for free."""
        self._needed = steps_needed(self._config.predictor, self._config.window_steps)
        # A resume between two plans makes the one in force again.
        most = self._needed + self._config.every_steps - 1
        self._history: deque[_Loads] = deque(maxlen=most)
        self._in_force: _Plan | None = None
        self._moved_experts, self._reshard_bytes = 0, 0
        self._times: RankSpeeds | None = None
        """Of ranks' experts, where they decide something."""
        self._speeds_P: Amounts | None = None
        """In force."""
        if self._is_used and (self._config.speeds == "measured" or self._calibrates):
            rank, device = (
                meshes.expert.get_local_rank("ep"),
                torch.device(meshes.expert.device_type),
            )
            later = self._config.every_steps - 1
            self._times = RankSpeeds(rank, meshes.dims.ep, device, later)
            for layer in self._layers.values():
                layer.placement.experts.timed = self._times.timed

    @property
    def state(self) -> dict[str, Any] | None:
        """For a checkpoint: what the next plan, or the one in force, is made from."""
        if not self._is_used:
            return None
        return {
            "loads": [[loads.step, loads.load_ME.tolist()] for loads in self._history],
            "owners": [owner_E.tolist() for owner_E in self._owners_M],
            "ranks": self._meshes.dims.ep,
            "nodes": self._nodes,
            "links": None if self._links is None else self._links.told(),
            "ahead": [[step, seconds] for step, seconds in self._ahead],
            "times": None if self._times is None else self._times.state,
        }

    def at_resume(self, state: dict[str, Any] | None) -> None:
        """Go on with a checkpoint's loads, owners, links and times, as far as it is of these experts and ranks. Collective."""
        self._history.clear()
        self._ahead, self._in_force = [], None
        if self._times is not None:
            self._times.at_resume([])
        if state is None or not self._is_used:
            return
        owners_M = [np.array(owner_E, dtype=np.int64) for owner_E in state["owners"]]
        if list(map(len, owners_M)) != list(map(len, self._owners_M)):
            return
        for step, load_ME in state["loads"]:
            self._history.append(_Loads(step, np.array(load_ME, dtype=np.int64)))
        if state["ranks"] == self._meshes.dims.ep:
            self._reshard(owners_M)
            if self._times is not None and state.get("times"):
                self._times.at_resume(state["times"])
            # Routes say in which order gradients are summed: with others the run would not go on bit for bit.
            if state.get("links") and state["nodes"] == self._nodes:
                self._links = Links.of(state["links"])
                self._ahead = [(step, seconds) for step, seconds in state["ahead"]]

    def measure(self) -> dict[str, Any]:
        """How fast the links are, where that decides something: timed by the first call, but what a checkpoint told stays. As
        the start record has them. Collective."""
        group = self._meshes.copies_group
        needs = self._chooses_routes or self._measures_overlap or self._calibrates
        if self._links is None and self._is_used and needs and group is not None:
            device = torch.device(self._meshes.expert.device_type)
            self._links = measured_links(group, self._per_node, device)
        return {} if self._links is None else {"links": self._links.fields()}

    def begin(self, step: int, micro_steps: int) -> None:
        """Before the forwards of a step: plan where that is due, and tell the layers. Collective."""
        if not self._is_used:
            return
        self.measure()
        self._moved_experts, self._reshard_bytes = 0, 0
        self._speeds_P = self._speeds_as_of(step)
        for layer in self._layers.values():
            layer.dispatcher.levels, layer.dispatcher.speeds_P = Levels(), self._speeds_P
        if not self._config.plans_ahead:
            for index, layer in self._layers.items():
                after_routing = partial(self._planned_after_routing, index)
                layer.placement.plan_after_routing(after_routing, micro_steps)
            return
        # The first step knows no loads: a plan that would be due there is made before the second.
        last_plan = max(2, step - (step - 1) % self._config.every_steps)
        if step == last_plan or self._in_force is None:
            self._in_force = self._plan(step, last_plan)
        for index, layer in self._layers.items():
            if self._in_force is not None:
                placed = self._in_force.placed_M[index]
                layer.placement.take(*self._with_route(placed), micro_steps)
        if self._calibrates and self._in_force is not None:
            self._calibrate(step, micro_steps)

    def finish(self) -> None:
        """After the backwards of a step: the gradients of copies are at the owners. Collective."""
        for layer in reversed(self._layers.values()):
            layer.placement.finish()

    def observe(
        self, step: int, load_MX: Sequence[Sequence[int]], numbers: Sequence[float]
    ) -> None:
        """The loads of a step and the sums of all ranks' numbers, the same on all ranks."""
        if not self._is_used:
            return
        load_ME = [row[: self._most_experts] for row in load_MX]
        self._history.append(_Loads(step, np.array(load_ME, dtype=np.int64)))
        *_, ahead_us, forwards, _ = numbers[: 3 * len(self._owners_M) + 7]
        if self._measures_overlap and forwards and len(self._ahead) < AHEAD_STEPS:
            self._ahead.append((step, ahead_us / forwards / 1e6))
        if self._times is not None:
            self._times.observe(step, numbers[3 * len(self._owners_M) + 7 :])

    def numbers(self) -> list[float]:
        """What this rank adds to the step's figures: to be summed over ranks; as many on all. Read once."""
        if not self._is_used:
            return []
        levels_3M = np.zeros((3, len(self._owners_M)))
        for index, layer in self._layers.items():
            levels = layer.dispatcher.levels
            levels_3M[:, index] = levels.busiest, levels.if_owners_alone, levels.mean
        collectives = {layer.placement.collectives for layer in self._layers.values()}
        traffic = Traffic.total(each.meter.read() for each in collectives)
        ahead_s = [s for layer in self._layers.values() for s in layer.placement.taken_ahead_s()]
        return [
            *levels_3M.ravel().tolist(),
            traffic.sent_bytes,
            traffic.between_nodes_bytes,
            traffic.seconds,
            self._reshard_bytes,
            float(sum(round(seconds * 1e6) for seconds in ahead_s)),  # whole: exact in any order
            len(ahead_s),
            sum(layer.placement.taken_added() for layer in self._layers.values()),
            *(self._times.numbers() if self._times is not None else ()),
        ]

    def figures(self, numbers: Sequence[float]) -> PlacementFigures | None:
        """Of the sums of all ranks' numbers, once the step's loads are observed."""
        if not self._is_used:
            return None
        layers = len(self._owners_M)
        busiest_M, owner_M, mean_M = np.array(numbers[: 3 * layers]).reshape(3, layers)
        sent_bytes, between_bytes, seconds, reshard_bytes, _, _, added, *_ = numbers[3 * layers :]
        mean_M = np.where(mean_M > 0, mean_M, 1.0)
        return PlacementFigures(
            holders_ME=self._holders_ME(),
            busiest_rank_M=(busiest_M / mean_M).tolist(),
            busiest_owner_M=(owner_M / mean_M).tolist(),
            prediction_error_M=self._prediction_error_M(),
            sent_bytes=int(sent_bytes),
            between_nodes_bytes=int(between_bytes),
            moved_experts=self._moved_experts,
            reshard_bytes=int(reshard_bytes),
            wait_ms=seconds * 1e3 / self._meshes.dims.world_size,
            added_copies=int(added) if self._calibrates else None,
            overlap_degree=self._in_force.overlap_degree
            if self._in_force is not None and self._measures_overlap
            else None,
            speeds_P=None if self._speeds_P is None else self._speeds_P.tolist(),
        )

    def _holders_ME(self) -> list[list[int]]:
        if not self._config.plans_ahead:
            return []
        if self._in_force is None:
            return [[1] * len(owner_E) for owner_E in self._owners_M]
        return [np.diff(placed.pairs.start_X).tolist() for placed in self._in_force.placed_M]

    def _prediction_error_M(self) -> list[float]:
        if self._in_force is None:
            return []
        return prediction_errors(self._in_force.predicted_ME, self._history[-1].load_ME).tolist()

    @property
    def _is_used(self) -> bool:
        """The same on all ranks, also on those whose stage has no MoE layer."""
        return self._meshes.copies_group is not None and bool(self._owners_M)

    @property
    def _most_experts(self) -> int:
        return max(map(len, self._owners_M))

    def _plan(self, step: int, as_of: int) -> _Plan | None:
        """As it was to be planned before step `as_of`; None where no loads are known. Collective."""
        known = [loads.load_ME for loads in self._history if loads.step < as_of][-self._needed :]
        if not known:
            return None
        degree = self._overlap_degree(as_of)
        config = replace(self._config, overlap_degree=degree)
        loads_ME = predicted_loads(np.stack(known), config.predictor, config.window_steps)
        loads_M = [
            loads_E[: len(owner_E)]
            for loads_E, owner_E in zip(loads_ME, self._owners_M, strict=True)
        ]
        speeds_P = self._speeds_as_of(as_of)
        ranks = self._meshes.dims.ep, self._per_node, self._rows_per_copy, speeds_P
        every = config.reshard_every_steps
        # As with plans, a look that would be due before the first step is made before the second.
        if every and step == as_of and (step == 2 or (step - 1) % every == 0):
            owners_M = self._better_owners(config, loads_M, speeds_P)
            self._agree(owners_M)
            self._reshard(owners_M)
        planned_M = planned_placements(config, loads_M, self._owners_M, *ranks)
        self._agree([part for placed in planned_M for part in (placed.owner_E, placed.copies_PC)])
        if config.policy == "eplb":
            self._reshard([placed.owner_E for placed in planned_M])
        return _Plan(planned_M, loads_ME, degree)

    def _speeds_as_of(self, step: int) -> Amounts | None:
        """None where all are taken to be alike."""
        return (
            self._times.as_of(step)
            if self._times is not None and self._config.speeds == "measured"
            else None
        )

    @property
    def _calibrates(self) -> bool:
        """To look for copies takes too long in larger groups, while a layer waits."""
        config = self._config
        return config.calibrate and config.plans_ahead and self._meshes.dims.ep <= MOST_RANKS

    def _calibrate(self, step: int, micro_steps: int) -> None:
        """Add copies once a layer's true loads are known, where that pays: not before it is known how long rows take."""
        row_s = None if self._times is None else self._times.seconds_per_row(step)
        if row_s is None or self._links is None:
            return
        pace = Pace(
            row_s=self._products * row_s,
            row_bytes=0.0 if math.isinf(self._row_bytes) else self._row_bytes,
            chunk_bytes=self._chunk_bytes,
            travels=self._travels,
            micro_steps=micro_steps,
            links=self._links,
        )

        def more(counts_PE: Integers, placed: Placement) -> tuple[Placement, ChunkRoute] | None:
            limits = self._config.most_copies, self._per_node, pace
            return calibrated(
                counts_PE, placed, *limits, lambda added: self._with_route(added)[1], self._speeds_P
            )

        for layer in self._layers.values():
            layer.placement.calibrate_after_routing(more)

    def _overlap_degree(self, as_of: int) -> int:
        """As it was known before step `as_of`; before it was measured, of as many as a rank may hold."""
        config, ahead_s = self._config, [seconds for step, seconds in self._ahead if step < as_of]
        if config.overlap_degree is not None:
            return config.overlap_degree
        if self._links is None or len(ahead_s) < AHEAD_STEPS:
            return config.most_copies
        return overlap_degree(ahead_s, self._links, self._copy_bytes, self._most_experts)

    def _planned_after_routing(self, layer: int, loads_E: Integers) -> tuple[Placement, ChunkRoute]:
        """Of one layer, from the rows of its first forward."""
        (placed,) = planned_placements(
            self._config,
            [loads_E.astype(np.float64)],
            [self._owners_M[layer]],
            self._meshes.dims.ep,
            self._per_node,
        )
        return self._with_route(placed)

    def _with_route(self, placed: Placement) -> tuple[Placement, ChunkRoute]:
        if self._links is not None and self._chooses_routes:
            return placed, fastest_route(placed, self._per_node, self._chunk_bytes, self._links)
        kind = "direct" if self._config.route == "auto" else self._config.route
        return placed, chunk_route(placed, self._per_node, kind)

    @property
    def _chooses_routes(self) -> bool:
        """By measured links. On one node all ways are the same."""
        return self._config.route == "auto" and self._nodes > 1

    @property
    def _measures_overlap(self) -> bool:
        return self._config.overlap_degree is None and self._config.policy == "hecate"

    def _better_owners(
        self, config: PlacementConfig, loads_M: list[Amounts], speeds_P: Amounts | None
    ) -> list[Integers]:
        """For each pipeline rank by itself, whose memory it is."""
        owners_M = list(self._owners_M)
        for layers in filter(None, self._layers_of_ranks):
            found = better_owners(
                config,
                [loads_M[layer] for layer in layers],
                [owners_M[layer] for layer in layers],
                self._meshes.dims.ep,
                self._per_node,
                self._rows_per_copy,
                speeds_P,
            )
            for layer, owner_E in zip(layers, found or (), strict=False):
                owners_M[layer] = owner_E
        return owners_M

    def _reshard(self, owners_M: list[Integers]) -> None:
        """Collective."""
        self._moved_experts = len(moved(self._owners_M, owners_M))
        self._owners_M = owners_M
        self._reshard_bytes = reshard(
            {index: layer.placement for index, layer in self._layers.items()},
            {index: owners_M[index] for index in self._layers},
            self._optimizer,
            self._meshes.ep_group,
        )

    def _agree(self, planned: Sequence[Integers]) -> None:
        """Raise on all ranks if one has planned otherwise, before any waits for what nobody sends. Collective."""
        together = b"".join(part.tobytes() for part in planned)
        digest = int.from_bytes(hashlib.sha256(together).digest()[:7], "little")
        both = torch.tensor([digest, -digest], device=self._meshes.expert.device_type)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        highest, lowest = both.tolist()
        if highest != -lowest:
            raise RuntimeError(
                "ranks have planned different places of experts from the same loads: they must run the same versions "
                "of moesys and numpy, on processors that round alike; placement=fixed needs no plan"
            )
