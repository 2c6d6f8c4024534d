"""What the benchmark of compression makes of its runs and steps, and a smoke run of it."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import compression, results
from benchmarks.compression import at_its_share, headlines, speed, trained_as
from benchmarks.compression.picture import picture
from benchmarks.compression.quality import loss_rows, mean_curve, ratio_rows, steps_to, trained
from benchmarks.compression.speed import codec_cost_pct
from benchmarks.fabric import network
from benchmarks.results import ROOT
from benchmarks.shaping import STAYING


def test_a_codec_costs_a_share_of_what_it_saves() -> None:
    """A step of 500 ms, 50 of them the codec's, where a plain one takes 950: without them 500 would be saved."""
    assert codec_cost_pct(50.0, 500.0, 950.0) == pytest.approx(10)
    assert codec_cost_pct(50.0, 1100.0, 950.0) is None


def run_of(losses: list[float], rows: float | None = None, sent: int = 100) -> list[dict]:
    train = [{"kind": "train", "step": step, "sent_bytes": sent} for step in (1, 2)]
    if rows is not None:
        train = [record | {"codec_rows": rows} for record in train]
    evals = [{"kind": "eval", "step": 10 * i, "val_loss": x} for i, x in enumerate(losses, 1)]
    return [{"kind": "start"}, *train, *evals]


def test_steps_to_a_loss_are_between_evaluations() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert steps_to(curve, 4.0) == 20
    assert steps_to(curve, 3.5) == 25
    assert steps_to(curve, 6.0) == 10
    with pytest.raises(ValueError, match="never 2"):
        steps_to(curve, 2.0)
    assert mean_curve([curve, [(10, 3.0), (20, 2.0), (30, 1.0)]]) == [(10, 4), (20, 3), (30, 2)]


def test_the_same_loss_is_what_both_reach() -> None:
    found = {
        "none": [trained(run_of([5.0, 4.0, 3.0]))],
        "worse": [trained(run_of([5.0, 4.0, 3.5], 0.5, 40))],
        "better": [trained(run_of([4.0, 3.0, 2.0], 0.5, 40))],
    }
    _, worse, better = loss_rows(found)
    assert (worse["steps"], worse["plain_steps"], worse["steps_ratio"]) == (30, 25, 1.2)
    assert (better["steps"], better["plain_steps"]) == (20, 30)
    assert worse["gap_pct"] == pytest.approx(100 * 0.5 / 3, abs=1e-3)
    found["none"].append(trained(run_of([5.0, 4.0, 1.0])))
    more, *fewer = loss_rows(found)
    assert more["runs"] == 2
    assert fewer == [worse, better], (
        "a variant of fewer seeds is set beside the plain runs of these"
    )
    found["none"].pop()
    rows = ratio_rows(found)
    assert [(row["rows_pct"], row["bytes_pct"]) for row in rows] == [(100, 100), (50, 40), (50, 40)]


SPEED = [
    {
        "model": "quickstart",
        "exchange_pct": share,
        "variant": variant,
        "reached_pct": share,
        "step_speedup": speedup,
        "uplink_bytes_pct": pct,
        "codec_cost_pct": cost,
    }
    for share, variant, speedup, pct, cost in (
        (45, "none", 1.0, 100.0, None),
        (45, "rows stay", 1 / 0.55, 0.0, None),
        (45, "int8", 1.4, 26.0, 2.0),
        (45, "hierarchical tree_int4", 1.6, 9.0, 8.0),
        (45, "fp8", 1.7, 26.0, 1.0),
        (70, "rows stay", 1 / 0.3, 0.0, None),
        (70, "fp8", 1.5, 26.0, 1.0),
        (70, "int8", 2.0, 26.0, 1.0),
        (70, "hierarchical tree_int4", 2.5, 8.0, 3.0),
    )
]
LOSS = [
    {"trained with": "none", "steps_ratio": 1.0, "gap_pct": 0.0},
    {"trained with": "tree_int4", "steps_ratio": 1.25, "gap_pct": 0.4},
    {"trained with": "int8", "steps_ratio": 1.0, "gap_pct": 0.1},
    {"trained with": "fp8", "steps_ratio": 1.25, "gap_pct": 0.1},
]


def test_headlines_are_of_time_to_the_same_loss() -> None:
    assert headlines(SPEED) == {
        "speedup_at_45pct": 1.6,
        "reached_at_45pct": 45,
        "speedup_at_70pct": 2.5,
        "reached_at_70pct": 70,
        "uplink_bytes_pct": 9.0,
        "codec_cost_pct": 8.0,
    }, "of the variant that is fastest at both, and its worst"
    assert headlines(LOSS) == {"val_loss_gap_pct": 0.4}, "of tree_int4, where no speed is known"
    assert headlines([*SPEED, *LOSS]) == {
        "speedup_at_45pct": 1.4,
        "reached_at_45pct": 45,
        "speedup_at_70pct": 2.0,
        "reached_at_70pct": 70,
        "uplink_bytes_pct": 26.0,
        "codec_cost_pct": 2.0,
        "val_loss_gap_pct": 0.1,
    }


def test_a_speedup_is_of_the_share_that_was_wanted() -> None:
    """Where exchanges took half of a plain step, and a variant left a tenth of them: at 45 % that is less to gain."""
    staying = {"step_speedup": 2.0}
    row = {"exchange_pct": 45, "step_speedup": 1 / 0.55}
    assert at_its_share(row, staying) == pytest.approx(1 / (0.55 + 0.045))
    assert at_its_share(row, {"step_speedup": 1 / 0.55}) == pytest.approx(1 / 0.55)


