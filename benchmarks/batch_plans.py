"""How long batches of sequences of any length take by each planner's plan, over what even work would, under our costs. No GPU.

Shapes: S sequences.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks.results import Cell, Result
from moesys.config.compose import compose
from moesys.plan.batch.cost import AttentionKind, BatchCosts, costs_of
from moesys.plan.batch.delay import Delayed, OutlierDelay, delayed
from moesys.plan.batch.partition import sorted_greedy
from moesys.plan.batch.policies import POLICIES, batch_seconds, planned
from moesys.plan.batch.static import balanced
from moesys.plan.placement import Integers

DESCRIPTION = "plans of batches: seconds over even work, by planner and lengths"
CAPACITY = 8192
STEPS = 4
"""A batch fills ranks so many times, less what the last sequence is too long."""
BATCHES = 5
TOGETHER = {True: "in layers", False: "in rings"}
"""Where ranks meet."""

Lengths = Callable[[np.random.Generator, int], Integers]


def _sequences(
    rng: np.random.Generator, num_ranks: int, *, middle: float, spread: float, tail: float
) -> Integers:
    """Lognormal; a share of tokens in sequences of 0.2 to 0.8 of all that ranks have memory for at a time."""
    room = num_ranks * CAPACITY
    wanted = STEPS * room * 0.98
    lengths: list[int] = []
    while sum(lengths) < tail * wanted:
        lengths.append(int(room * rng.uniform(0.2, 0.8)))
    left = wanted - sum(lengths)
    while left > 0:
        length = int(min(max(rng.lognormal(np.log(middle), spread), 16), room * 0.8, left + 16))
        lengths.append(length)
        left -= length
    return rng.permutation(np.array(lengths, dtype=np.int64))


KINDS: Mapping[str, Lengths] = {
    "short": partial(_sequences, middle=700, spread=1.0, tail=0.0),
    "lognormal": partial(_sequences, middle=1500, spread=1.6, tail=0.0),
    "a tenth long": partial(_sequences, middle=700, spread=1.0, tail=0.1),
    "half long": partial(_sequences, middle=1500, spread=1.6, tail=0.5),
}


def _costs() -> dict[str, BatchCosts]:
    """Of a model at 400 TFLOP/s, whose rings have 50 GB/s and 5 us a layer; and one whose pieces and micro-steps cost something
    of their own, with windows in half of its layers."""
    model = compose(["model=qwen3_30b_a3b"]).model
    windows = BatchCosts(
        attention=(AttentionKind(pair_s=1e-9), AttentionKind(pair_s=1e-9, window=512)),
        token_s=8e-6,
        piece_s=1e-5,
        micro_step_s=1e-4,
        block_token_s=8e-8,
        hop_s=1e-6,
    )
    return {
        "qwen3_30b_a3b": costs_of(model, 4e14, bytes_per_s=5e10, hop_s=5e-6),
        "windows": windows,
    }


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    sizes = (8,) if quick else (8, 64)
    kinds = ("lognormal",) if quick else tuple(KINDS)
    batches = 1 if quick else BATCHES
    rows: list[dict[str, Cell]] = []
    took_s: dict[tuple[int, str], list[float]] = {}
    for name, costs in _costs().items():
        for num_ranks in sizes:
            for kind in kinds:
                rng = np.random.default_rng(0)
                lengths = [KINDS[kind](rng, num_ranks) for _ in range(batches)]
                for meets, together in TOGETHER.items():
                    over = _over_even(lengths, num_ranks, costs, meets, took_s)
                    where = {"costs": name, "ranks": num_ranks, "lengths": kind, "meet": together}
                    rows.append({**where, **over})
                    progress(" ".join(map(str, where.values())))
    rows += [
        {
            "ranks": num_ranks,
            "planner": policy,
            "plan_s": statistics.mean(took_s[num_ranks, policy]),
        }
        for num_ranks in sizes
        for policy in POLICIES
    ]
    rows += _delays(8 if quick else 60)
    hdp, flexsp = (statistics.mean(float(row[p] or 0) for row in rows if p in row) for p in ("hdp", "flexsp"))  # fmt: skip
    return Result(
        headline={"hdp_over_even_ratio": hdp, "flexsp_over_even_ratio": flexsp}, rows=rows
    )


def _over_even(
    batches: Sequence[Integers],
    num_ranks: int,
    costs: BatchCosts,
    meets: bool,
    took_s: dict[tuple[int, str], list[float]],
) -> dict[str, float | None]:
    """By planner, the mean over batches."""
    over: dict[str, float | None] = {}
    evens_s = [float(costs.work_s(lengths_S).sum()) / num_ranks for lengths_S in batches]
    for policy in POLICIES:
        ratios = []
        for lengths_S, even_s in zip(batches, evens_s, strict=True):
            began_s = time.process_time()
            plan = planned(policy, lengths_S, num_ranks, CAPACITY, costs, meets=meets)
            took_s.setdefault((num_ranks, policy), []).append(time.process_time() - began_s)
            ratios.append(batch_seconds(plan, costs, meets=meets) / even_s)
        over[policy] = statistics.mean(ratios)
    over["megatron"] = None
    if importlib.util.find_spec("megatron"):
        from benchmarks.peers.megatron_hybrid_cp import megatron_plan

        theirs = [megatron_plan(lengths_S, num_ranks, CAPACITY) for lengths_S in batches]
        over["megatron"] = statistics.mean(
            (batch_seconds(plan.plan, costs, meets=True) if meets else plan.seconds(costs)) / even_s
            for plan, even_s in zip(theirs, evens_s, strict=True)
        )
    return over


def _delays(num_batches: int) -> list[dict[str, Cell]]:
    """64 ranks as a mesh of 16 for context and 4 for data, batches of about two micro-steps, 2 % of sequences outliers."""
    costs = _costs()["qwen3_30b_a3b"]
    longest = 16 * CAPACITY
    rng = np.random.default_rng(0)
    batches: list[Integers] = []
    for _ in range(num_batches):
        lengths_S = rng.lognormal(np.log(2200), 1.0, 150)
        is_long_S = rng.random(150) < 0.02
        lengths_S[is_long_S] = longest * rng.uniform(0.3, 1.0, int(is_long_S.sum()))
        batches.append(np.clip(lengths_S, 1, longest).astype(np.int64))
    even_s = sum(float(costs.work_s(lengths_S).sum()) for lengths_S in batches) / 64
    rows: list[dict[str, Cell]] = []
    for levels in ((), (0.25,), (0.25, 0.5), (0.25, 0.375, 0.5, 0.75)):
        delay = OutlierDelay(
            least_tokens=tuple(int(longest * level) for level in levels),
            num_micro_batches=8,
            most_batches=10,
        )
        queue, total_s, waited = Delayed(), 0.0, [0]
        for index, lengths_S in enumerate(batches):
            is_last = index == num_batches - 1
            ids_S = np.arange(len(lengths_S))
            going, queue = delayed(queue, ids_S, lengths_S, delay, is_last=is_last)
            plan = balanced(going.lengths_S, 64, CAPACITY, 16, costs, sorted_greedy)
            total_s += batch_seconds(plan, costs, meets=True)
            waited.append(max((one.batches for one in queue.waiting), default=0))
        seconds = {"sorted": total_s / even_s, "waited_batches": max(waited)}
        rows.append({"levels of outliers": len(levels), **seconds})
    return rows
