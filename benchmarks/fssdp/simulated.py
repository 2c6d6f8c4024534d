"""How much faster layers of large jobs get on real clusters with copies of experts: the planner of training, the shares and routes
that it would carry out, and a model of time (layer_time.py) in the place of machines.

An expert group has at most as many ranks as a layer has experts. Larger jobs have more groups, each with tokens of its own; all
follow one plan, made from the loads of all, and the slowest sets the pace.

Exact: every row of every rank of every group in the simulated steps, where it goes, and by which links; copies, and their ways.
Drawn: loads (loads.py). Assumed: that copies take the fastest of the routes, that micro-steps of a step are alike, that the layers
which were simulated tell which group of a job is slowest, and what layer_time.py leaves out. Plans are those of the largest job
with groups of a size.

Shapes: S simulated steps, M simulated layers, G groups, P ranks of a group, E experts, W steps that were recorded.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import yaml

from benchmarks.fssdp.layer_time import (
    CHUNK_BYTES,
    GRADIENT_BYTES,
    micro_step_seconds,
    moving_seconds,
    routes_of,
    rows_per_copy,
    rows_PP,
    waited_seconds,
)
from benchmarks.fssdp.loads import drawn, drifting, zipf_shares
from benchmarks.fssdp.machines import CLUSTERS, LAYERS, Layer
from benchmarks.results import ROOT, Cell
from moesys.config.placement_schema import PlacementConfig
from moesys.plan.expert_copies import better_owners, planned_placements
from moesys.plan.load_prediction import predicted_loads
from moesys.plan.placement import Amounts, Integers, Placement, even_owners, owners_alone
from moesys.plan.shares import Shares

RANKS = (64, 128, 256, 512, 1024, 2048, 4096)
ZIPFS = (0.0, 0.6, 1.0, 1.2)
POLICIES = ("fixed", "balanced", "hecate", "eplb", "everywhere")
"""Presets of configs/placement."""
PER_NODE = CLUSTERS[0].per_node
"""Of all clusters."""


def _preset(policy: str) -> PlacementConfig:
    path = ROOT / "configs" / "placement" / f"{policy}.yaml"
    return PlacementConfig(**yaml.safe_load(path.read_text()))


PRESETS = {policy: _preset(policy) for policy in POLICIES}
OWNERS_STEPS = PRESETS["eplb"].every_steps
"""Between looks for other owners, of all policies."""
FIRST_STEP = 5
"""That is planned: all before are known."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is simulated."""

    ranks: Sequence[int] = RANKS
    zipfs: Sequence[float] = ZIPFS
    num_layers: int = 4
    ages: Sequence[int] = (6, 18)
    """Of the last look for other owners, in each simulated step: their mean is that of all steps until the next one."""


QUICK = Sizes(ranks=RANKS[:2], zipfs=(0.0, 1.0), num_layers=1, ages=(12,))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Groups of one size."""

    layer: Layer
    zipf: float
    num_ranks: int
    """Of a group."""
    groups: int
    num_layers: int
    ages: Sequence[int]

    @property
    def slots(self) -> int:
        """Of a rank's micro-step."""
        return self.layer.tokens * self.layer.top_k


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One layer's experts in a step."""

    placement: Placement
    waited: Mapping[str, float]
    """By cluster, seconds: for copies, and for experts that moved."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of a policy in a case."""

    seconds: Mapping[str, Amounts]
    """[S, M, G] by cluster: of a layer's forwards and backwards in a step."""
    levels_SMG: Amounts
    """Rows of the busiest rank over the mean."""
    copies_SMG: Amounts
    """That a rank holds, mean."""

    @classmethod
    def empty(cls, *shape: int) -> Self:
        return cls(
            seconds={cluster.name: np.zeros(shape) for cluster in CLUSTERS},
            levels_SMG=np.zeros(shape),
            copies_SMG=np.zeros(shape),
        )