def test_a_variant_that_costs_loss_is_no_headline() -> None:
    """However few steps it takes to the loss that it reaches."""
    costly = {"trained with": "tree_int4", "steps_ratio": 1.0, "gap_pct": 0.31}
    assert headlines([*SPEED, LOSS[0], costly, LOSS[2]])["speedup_at_45pct"] == 1.4
    assert (
        headlines([*SPEED, LOSS[0], costly | {"gap_pct": 0.3}, LOSS[2]])["speedup_at_45pct"] == 1.6
    )


def test_a_better_loss_is_no_speed() -> None:
    better = LOSS[2] | {"steps_ratio": 0.8, "gap_pct": -1.0}
    assert headlines([*SPEED, *LOSS[:2], better])["speedup_at_45pct"] == 1.4


LAYERS = [
    {"layer": layer, "of_model": model, "exchange_pct": share, "speedup_over_deepspeed": speedup}
    for model, share, layer, speedup in (
        ("quickstart", 45, "none", 0.8),
        ("quickstart", 45, "int8", 0.9),
        ("quickstart", 45, "tree_int4", 1.3),
        ("quickstart", 45, "deepspeed", 1.0),
        ("quickstart", 70, "int8", 2.0),
        ("wider", 45, "int8", 3.0),
    )
]


def test_a_layer_is_set_beside_deepspeeds_as_the_headlines_variant() -> None:
    """Though another is faster, or none of ours."""
    of_int8 = headlines([*SPEED, *LOSS, *LAYERS])
    assert of_int8["speedup_over_deepspeed"] == 0.9
    assert of_int8["plain_over_deepspeed"] == 0.8
    assert headlines([*SPEED, *LAYERS])["speedup_over_deepspeed"] == 1.3
    assert headlines(LAYERS) == {}


def test_an_exchange_has_the_losses_of_what_travels() -> None:
    assert trained_as("hierarchical tree_int4") == "tree_int4"
    assert trained_as("deduplicated") == "none"
    trained = {trained_as(name) for name in speed.VARIANTS if name != STAYING}
    assert trained <= compression.LOSS_VARIANTS.keys()


def test_one_part_keeps_the_rows_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {"rows": [*LOSS, *SPEED], "command": "moesys bench compression", "env": {"cpu": "old"}}
    (tmp_path / "compression.json").write_text(json.dumps(before))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(compression, "_speed", lambda *_: SPEED[:2])
    result = compression.run(False, lambda line: None, only=["speed"])
    assert result.rows == [*LOSS, *SPEED[:2]]
    source = {"command": before["command"], "env": before["env"]}
    assert result.sources == {"trained with": source}
    assert result.is_whole
    with pytest.raises(ValueError, match="no part pace; there are ratio, loss, speed"):
        compression.run(False, lambda line: None, only=["pace"])


def test_the_picture_has_every_line_and_point() -> None:
    sweep = yaml.safe_load((ROOT / "benchmarks" / "sweeps" / "compression.yaml").read_text())
    for kind in compression.LINES.values():
        assert sum(name.startswith(f"{kind}, ") for name in sweep) >= 5
    assert {compression.PLAIN, *compression.POINTS} <= sweep.keys()
    rows = [
        {"rows_pct": pct, "gap_pct": gap, "gap_sd": sd}
        for pct, gap, sd in ((10.0, 3.5, 0.1), (50.0, 3.2, None), (100.0, -1.1, 0.05))
    ]
    drawn = picture({"a < b": rows[:2], "c": rows[1:2]}, {"int8": rows[2]}, "title")
    assert drawn.count("<circle") == 3 + 1 + 2, "each row, and two of the legend"
    assert "a &lt; b" in drawn


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_ranks_of_a_fabric_take_turns() -> None:
    """Needs data/stdlib, as quickstart does."""
    if reason := network.why_not():
        pytest.skip(reason)
    if not (ROOT / "data" / "stdlib" / "manifest.json").exists():
        pytest.skip("no data/stdlib: make data/stdlib/manifest.json")
    result = compression.run(True, lambda line: None, only=["speed"])
    plain, staying, coded, *layers = result.rows
    assert (staying["variant"], staying["uplink_bytes_pct"]) == ("rows stay", 0.0)
    assert [row["layer"] for row in layers] == ["none", "lsh_int8", "deepspeed"]
    assert layers[-1]["speedup_over_deepspeed"] == 1.0
    assert result.headline["speedup_over_deepspeed"] == layers[1]["speedup_over_deepspeed"]
    assert result.headline["plain_over_deepspeed"] == layers[0]["speedup_over_deepspeed"]
    assert (plain["variant"], plain["step_speedup"], plain["rows_pct"]) == ("none", 1.0, 100.0)
    assert coded["rows_pct"] < 90
    assert coded["uplink_bytes_pct"] < coded["rows_pct"]
    assert coded["codec_ms"] > plain["codec_ms"] == 0
    assert not result.is_whole


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_a_smoke_run_of_the_sweeps(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*compression.QUICK_TRAINED, f"data.path={tiny_data}"]
    monkeypatch.setattr(compression, "QUICK_TRAINED", words)
    result = compression.run(True, lambda line: None, only=["ratio", "loss"])
    ratios = [None] * (1 + len(compression.POINTS))
    assert [row.get("trained with") for row in result.rows] == [*ratios, "none", "int8"]
    assert result.rows[2]["bytes_pct"] < result.rows[1]["bytes_pct"] < 30
