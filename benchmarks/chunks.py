"""How fast chunks of sparse collectives are packed, and added to, beside torch's own ways."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.interleaved import paired_ratio, time_interleaved
from benchmarks.results import Cell, Result
from moesys.ops import library
from moesys.ops.chunks import add_chunks, pack_chunks

DESCRIPTION = "packing chunks of experts, and adding to them, against a loop, foreach and cat"
GPU = True


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    chunks: int
    length: int
    source: torch.dtype = torch.float32
    target: torch.dtype = torch.float32
    parts: int = 1
    """Of each total."""


def _cases(chunks: int, length: int) -> list[Case]:
    """Parameters, parameters in a narrower type and copies of them that are passed on; gradients, and many of few hot experts."""
    narrow = torch.bfloat16
    return [
        Case(op="pack", chunks=chunks, length=length),
        Case(op="pack", chunks=chunks, length=length, target=narrow),
        Case(op="pack", chunks=chunks, length=length, source=narrow, target=narrow),
        Case(op="add", chunks=chunks, length=length),
        Case(op="add", chunks=chunks, length=length, target=narrow),
        Case(op="add", chunks=chunks // 8, length=length, parts=8),
    ]


SHAPES = MappingProxyType(
    {
        "cpu": ((64, 73_728), (512, 4096)),
        "cuda": ((64, 73_728), (512, 4096), (64, 3 * 2048 * 768), (16, 3 * 7168 * 2048)),
    }
)
"""Chunks, and numbers of each: experts of a small model (3 * 128 * 192), smaller ones, those of Qwen3-30B-A3B and of DeepSeek-V3."""
QUICK_SHAPES = ((8, 1000),)


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not library.runs_on(torch.empty(0, device=device)):
        raise ValueError(f"nothing to measure: {library.status()}")
    rows: list[dict[str, Cell]] = []
    for chunks, length in QUICK_SHAPES if quick else SHAPES[device.type]:
        for case in _cases(chunks, length):
            rows.append(_measured(case, device, 0.05 if quick else 3.0))
            progress(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    headline = {
        f"{op}_least_{way}_over_ours": min(
            ratio
            for row in rows
            if row["op"] == op and isinstance(ratio := row[f"{way}_over_ours"], float)
        )
        for op, way in (("pack", "loop"), ("pack", "foreach"), ("add", "loop"), ("add", "foreach"))
    }
    return Result(headline=headline, rows=rows)


Ways = dict[str, Callable[[], Tensor | None]]


def _measured(case: Case, device: torch.device, budget_s: float) -> dict[str, Cell]:
    rounds = [_chunks(case.chunks, case, case.source, device) for _ in range(case.parts)]
    if case.op == "pack":
        ways = _packing(rounds[0], torch.empty(0, dtype=case.target, device=device), case.length)
    else:
        ways = _adding(rounds, _chunks(case.chunks, case, case.target, device))
    times_ms = time_interleaved(ways, device=device, budget_s=budget_s)
    return {
        "op": case.op,
        "chunks": case.chunks * case.parts,
        "length": case.length,
        "source": str(case.source).removeprefix("torch."),
        "target": str(case.target).removeprefix("torch."),
        "parts_per_total": case.parts if case.op == "add" else None,
        "ours_ms": round(statistics.median(times_ms["ours"]), 4),
        **{
            f"{way}_over_ours": round(paired_ratio(times_ms[way], times_ms["ours"]), 2)
            if way in ways
            else None
            for way in ("loop", "foreach", "cat")
        },
    }


def _packing(own: list[Tensor], like: Tensor, length: int) -> Ways:
    number = len(own) * length

    def loop() -> Tensor:
        flat = like.new_empty(number)
        for to, chunk in zip(flat.split(length), own, strict=True):
            to.copy_(chunk)
        return flat

    def foreach() -> Tensor:
        flat = like.new_empty(number)
        torch._foreach_copy_(list(flat.split(length)), own)
        return flat

    return {
        "ours": lambda: pack_chunks(own, like),
        "loop": loop,
        "foreach": foreach,
        "cat": lambda: torch.cat(own).to(like.dtype),
    }


def _adding(rounds: list[list[Tensor]], totals: list[Tensor]) -> Ways:
    """In each round every total gets a part."""
    pairs = [pair for parts in rounds for pair in zip(parts, totals, strict=True)]

    def loop() -> None:
        for part, total in pairs:
            total.add_(part)

    def foreach() -> None:
        for parts in rounds:
            torch._foreach_add_(totals, parts)

    return {"ours": lambda: add_chunks(pairs), "loop": loop, "foreach": foreach}


def _chunks(number: int, case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return list(torch.randn(number, case.length, device=device).to(dtype).unbind())