def simulated_rows(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    """One for each cluster, layer, number of ranks, skew and policy; about a minute of a free core. Deterministic."""
    sizes = QUICK if quick else Sizes()
    rows: list[dict[str, Cell]] = []
    for layer in LAYERS:
        for zipf in sizes.zipfs:
            progress(f"{layer.name}, Zipf {zipf}")
            for case, jobs in cases(layer, zipf, sizes):
                found = simulate(case)
                rows += [row for ranks in jobs for row in rows_of(case, ranks, found)]
    names = [cluster.name for cluster in CLUSTERS]
    return sorted(rows, key=lambda row: names.index(str(row["cluster"])))


def cases(layer: Layer, zipf: float, sizes: Sizes) -> Iterator[tuple[Case, list[int]]]:
    """Each size of groups, and the ranks of jobs with such groups."""
    jobs: dict[int, list[int]] = {}
    for ranks in sizes.ranks:
        jobs.setdefault(min(ranks, layer.num_experts), []).append(ranks)
    for num_ranks, of_size in jobs.items():
        case = Case(
            layer=layer,
            zipf=zipf,
            num_ranks=num_ranks,
            groups=max(of_size) // num_ranks,
            num_layers=sizes.num_layers,
            ages=sizes.ages,
        )
        yield case, of_size


def rows_of(case: Case, ranks: int, found: Mapping[str, Found]) -> Iterator[dict[str, Cell]]:
    """Of a job with the first of the case's groups, whose step takes as long as the slowest one's."""
    groups = ranks // case.num_ranks
    copy_bytes = (CHUNK_BYTES + GRADIENT_BYTES) * case.layer.expert_parameters
    for cluster in CLUSTERS:
        ms = {
            policy: 1e3 * float(of.seconds[cluster.name][..., :groups].mean(1).max(1).mean())
            for policy, of in found.items()
        }
        for policy, of in found.items():
            copies = float(of.copies_SMG[..., :groups].mean())
            yield {
                "cluster": cluster.name,
                "model": case.layer.name,
                "ranks": ranks,
                "zipf": case.zipf,
                "policy": policy,
                "layer_ms": round(ms[policy], 3),
                "speedup": round(ms["fixed"] / ms[policy], 3),
                "max_over_mean": round(float(of.levels_SMG[..., :groups].max(2).mean()), 3),
                "copies_mib_per_rank": round(copies * copy_bytes / 2**20, 1),
            }


def simulate(case: Case) -> dict[str, Found]:
    """By policy."""
    rng = np.random.default_rng([round(100 * case.zipf), case.num_ranks, case.layer.num_experts])
    shares_WME, loads_WME = _trace(case, rng)
    shape = len(case.ages), case.num_layers, case.groups
    found = {policy: Found.empty(*shape) for policy in POLICIES}
    for s, age in enumerate(case.ages):
        step = FIRST_STEP + OWNERS_STEPS + age
        planned = {policy: planned_ahead(case, policy, loads_WME[:step]) for policy in POLICIES}
        for m in range(case.num_layers):
            for g in range(case.groups):
                counts_PE = drawn(rng, shares_WME[step, m], case.slots, case.num_ranks)
                for policy, placed_M in planned.items():
                    placed = placed_M[m] if placed_M else _after_routing(case, policy, counts_PE)
                    _serve(case, placed, counts_PE, found[policy], (s, m, g))
    return found


def _trace(case: Case, rng: np.random.Generator) -> tuple[Amounts, Integers]:
    """[W, M, E]: each expert's share of slots, and the slots that all groups sent it in the step."""
    steps, layer = FIRST_STEP + 2 * OWNERS_STEPS, case.layer
    shares_E = zipf_shares(layer.num_experts, case.zipf, layer.top_k)
    shares_WME = np.stack([drifting(rng, steps, shares_E) for _ in range(case.num_layers)], axis=1)
    slots = case.slots * layer.micro_steps * case.num_ranks * case.groups
    return shares_WME, drawn(rng, shares_WME, slots)


def planned_ahead(case: Case, policy: str, loads_WME: Integers) -> list[Placed]:
    """Each layer's in the step after these; none where rows decide in the step."""
    config = PRESETS[policy]
    if config.makes_copies and not config.plans_ahead:
        return []

    def foretold(step: int) -> list[Amounts]:
        return [*predicted_loads(loads_WME[:step], config.predictor, config.window_steps)]

    owners_M = before_M = _even_owners(case)
    if config.reshard_every_steps:
        for look in range(FIRST_STEP, len(loads_WME) + 1, config.reshard_every_steps):
            budget = case.num_ranks, PER_NODE, _copy_in_rows(case, config)
            before_M = owners_M
            owners_M = better_owners(config, foretold(look), owners_M, *budget) or owners_M
    as_of = len(loads_WME) - (len(loads_WME) - FIRST_STEP) % config.every_steps
    now_M = _placements(case, config, foretold(as_of), owners_M)
    if policy == "eplb":
        last_M = _placements(case, config, foretold(as_of - config.every_steps), owners_M)
        before_M = [placement.owner_E for placement in last_M]
    return [_placed(case, config, *both) for both in zip(before_M, now_M, strict=True)]


def _after_routing(case: Case, policy: str, counts_PE: Integers) -> Placed:
    """Decided by a group's rows."""
    loads_E, owner_E = counts_PE.sum(0).astype(np.float64), _even_owners(case)[0]
    (placement,) = _placements(case, PRESETS[policy], [loads_E], [owner_E])
    return _placed(case, PRESETS[policy], owner_E, placement)


def _placed(
    case: Case, config: PlacementConfig, before_E: Integers, placement: Placement
) -> Placed:
    """A step pays its part of what moved at the last look for other owners."""
    routes = routes_of(placement, PER_NODE)
    owners = before_E, placement.owner_E
    waited = {
        cluster.name: waited_seconds(cluster, case.layer, routes, config.plans_ahead)
        + moving_seconds(cluster, case.layer, *owners, case.num_ranks) / OWNERS_STEPS
        for cluster in CLUSTERS
    }
    return Placed(placement=placement, waited=waited)


def _placements(
    case: Case, config: PlacementConfig, loads_M: list[Amounts], owners_M: list[Integers]
) -> list[Placement]:
    """As training plans them."""
    if not config.makes_copies:
        return [owners_alone(owner_E, case.num_ranks) for owner_E in owners_M]
    budget = case.num_ranks, PER_NODE, _copy_in_rows(case, config)
    return planned_placements(config, loads_M, owners_M, *budget)


def _even_owners(case: Case) -> list[Integers]:
    return [even_owners(case.layer.num_experts, case.num_ranks)] * case.num_layers


def _copy_in_rows(case: Case, config: PlacementConfig) -> float:
    """As training counts them: of all groups, whose loads are planned together."""
    return rows_per_copy(case.layer) * case.groups if config.near else math.inf


def _serve(
    case: Case, placed: Placed, counts_PE: Integers, found: Found, at: tuple[int, int, int]
) -> None:
    """One group's rows of one layer, and what the step has of it."""
    sent_PP = rows_PP(Shares.of(counts_PE, placed.placement, PER_NODE))
    rows_P = sent_PP.sum(0)
    found.levels_SMG[at] = rows_P.max() / rows_P.mean()
    found.copies_SMG[at] = (placed.placement.copies_PC >= 0).sum() / case.num_ranks
    for cluster in CLUSTERS:
        micro_step = micro_step_seconds(cluster, case.layer, sent_PP)
        found.seconds[cluster.name][at] = (
            case.layer.micro_steps * micro_step + placed.waited[cluster.name]
        )
