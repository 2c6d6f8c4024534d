"""Batches of documents shared out by plans: how much faster steps get, how well that is predicted, and how it goes on with more ranks.

Parts, each kept when others are measured: `speed` runs on an emulated cluster (speed.py) and needs root, as `moesys-fabric` does;
`simulated` and `planning` are computed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.balance.corpora import corpora
from benchmarks.balance.simulated import CLUSTER_RANKS, paper_costs, simulated_rows
from benchmarks.balance.speed import OURS, RANKS, Case, speed_rows
from benchmarks.kept import KeptParts
from benchmarks.own_text import VOCAB_SIZE, prepared, prepared_library
from benchmarks.results import ROOT, Cell, Result, rows_of_other_parts
from moesys.plan.batch.lengths import drawn
from moesys.plan.batch.partition import karmarkar_karp
from moesys.plan.batch.policies import planned

DESCRIPTION = "documents shared out over ranks by plans: steps by policy on several corpora, larger clusters simulated"
RESULT = "balance"
PARTS = {"speed": ["model"], "simulated": ["cluster"], "planning": ["planned sequences"]}
"""And the first columns of their rows."""
WORDS = [
    *("experiment=quickstart", f"model.vocab_size={VOCAB_SIZE}", "optim.lr=1e-4"),
    *("model.num_layers=3", "model.d_model=128", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.moe.num_shared_experts=0", "model.moe.expert_backend=loop"),
    *("schedule.warmup_steps=1", "checkpoint.every_steps=0"),
]
MODELS = {
    "MoE, ep 8": ["parallel.ep=8", "model.num_dense_layers=0"],
    "dense": ["parallel.ep=1", "model.num_dense_layers=3", "model.d_ffn=512", "balance=none"],
    "MoE, pp 2, ep 4": [
        "parallel.pp=2",
        "parallel.ep=4",
        "model.num_dense_layers=0",
        "model.num_layers=4",
    ],
}
HEAVY, SHORT, REAL = "heavy tail, 37 % long", "uniform short", "standard library"
LONGEST_TOKENS, BATCH_TOKENS, ROUNDS = 16_384, 49_152, 4
TEXT, LIBRARY = ROOT / "build" / "bench-text", ROOT / "build" / "bench-library"


def run(quick: bool, progress: Callable[[str], None], only: Sequence[str] = tuple(PARTS)) -> Result:
    """About an hour on two cores, nearly all of it `speed`; quick: two steps of one corpus.

    With `only` some parts, the rows of the others are those of the result that is there.
    """
    rows, sources = rows_of_other_parts(RESULT, PARTS, only, quick)
    if "speed" in only:
        rows += _speed(quick, progress)
    if "simulated" in only:
        rows += simulated_rows(quick, progress)
    if "planning" in only:
        rows += planning_rows(quick)
    return Result(headline=headlines(rows), rows=rows, is_whole=not quick, sources=sources)


def headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of what is there. Pure."""
    found: dict[str, float] = {}
    measured = [row for row in rows if "model" in row]
    ours = {(row["model"], row["corpus"]): row for row in measured if row["policy"] == OURS}
    if heavy := [row["speedup"] for (_, corpus), row in ours.items() if corpus == HEAVY]:
        found["speedup_heavy_tail"] = min(heavy)
    if ours:
        others = {
            (row["model"], row["corpus"]): row
            for row in measured
            if row["policy"] == "karmarkar_karp"
        }
        over = [ours[at]["tokens_per_s"] / row["tokens_per_s"] for at, row in others.items()]
        found["speedup_over_karmarkar_karp"] = round(statistics.geometric_mean(over), 3)
        errors = [row["prediction_error_pct"] for row in measured]
        found["prediction_error_pct"] = round(statistics.fmean(errors), 1)
    if short := [row["speedup"] for (_, corpus), row in ours.items() if corpus == SHORT]:
        found["worst_uniform"] = min(short)
    if real := [row["idle_pct"] for (_, corpus), row in ours.items() if corpus == REAL]:
        found["idle_pct"] = max(real)
    cluster = f"{CLUSTER_RANKS} ranks"
    simulated = [
        row["speedup"]
        for row in rows
        if str(row.get("cluster")).startswith(cluster) and row["policy"] == OURS
    ]
    if simulated:
        found[f"simulated_speedup_{CLUSTER_RANKS}"] = max(simulated)
    for row in rows:
        if row.get("ranks_planned") == PLANNED_RANKS:
            found[f"plan_{PLANNED_RANKS}_ranks_s"] = max(row["rings_s"], row["layers_s"])
    return found


PLANNED_RANKS, PLANNED_TOKENS = 4096, 32_000_000


def planning_rows(quick: bool) -> list[dict[str, Cell]]:
    """How long one core plans a batch."""
    costs, found = paper_costs(), []
    for ranks in (64,) if quick else (64, 1024, PLANNED_RANKS):
        lengths_S = drawn("lognormal", PLANNED_TOKENS * ranks // PLANNED_RANKS, 112_000, seed=0)
        took: dict[str, float] = {}
        for name, plan in (
            ("rings_s", partial(planned, OURS, lengths_S, ranks, 8192, costs, meets=False)),
            ("layers_s", partial(planned, OURS, lengths_S, ranks, 8192, costs, meets=True)),
            ("karmarkar_karp_s", partial(karmarkar_karp, costs.work_s(lengths_S), ranks)),
        ):
            began_s = time.process_time()
            plan()
            took[name] = round(time.process_time() - began_s, 4)
        found.append({"planned sequences": len(lengths_S), "ranks_planned": ranks, **took})
    return found


def _speed(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    rounds = 1 if quick else ROUNDS
    longest, batch = (512, 2048) if quick else (LONGEST_TOKENS, BATCH_TOKENS)
    cases = {
        name: Case(
            words=[*WORDS, *words, *_room(longest, words)],
            rounds=rounds,
            batch_tokens=batch,
            longest_tokens=longest,
        )
        for name, words in MODELS.items()
        if not quick or name == next(iter(MODELS))
    }
    text = prepared(TEXT)
    all_of_them = corpora(text if quick else prepared_library(LIBRARY))
    chosen = {HEAVY: all_of_them[HEAVY]} if quick else all_of_them
    kept = KeptParts(RESULT, {"cases": {n: vars(c) for n, c in cases.items()}})
    rows = speed_rows(cases, chosen, text, kept, progress)
    if quick:
        kept.clear()
    return rows


def _room(longest: int, words: Sequence[str]) -> list[str]:
    """Memory for the longest sequence, on all data ranks together."""
    stages = 2 if "parallel.pp=2" in words else 1
    return [f"train.micro_batch_tokens={stages * longest // RANKS}"]
