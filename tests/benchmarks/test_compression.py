import pytest

from benchmarks import compression
from benchmarks.compression import corrected, headlines, rate_for, run
from benchmarks.fabric import network


def test_a_rate_makes_the_share_where_nothing_overlaps() -> None:
    """1 MB at 8 Mbit/s takes a second, beside one second of other things."""
    assert rate_for(50, 1000.0, 1e6) == pytest.approx(8e6)
    assert rate_for(75, 1000.0, 1e6) == pytest.approx(8e6 / 3)


def test_a_rate_is_corrected_by_what_it_added() -> None:
    assert corrected(8e6, 50, 1000.0, 2000.0) == pytest.approx(8e6)
    assert corrected(8e6, 50, 1000.0, 3000.0) == pytest.approx(16e6), "too slow"
    assert corrected(8e6, 50, 1000.0, 1500.0) == pytest.approx(4e6), "too fast"
    assert corrected(8e6, 50, 1000.0, 900.0) == pytest.approx(0.8e6), "at most ten times slower"


def test_headlines_are_the_best_of_each_share() -> None:
    rows = [
        {"uplinks_pct": share, "speedup": speedup, "uplink_bytes_pct": pct}
        for share, speedup, pct in ((45, 1.0, 100.0), (45, 1.5, 3.0), (70, 2.5, 3.5))
    ]
    assert headlines(rows) == {
        "step_speedup_at_45pct": 1.5,
        "step_speedup_at_70pct": 2.5,
        "uplink_bytes_pct": 3.0,
    }


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_ranks_of_a_fabric_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs data/stdlib, as quickstart does."""
    if reason := network.why_not():
        pytest.skip(reason)
    if not (compression.ROOT / "data" / "stdlib" / "manifest.json").exists():
        pytest.skip("no data/stdlib: make data/stdlib/manifest.json")
    result = run(True, lambda line: None)
    plain, coded = result.rows
    assert (plain["variant"], plain["speedup"], plain["rows_pct"]) == ("none", 1.0, 100.0)
    assert coded["rows_pct"] < 50
    assert coded["uplink_bytes_pct"] < coded["rows_pct"]
    assert not result.is_whole
