"""Steps of a training on an emulated cluster of two nodes with four ranks each, whose batches are planned by several policies.

Each rank computes with its share of a core. Under each corpus all policies run in one job, in turns, on the same sequences.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.balance.corpora import Lengths, write_corpus
from benchmarks.fabric.layout import Layout
from benchmarks.fabric.told import told_by_rank_0
from benchmarks.kept import KeptParts
from benchmarks.results import Cell

LAYOUT = Layout(
    name="balance", num_nodes=2, ranks_per_node=4, cores_per_rank=0.22, inter_bits=10**9
)
RANKS = 8
STATIC = "static"
OURS = "hdp"
POLICIES = (STATIC, "karmarkar_karp", "naive", "flexsp", OURS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and for how long."""

    words: Sequence[str]
    """Overrides of all policies."""
    rounds: int
    batch_tokens: int
    longest_tokens: int


def speed_rows(
    cases: Mapping[str, Case],
    corpora: Mapping[str, Lengths],
    text: Path,
    kept: KeptParts,
    progress: Callable[[str], None],
) -> list[dict[str, Cell]]:
    """A row for each model, corpus and policy. What is `kept` is not measured again."""
    rows = []
    for model, case in cases.items():
        for name, lengths in corpora.items():
            part = f"{model}, {name}".replace("/", "_")
            if (told := kept.get(part)) is None:
                told = _job(case, lengths, text, progress)
                kept.put(part, told)
            found = corpus_rows(model, name, told)
            rows += found
            for row in found:
                progress(f"{part}: {row['policy']} {row['speedup']} times as fast as {STATIC}")
    return rows


def corpus_rows(
    model: str, corpus: str, told: Sequence[Mapping[str, Any]]
) -> list[dict[str, Cell]]:
    """A row for each policy: tokens over time, of all steps that were told. Pure."""
    rows: list[dict[str, Cell]] = []
    rates = {}
    for policy in dict.fromkeys(record["variant"] for record in told):
        own = [record for record in told if record["variant"] == policy]
        took_s = sum(record["step_ms"] for record in own) / 1e3
        rates[policy] = sum(record["tokens"] for record in own) / took_s
        errors = [abs(r["planned_ms"] - r["step_ms"]) / r["step_ms"] for r in own]
        rows.append(
            {
                "model": model,
                "corpus": corpus,
                "policy": policy,
                "tokens_per_s": round(rates[policy], 1),
                "speedup": 0.0,
                "step_ms": round(1e3 * took_s / len(own), 1),
                "planned_ms": round(statistics.fmean(r["planned_ms"] for r in own), 1),
                "prediction_error_pct": round(100 * statistics.fmean(errors), 1),
                "idle_pct": round(100 * statistics.fmean(r["idle_share"] for r in own), 1),
                "micro_steps": round(statistics.fmean(r["micro_steps"] for r in own), 1),
                "ring_mib": round(statistics.fmean(r["ring_bytes"] for r in own) / 2**20, 2),
            }
        )
    for row in rows:
        row["speedup"] = round(rates[row["policy"]] / rates[STATIC], 3)
    return rows


def _job(
    case: Case, lengths: Lengths, text: Path, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What rank 0 tells of each policy's steps."""
    told: list[dict[str, Any]] = []

    def each(record: dict[str, Any]) -> None:
        progress(
            f"step {record['step']}, {record['variant']}: {record['step_ms']:.0f} ms, planned {record['planned_ms']:.0f}"
        )
        told.append(record)

    with tempfile.TemporaryDirectory() as scratch:
        steps = case.rounds + 2
        data = write_corpus(
            Path(scratch, "data"), text, lengths(steps * case.batch_tokens, case.longest_tokens)
        )
        words = [
            *case.words,
            *(f"data.path={data}", f"data.seq_len={case.longest_tokens}", "data.shuffle=false"),
            f"train.global_batch_tokens={case.batch_tokens}",
            "batch.plan_ahead_steps=0",
        ]
        variants = {policy: [*words, "batch=hdp", f"batch.policy={policy}"] for policy in POLICIES}
        module = [sys.executable, "-m", "benchmarks.balance.steps"]
        arguments = [json.dumps(variants), str(case.rounds), json.dumps(LAYOUT.cores_per_rank)]
        told_by_rank_0(LAYOUT, [*module, *arguments], each)
    return told
