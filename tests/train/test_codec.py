"""Training whose tokens travel as means of near ones: the same numbers under recomputation, exact bytes, warm-up."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from moesys.config.dispatch_schema import DispatchConfig, WireConfig
from moesys.config.schema import AnomalyConfig, ComponentConfig, Recompute
from moesys.testing.parity import compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, samples_of_step, with_micro_steps
from tests.train.coded import INT8, LSH, PLAIN, TREE, assert_equal, config


@pytest.mark.parametrize("recompute", ["moe", "layer"])
@pytest.mark.parametrize(
    ("codec", "wire"),
    [
        pytest.param(LSH, WireConfig(), marks=pytest.mark.parity, id="lsh"),
        pytest.param(LSH, INT8, id="lsh+int8"),
        pytest.param(TREE, INT8, marks=pytest.mark.parity, id="tree+int8"),
    ],
)
def test_a_recomputation_finds_the_same_numbers(
    recompute: Recompute, codec: ComponentConfig, wire: WireConfig
) -> None:
    """Bit for bit: which tokens share a row is decided once."""
    dispatch = DispatchConfig(codec=codec, wire=wire)
    expected = parity(config(dispatch), 2, micro_steps=2)
    found = parity(config(dispatch, recompute), 2, micro_steps=2)
    assert_equal(found, expected)


@pytest.mark.parity
@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 2, "zero": 1}, {"etp": 2}])
def test_other_axes_find_the_same(degrees: dict[str, int]) -> None:
    """Of axes that leave a rank its tokens; others make other rows."""
    expected = parity(config(DispatchConfig(codec=LSH)), 2, micro_steps=4)[0]
    micro_steps = 4 if "pp" in degrees else 2
    found = compare(
        parity(config(DispatchConfig(codec=LSH), **degrees), 4, micro_steps=micro_steps), expected
    )
    assert not found.missing
    assert found.figures < 1e-4
    assert found.gradients < 1e-3


ALONE = replace(LSH, options={"hashes": 8, "dimensions": 16, "error_bound": None})
"""So many hashes that each token is a row by itself."""


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "micro_steps", "degrees"),
    [
        (2, 1, {}),
        (2, 4, {}),
        (4, 2, {"tp": 2, "ep": 4}),
        (4, 2, {"cp": 2, "ep": 4}),
        (4, 4, {"pp": 2}),
        (4, 2, {"zero": 3}),
    ],
    ids=str,
)
def test_a_row_for_each_slot_is_the_plain_run_in_any_layout(
    size: int, micro_steps: int, degrees: dict[str, int]
) -> None:
    """And of any accumulation; tokens that are equal share a row, and their gradients are summed first."""
    plain = parity(config(DispatchConfig(), ep=1), 1, micro_steps=2)[0]
    coded = parity(config(DispatchConfig(codec=ALONE), **degrees), size, micro_steps=micro_steps)
    slots = sum(map(sum, plain.results[0].expert_load_ME))
    assert 0.85 * slots < sum(coded[0].results[0].coded_rows_M) <= slots
    difference = compare(coded, plain)
    assert not difference.missing
    assert difference.worst < 1e-5


@pytest.mark.parity
def test_a_recomputation_under_tensor_parallelism_finds_the_same_numbers() -> None:
    dispatch = DispatchConfig(codec=LSH, wire=INT8)
    expected = parity(config(dispatch, tp=2, ep=4), 4, micro_steps=2)
    assert_equal(parity(config(dispatch, "layer", tp=2, ep=4), 4, micro_steps=2), expected)


def test_warm_up_steps_are_plain() -> None:
    plain = parity(PLAIN, 2, micro_steps=2)[0]
    dispatch = DispatchConfig(codec=LSH, wire=INT8, warmup_steps=1)
    found = parity(config(dispatch), 2, micro_steps=2)[0]
    assert found.results[0].loss == plain.results[0].loss
    assert all(torch.equal(found.gradients[0][n], g) for n, g in plain.gradients[0].items())
    assert found.results[1].sent_bytes < plain.results[1].sent_bytes / 2
    assert found.results[0].sent_bytes == plain.results[0].sent_bytes
    assert found.results[0].coded_rows_M == []
    assert len(found.results[1].coded_rows_M) == 3


def _bytes(rank: int, size: int, dispatch: DispatchConfig, recompute: Recompute) -> dict[str, Any]:
    run_config = with_micro_steps(config(dispatch, recompute), size, 2)
    run = SmallRun(run_config, size)
    experts_of_rows: list[list[int]] = []
    for layer in run.model.moe_layers():
        codec: Any = layer.compression.codec
        planned = codec.plan

        def watched(*arguments: Any, planned: Any = planned) -> Any:
            code = planned(*arguments)
            experts_of_rows.append(code.ids_C1[:, 0].tolist())
            return code

        codec.plan = watched
    result = run.step()
    return {
        "bytes": result.sent_bytes,
        "plain bytes": result.plain_bytes,
        "rows": experts_of_rows,
        "coded": result.coded_rows_M,
    }


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize(("wire", "width"), [(WireConfig(), 32 * 4), (INT8, 32 + 4 * 4)])
def test_bytes_are_rows_times_width(wire: WireConfig, width: int, recompute: Recompute) -> None:
    """Of all ranks: rows for another rank's experts go there and back, forward and backward."""
    ranks = run_ranks(_bytes, 2, DispatchConfig(codec=LSH, wire=wire), recompute)
    away = sum(
        expert // 4 != rank
        for rank, result in enumerate(ranks)
        for experts in result["rows"]
        for expert in experts
    )
    assert len(ranks[0]["rows"]) == 2 * 3  # micro-steps and layers; a recomputation decides nothing
    passes = 3 if recompute == "layer" else 2
    assert {result["bytes"] for result in ranks} == {2 * passes * away * width}
    assert {result["plain bytes"] for result in ranks} == {2 * passes * away * 32 * 4}
    coded = [
        sum(len(experts) for result in ranks for experts in result["rows"][layer::3])
        for layer in range(3)
    ]
    assert [result["coded"] for result in ranks] == [coded] * 2


