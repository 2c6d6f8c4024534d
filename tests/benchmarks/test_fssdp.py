"""What the benchmark of placed experts makes of its steps, its routings, and a smoke run of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fssdp
from benchmarks.fabric import network
from benchmarks.fssdp import headlines, plan_rows, simulated_table
from benchmarks.fssdp.memory import peak_table
from benchmarks.fssdp.speed import LAYOUT, OURS, OWNERS_STEPS, PLAIN, placed, routing_rows
from benchmarks.fssdp.steps import busiest_owner
from benchmarks.fssdp.traces import HOT_TIMES, STAYS_STEPS, recorded, synthetic, write_run
from benchmarks.results import ROOT
from moesys.moe.routers.load_replay import recorded_loads


def test_routings_are_as_skewed_as_they_say() -> None:
    loads = {name: make(20, 3, 16) for name, make in synthetic().items()}
    shares = {name: of / of.sum(2, keepdims=True) for name, of in loads.items()}
    assert all((of.sum(2) == of.sum(2)[0, 0]).all() for of in loads.values())
    assert np.abs(shares["uniform"].mean((0, 1)) - 1 / 16).max() < 0.005
    hot = shares["zipf 1.2"].mean((0, 1))
    assert hot[0] / hot[9] == pytest.approx(10**1.2, rel=0.1)
    assert (np.argsort(-hot)[:4] == np.arange(4)).all(), "the hottest on rank 0"
    orders = np.argsort(-shares["zipf 1.2, shuffled"].mean(0), axis=1)
    assert len({tuple(order[:4]) for order in orders.tolist()}) == 3, "each layer its own"
    hotspot = shares["moving hotspot"]
    hottest_SM = hotspot.argmax(2)
    assert hotspot.max(2).mean() == pytest.approx(HOT_TIMES / (15 + HOT_TIMES), abs=0.01)
    assert (hottest_SM[:STAYS_STEPS] == hottest_SM[0]).all()
    assert len(np.unique(hottest_SM)) > 3


def test_a_routing_is_played_as_it_was_written(tmp_path: Path) -> None:
    loads_SME = synthetic()["zipf 0.6"](6, 2, 8)
    run = write_run(tmp_path / "run", loads_SME)
    found = np.stack([of.numpy() for of in recorded_loads(str(run))], axis=1)
    assert (found == loads_SME).all()
    assert (recorded(run, 3, 2) == loads_SME[2:4]).all()


def told(variant: str, times_ms: list[float], level: float) -> list[dict]:
    numbers = dict.fromkeys(("rows_between_bytes", "copies_between_bytes"), 2**20)
    return [
        {"variant": variant, "step_ms": ms, "max_over_mean": level, "owner_over_mean": 3.0}
        | numbers
        | {"wait_ms": 1.0}
        for ms in times_ms
    ]


def test_what_moves_is_shared_out_over_the_steps_between() -> None:
    """Experts move before the first step that is told: where owners stay it is left out."""
    first = 100.0 + 10 * OWNERS_STEPS
    records = [
        *told(PLAIN, [900.0, 200.0, 240.0], 3.0),
        *told("everywhere", [900.0, 200.0, 200.0], 1.05),
        *told(OURS, [first, 90.0, 110.0], 1.05),
        *told("eplb", [first, 100.0, 100.0], 1.5),
    ]
    found = placed(records)
    assert {name: one.step_ms for name, one in found.items()} == {
        PLAIN: 220,
        "everywhere": 200,
        OURS: 110,
        "eplb": 110,
    }
    plain, _, ours, eplb = routing_rows("r", 45.0, LAYOUT_45, found)
    assert (plain["speedup"], ours["speedup"], eplb["speedup"]) == (1.0, 2.0, 2.0)
    assert (ours["max_over_mean"], ours["owner_over_mean"]) == (1.05, 3.0)
    assert ours["copies_between_mib"] == 1.0


LAYOUT_45 = type(LAYOUT)(name="x", num_nodes=4, ranks_per_node=2, inter_bits=10**8)


def test_the_busiest_owner_is_a_mean_of_layers() -> None:
    assert busiest_owner([[4, 0, 0, 0], [1, 1, 1, 1]], 2) == (2.0 + 1.0) / 2


def test_memory_is_over_the_first() -> None:
    plain, copied = peak_table({PLAIN: [100, 300], OURS: [160, 240]})
    assert plain["mean_over_plain_pct"] == plain["fullest_over_plain_pct"] == 0
    assert (copied["mean_over_plain_pct"], copied["fullest_over_plain_pct"]) == (0, -20)


def test_headlines() -> None:
    def row(routing: str, placement: str, step_ms: float, speedup: float, level: float) -> dict:
        names = ("routing", "placement", "step_ms", "speedup", "max_over_mean")
        return dict(zip(names, (routing, placement, step_ms, speedup, level), strict=True))

    rows = [
        row("uniform", OURS, 100, 0.98, 1.02),
        row("zipf 1.2", OURS, 100, 3.7, 1.07),
        row("recorded, from step 20", PLAIN, 300, 1.0, 3.0),
        row("recorded, from step 20", OURS, 100, 3.0, 1.3),
        row("recorded, from step 60", PLAIN, 100, 1.0, 3.0),
        row("recorded, from step 60", OURS, 100, 1.0, 1.2),
        {"in memory": OURS, "mean_over_plain_pct": 40.0},
        {"planned layers": 64, "ranks_planned": 2048, "plan_ms": 30.0},
    ]
    assert headlines(rows) == {
        "speedup_zipf_1_2": 3.7,
        "speedup_recorded": 2.0,
        "worst_uniform": 0.98,
        "max_over_mean_tokens": 1.3,
        "memory_overhead_pct": 40.0,
        "plan_ms": 30.0,
    }


def test_simulated_policies_stand_side_by_side() -> None:
    rows = [
        {"cluster": "c", "model": "m", "ranks": ranks, "zipf": 1.0, "policy": policy}
        | {"speedup": speedup, "max_over_mean": 1.1, "copies_mib_per_rank": 3.0}
        for ranks in (64, 128)
        for policy, speedup in ((PLAIN, 1.0), (OURS, 4.0), ("eplb", 3.0))
    ]
    (line,) = simulated_table(rows)
    assert (line["ranks"], line[OURS], line["eplb"], line["max_over_mean"]) == (64, 4.0, 3.0, 1.1)


def test_plans_are_timed() -> None:
    (row,) = plan_rows([(2, 8, 8)])
    assert 0 < row["plan_ms"] < 1000


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_policies_take_turns_on_a_fabric() -> None:
    """Needs data/stdlib, as quickstart does."""
    if reason := network.why_not():
        pytest.skip(reason)
    if not (ROOT / "data" / "stdlib" / "manifest.json").exists():
        pytest.skip("no data/stdlib: make data/stdlib/manifest.json")
    result = fssdp.run(True, lambda line: None, only=["speed", "memory"])
    by_name = {(row["routing"], row["placement"]): row for row in result.rows if "routing" in row}
    skewed = by_name["zipf 1.2", OURS]
    assert skewed["max_over_mean"] < 1.2 < 3 < skewed["owner_over_mean"]
    assert skewed["copies_between_mib"] > 0
    assert by_name["zipf 1.2", PLAIN]["speedup"] == 1.0
    assert by_name["zipf 1.2", PLAIN]["copies_between_mib"] == 0
    plain, copied, released = (row for row in result.rows if "in memory" in row)
    assert released["mean_mib"] <= copied["mean_mib"]
    assert plain["mean_over_plain_pct"] == 0
    assert json.loads(json.dumps(result.headline)).keys() >= {
        "memory_overhead_pct",
        "worst_uniform",
    }
    assert not result.is_whole
