"""What the page says of copies of experts, against the records that it is made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesys.report.placement_section import placement_content
from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics
from tests.report.page_reader import Page, page_of
from tests.report.synthetic_run import START_UNIX_S, start_record, train_record
from tests.report.test_heatmap import decode_png

RANKS, LAYERS, EXPERTS, STEPS = 4, 2, 6, 12
BUSIEST = ["Busiest rank"]
COSTS = ["Sent for copies", "Wait for copies", "Experts with a new owner", "Sent to new owners"]


def placement_fields(rng: np.random.Generator, step: int) -> dict[str, Any]:
    """Of a policy that decides within the step; what is planned ahead comes on top."""
    owners_L = rng.uniform(2, 4, LAYERS).tolist()
    ranks_L = rng.uniform(1, 2, LAYERS).tolist()
    return {
        "copies_bytes": int(rng.integers(1, 9 << 20)),
        "copies_between_nodes_bytes": int(rng.integers(1, 1 << 20)),
        "copies_wait_ms": rng.uniform(1, 9),
        "moved_experts": 5 * (step % 4 == 1),
        "reshard_bytes": (3 << 20) * (step % 4 == 1),
        "rank_imbalance": float(np.mean(ranks_L)),
        "owner_imbalance": float(np.mean(owners_L)),
        "rank_imbalance_by_layer": ranks_L,
        "owner_imbalance_by_layer": owners_L,
    }


def planned_fields(rng: np.random.Generator, step: int) -> dict[str, Any]:
    if step == 1:
        return {"expert_holders": [[1] * EXPERTS] * LAYERS}
    errors_L = rng.random(LAYERS).tolist()
    return {
        "added_copies": int(rng.integers(0, 9)),
        "load_prediction_error": float(np.mean(errors_L)),
        "load_prediction_error_by_layer": errors_L,
        "expert_holders": rng.choice([1, 2, RANKS], (LAYERS, EXPERTS)).tolist(),
    }


def write_placed(folder: Path, *parts: Any, plain_steps: int = 0) -> list[dict[str, Any]]:
    """The train records of a run with these fields, and then some steps without."""
    rng = np.random.default_rng(3)
    with MetricsLog(folder) as log:
        log.write(start_record(steps=600, unix_s=START_UNIX_S) | {"ep": RANKS})
        for step in range(1, STEPS + plain_steps + 1):
            record = train_record(step, steps=600, layers=LAYERS, experts=EXPERTS, rng=rng)
            for fields in parts if step <= STEPS else ():
                record |= fields(rng, step)
            log.write(record)
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Page]:
    folder = tmp_path_factory.mktemp("placed")
    return write_placed(folder, placement_fields, planned_fields), page_of(folder)


def test_curves_are_the_records(placed: tuple[list[dict[str, Any]], Page]) -> None:
    records, page = placed
    for chart, series, column, scale in (
        ("Busiest rank", "had owners served all", "owner_imbalance", 1),
        ("Busiest rank", "with copies", "rank_imbalance", 1),
        ("Load prediction error", "error", "load_prediction_error", 100),
        ("Sent for copies", "sent", "copies_bytes", 2**-20),
        ("Sent for copies", "between nodes", "copies_between_nodes_bytes", 2**-20),
        ("Wait for copies", "wait", "copies_wait_ms", 1),
        ("Copies added to the planned ones", "copies", "added_copies", 1),
        ("Experts with a new owner", "experts", "moved_experts", 1),
        ("Sent to new owners", "sent", "reshard_bytes", 2**-20),
    ):
        x, y = page.series(chart, series)
        assert x == list(range(1, STEPS + 1))
        known = [scale * record[column] for record in records if column in record]
        assert y[-len(known) :] == pytest.approx(known, rel=1e-5), (chart, series)
        assert y[: -len(known)] == [None] * (len(records) - len(known))
    assert page.series("Load prediction error", "error")[1][0] is None


def test_pictures_are_the_holders(placed: tuple[list[dict[str, Any]], Page]) -> None:
    records, page = placed
    images = [image for image in page.images if "holders of" in image["alt"]]
    assert len(images) == LAYERS
    for layer, image in enumerate(images):
        held_ES = np.array([record["expert_holders"][layer] for record in records]).T
        width, height, palette, index_ES = decode_png(image["src"])
        assert (width, height) == (STEPS, EXPERTS)
        # By the logarithm: 2 lies in the middle between 1 and 4 of 33 levels.
        assert (index_ES == np.select([held_ES == 1, held_ES == 2], [1, 17], 33)).all()
        light = [0.3 * r + 0.6 * g + 0.1 * b for r, g, b in palette[1:-1]]
        assert light == sorted(light, reverse=True)
        last_E = held_ES[:, -1]
        assert image["alt"].endswith(
            f"At the end expert {last_E.argmax()} has the most holders, {last_E.max()} of {RANKS} ranks; "
            f"experts with copies: {(last_E > 1).sum()}."
        )
        assert f"from step 1 to {STEPS}" in image["alt"]


def test_the_table_is_the_last_step(placed: tuple[list[dict[str, Any]], Page]) -> None:
    records, page = placed
    last = records[-1]
    at = page.texts.index("prediction error") + 1
    for layer in range(LAYERS):
        holders_E = last["expert_holders"][layer]
        assert page.texts[at : at + 6] == [
            str(layer),
            f"{last['owner_imbalance_by_layer'][layer]:.3f}",
            f"{last['rank_imbalance_by_layer'][layer]:.3f}",
            str(sum(holders > 1 for holders in holders_E)),
            f"{max(holders_E)} (expert {holders_E.index(max(holders_E))})",
            f"{last['load_prediction_error_by_layer'][layer]:.1%}",
        ]
        at += 6
    assert page.texts[at] == f"Of step {STEPS}."


def test_copies_that_are_planned_within_the_step_have_no_prediction(tmp_path: Path) -> None:
    write_placed(tmp_path, placement_fields)
    page = page_of(tmp_path)
    assert {*BUSIEST, *COSTS} <= page.charts.keys()
    assert "Load prediction error" not in page.charts
    assert not any("holders" in image["alt"] for image in page.images)
    at = page.texts.index("prediction error")
    assert page.texts[at + 4 : at + 7] == ["-", "-", "-"]


def test_a_run_without_copies_has_no_such_section(tmp_path: Path) -> None:
    write_placed(tmp_path)
    page = page_of(tmp_path)
    assert "balance" in page.ids
    assert "placement" not in page.ids
    assert not {*BUSIEST, *COSTS} & page.charts.keys()


def test_a_run_that_went_on_without_copies_shows_those_that_it_had(tmp_path: Path) -> None:
    write_placed(tmp_path, placement_fields, planned_fields, plain_steps=3)
    run, page = read_run(tmp_path), page_of(tmp_path)
    assert run.holders is not None
    assert run.holders.final_step == STEPS
    content = placement_content(run)
    assert content is not None
    assert not content.rows
    assert content.maps is not None
    assert content.maps.ranks == RANKS
    assert page.series("Busiest rank", "with copies")[1][STEPS:] == [None] * 3


def test_experts_without_copies_are_said_to_have_none(tmp_path: Path) -> None:
    def only_owners(rng: np.random.Generator, step: int) -> dict[str, Any]:
        return planned_fields(rng, 1)

    write_placed(tmp_path, placement_fields, only_owners)
    page = page_of(tmp_path)
    assert [
        image["alt"].rpartition(". ")[2] for image in page.images if "holders" in image["alt"]
    ] == ["At the end every expert has one holder."] * LAYERS
    at = page.texts.index("prediction error")
    assert page.texts[at + 4 : at + 7] == ["0", "1", "-"]


def test_speeds_by_which_rows_were_shared_are_told(tmp_path: Path) -> None:
    def measured(rng: np.random.Generator, step: int) -> dict[str, Any]:
        return {"rank_speeds": [1.14, 1.14, 0.57, 1.14]}

    write_placed(tmp_path, placement_fields, measured)
    told = "Rows are over the speeds of a group's ranks, 0.57 (rank 2) to 1.14 of the mean."
    assert f"Of step {STEPS}. {told}" in page_of(tmp_path).texts
