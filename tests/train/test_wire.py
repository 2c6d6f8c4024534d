"""Training whose rows travel in few bits: near the plain numbers, and the same ones under recomputation and pipelines."""

from dataclasses import replace

import pytest
import torch

from moesys.config.dispatch_schema import DispatchConfig, WireConfig
from moesys.config.schema import Recompute, RunConfig
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.testing.parity import Numbers, compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, samples_of_step
from tests.train.coded import INT8, all_four, assert_equal, config

FP8 = WireConfig(
    dispatch_forward="e4m3",
    dispatch_backward="e5m2",
    combine_forward="e4m3",
    combine_backward="e5m2",
    block=16,
)


def written(wire: WireConfig, recompute: Recompute = "none", **degrees: int) -> RunConfig:
    return config(DispatchConfig(wire=wire), recompute, **degrees)


def one_moe_layer(wire: WireConfig) -> RunConfig:
    """For one step: no routing comes after a row that was rounded, which may turn a near choice."""
    first = written(wire)
    model = replace(first.model, num_layers=2)
    return replace(first, model=model, train=replace(first.train, steps=1))


@pytest.fixture(scope="module")
def plain() -> Numbers:
    return parity(one_moe_layer(WireConfig()), 2, micro_steps=2)[0]


@pytest.mark.parametrize(
    ("wire", "most"),
    [
        (INT8, 0.02),
        (all_four("int4"), 0.25),
        (FP8, 0.15),
        (replace(FP8, error_feedback=True), 0.15),
        (WireConfig(combine_forward="int8"), 0.01),
    ],
    ids=["int8", "int4", "fp8", "fp8 fed back", "one way"],
)
def test_gradients_are_near_the_plain_ones(wire: WireConfig, most: float, plain: Numbers) -> None:
    found = compare(parity(one_moe_layer(wire), 2, micro_steps=2), plain)
    assert not found.missing
    print(f"{100 * found.gradients:.1f} %")
    assert 1e-4 < found.gradients < most
    assert found.figures < most / 3


@pytest.mark.parametrize("recompute", [pytest.param("moe", marks=pytest.mark.parity), "layer"])
def test_a_recomputation_finds_the_same_numbers(recompute: Recompute) -> None:
    """Bit for bit, chance included: it hangs on what is rounded alone."""
    expected = parity(written(INT8), 2, micro_steps=2)
    found = parity(written(INT8, recompute), 2, micro_steps=2)
    assert_equal(found, expected)


@pytest.mark.parity
@pytest.mark.parametrize("degrees", [{"pp": 2}, {"tp": 2, "ep": 4}, {"cp": 2, "ep": 4}])
def test_other_axes_find_nearly_the_same(degrees: dict[str, int]) -> None:
    """Rounded to the nearest: a difference in the last bit of a scale would turn all of chance's choices."""
    wire = replace(INT8, stochastic_backward=False)
    expected = parity(written(wire), 2, micro_steps=2)[0]
    found = compare(parity(written(wire, **degrees), 4, micro_steps=2), expected)
    assert not found.missing
    assert found.figures < 1e-3
    assert found.gradients < 0.02


def _evaluated(rank: int, size: int, wire: WireConfig) -> float:
    run_config = written(wire)
    meshes = build_meshes(parallel_dims(run_config.parallel, size), "cpu")
    run = SmallRun(run_config, size, meshes)
    (batch,) = samples_of_step(run_config, 0, meshes.dp_rank, run.dims.dp, 1)
    run.model.eval()
    with torch.no_grad():
        return float(run.model(batch.input_ids_BS)[0].double().sum())


def test_an_evaluation_is_that_of_the_model() -> None:
    assert run_ranks(_evaluated, 2, INT8) == run_ranks(_evaluated, 2, WireConfig())