def _poisoned(
    rank: int, size: int, policy: Literal["skip", "stop"], codec: ComponentConfig
) -> tuple[float, float, bool, float]:
    """A step in which a token's embedding is not a number, refused by its judge; then a good one's loss."""
    coded = config(DispatchConfig(codec=codec, wire=INT8, ranks_per_node=1))
    run_config = replace(coded, anomaly=AnomalyConfig(policy=policy))
    run = SmallRun(with_micro_steps(run_config, size, 2), size)
    table = run.model.get_parameter("embed.weight")
    good = table.detach().clone()
    with torch.no_grad():
        table[: len(table) // 2] = float("nan")
    batches = samples_of_step(run.config, 0, run.meshes.dp_rank, run.dims.dp, 2)
    bad = run.train_step(batches, 1e-3, judge=lambda loss, norm: None)
    with torch.no_grad():
        table.copy_(good)
    return bad.loss, bad.grad_norm, bad.is_applied, run.step().loss


@pytest.mark.parametrize("codec", [LSH, TREE], ids=["lsh", "tree"])
def test_a_step_that_is_to_be_skipped_is_not_an_error(codec: ComponentConfig) -> None:
    """What is not finite arrives as it would without codec and wire, and the judge sees it."""
    for loss, grad_norm, is_applied, after in run_ranks(_poisoned, 2, "skip", codec):
        assert math.isnan(loss)
        assert math.isnan(grad_norm)
        assert not is_applied
        assert math.isfinite(after)


@pytest.mark.parametrize("codec", [LSH, TREE], ids=["lsh", "tree"])
def test_otherwise_the_row_is_named(codec: ComponentConfig) -> None:
    with pytest.raises(RuntimeError, match=r"row \d+ is not finite"):
        run_ranks(_poisoned, 2, "stop", codec)
