"""The benchmark of chunks: its ways give the same numbers, and it runs."""

import pytest
import torch
from torch import Tensor

from benchmarks import chunks


@pytest.mark.parametrize("case", chunks._cases(16, 40)[:3], ids=str)
def test_ways_of_packing_agree(case: chunks.Case) -> None:
    own = chunks._chunks(case.chunks, case, case.source, torch.device("cpu"))
    ways = chunks._packing(own, torch.empty(0, dtype=case.target), case.length)
    ours, *others = [way() for way in ways.values()]
    assert ours.numel() == 640
    assert all(torch.equal(other, ours) for other in others)


@pytest.mark.parametrize("case", chunks._cases(16, 40)[3:], ids=str)
def test_ways_of_adding_agree(case: chunks.Case) -> None:
    """Each adds the same parts once."""
    seen: list[Tensor] = []
    totals = chunks._chunks(case.chunks, case, case.target, torch.device("cpu"))
    rounds = [
        chunks._chunks(case.chunks, case, case.source, totals[0].device) for _ in range(case.parts)
    ]
    before = [total.clone() for total in totals]
    for way in chunks._adding(rounds, totals).values():
        for total, value in zip(totals, before, strict=True):
            total.copy_(value)
        way()
        seen.append(torch.cat(totals))
    assert not torch.equal(seen[0], torch.cat(before))
    assert all(torch.equal(other, seen[0]) for other in seen)


def test_a_smoke_run() -> None:
    result = chunks.run(True, lambda line: None)
    assert len(result.rows) == 6
    assert set(result.headline) == {
        f"{op}_least_{way}_over_ours" for op in ("pack", "add") for way in ("loop", "foreach")
    }
    assert all(value > 0 for value in result.headline.values())
