"""Held-out loss does not depend on the number of ranks, and bits per byte are bits over bytes."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from moesys.config.schema import ParallelConfig
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import EvalBatches
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.testing.layouts import SMALL as CONFIG
from moesys.testing.ranks import run_ranks
from moesys.train.evaluate import Evaluation, evaluate, measure_loads


def _evaluate(
    rank: int,
    size: int,
    prefix,
    eval_tokens: int,
    capacity_factor: float | None = None,
    share_depth: Literal["none", "all"] = "none",
    **degrees,
):
    tokens = IndexedTokens(prefix, 512)
    moe = replace(CONFIG.model.moe, capacity_factor=capacity_factor)
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, vocab_size=512, num_layers=4, moe=moe, share_depth=share_depth),
        parallel=ParallelConfig(**(degrees or {"ep": size})),
        train=replace(CONFIG.train, micro_batch_tokens=32),
    )
    meshes = build_meshes(parallel_dims(config.parallel, size), "cpu")
    parallel = build_parallel_model(config, meshes, torch.device("cpu"))
    batches = EvalBatches(
        tokens,
        seq_len=16,
        micro_batch_samples=2,
        dp_rank=meshes.dp_rank,
        dp_size=meshes.dims.dp,
        eval_tokens=eval_tokens,
    )
    token_bytes_V = torch.arange(512) % 5 + 1
    result = evaluate(parallel, {"": batches}, [1.0], token_bytes_V, "fp32", meshes)
    assert result is not None
    assert measure_loads(parallel, {"a": batches}, "fp32", meshes)["a"] == result.load_by_source[""]
    taken = parallel.whole.moe_layers()[0].load.take(torch.device("cpu")).sum().item()
    return result, taken


def assert_as_one(ranks: list[tuple[Evaluation, int]], one: Evaluation, eval_tokens: int) -> None:
    for evaluation, taken in ranks:
        result = evaluation.whole
        assert result.tokens == eval_tokens
        assert math.isclose(result.loss, one.whole.loss, rel_tol=1e-6)
        assert math.isclose(result.bits_per_byte, one.whole.bits_per_byte, rel_tol=1e-6)
        assert taken == 0  # evaluation is not load
        assert evaluation.load_by_source == one.load_by_source
        expected = pytest.approx(one.expert_similarity_M, abs=1e-12)
        assert evaluation.expert_similarity_M == expected


@pytest.mark.parametrize("eval_tokens", [100, pytest.param(997, marks=pytest.mark.parity)])
def test_any_number_of_ranks_gives_one_process_result(tiny_data, eval_tokens):
    one, _ = run_ranks(_evaluate, 1, tiny_data / "val", eval_tokens)[0]
    assert_as_one(run_ranks(_evaluate, 4, tiny_data / "val", eval_tokens), one, eval_tokens)
    # Every token with a target has top_k slots in each layer; padding has none.
    slots = [sum(load_E) for load_E in one.load_by_source[""]]
    assert slots == [2 * eval_tokens] * 3
    assert len({tuple(load_E) for load_E in one.load_by_source[""]}) == 3


def _under(rank: int, size: int, prefix, degrees: dict):
    return _evaluate(rank, size, prefix, 100, **degrees)


@pytest.mark.parametrize(
    ("size", "degrees"),
    [
        pytest.param(2, {"tp": 2}, marks=pytest.mark.parity),
        pytest.param(2, {"pp": 2}, marks=pytest.mark.parity),
        (2, {"pp": 2, "pp_schedule": "zbv"}),
        (2, {"zero": 3}),
        pytest.param(2, {"cp": 2}, marks=pytest.mark.parity),
        (4, {"tp": 2, "ep": 2, "etp": 2, "sequence_parallel": False}),
        pytest.param(4, {"zero": 3, "ep": 2}, marks=pytest.mark.parity),
        pytest.param(4, {"zero": 2, "etp": 2}, marks=pytest.mark.parity),
        pytest.param(8, {"pp": 2, "zero": 3, "ep": 2, "cp": 2}, marks=pytest.mark.parity),
    ],
    ids=["tp", "pp", "a V", "zero", "cp", "tp+ep+etp", "zero+ep", "zero+etp", "pp+zero+ep+cp"],
)
def test_any_axis_gives_one_process_result(tiny_data, size, degrees):
    one, _ = run_ranks(_evaluate, 1, tiny_data / "val", 100)[0]
    assert_as_one(run_ranks(_under, size, tiny_data / "val", degrees), one, 100)


def test_layers_of_one_router_are_counted_apart(tiny_data):
    one, _ = run_ranks(_evaluate, 1, tiny_data / "val", 100, None, "all")[0]
    loads = one.load_by_source[""]
    assert [sum(load_E) for load_E in loads] == [2 * 100] * 3
    assert len({tuple(load_E) for load_E in loads}) == 3
    assert len({*one.expert_similarity_M}) == 1


def test_a_capacity_does_not_touch_evaluation(tiny_data):
    dropless, tight = (
        run_ranks(_evaluate, 2, tiny_data / "val", 100, factor)[0][0] for factor in (None, 0.1)
    )
    assert tight == dropless


def test_bits_per_byte_is_total_bits_over_total_bytes(tiny_data):
    result, _ = run_ranks(_evaluate, 1, tiny_data / "val", 160)[0]
    tokens = IndexedTokens(tiny_data / "val", 512)
    available = -(-(len(tokens) - 1) // 16)
    nbytes = 0
    for window in range(10):
        start = window * available // 10 * 16
        nbytes += sum(int(t) % 5 + 1 for t in tokens.tokens_N[start + 1 : start + 17])
    expected = result.whole.loss * 160 / math.log(2) / nbytes
    assert result.whole.bits_per_byte == pytest.approx(expected, rel=1e-9)
