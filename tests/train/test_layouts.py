"""Every parallel axis alone, every pair, and some triples train with one process's numbers, over 20 steps.

fp32, dropless, global-batch balance loss, selection bias, gradients accumulated over 4 micro-steps. A few layouts run
with every test; all of them with `make parity`.
"""

from dataclasses import replace

import pytest

from moesys.config.schema import ParallelConfig, RunConfig
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import Numbers, compare, parity
from tests import figures

QUICK = ("zero", "pp+tp+ep")


def marked(names) -> list:
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.parity) for name in names
    ]


@pytest.fixture(scope="module")
def one_process() -> Numbers:
    return parity(BASE, 1, MICRO_STEPS)[0]


@pytest.mark.parametrize("name", marked(LAYOUTS))
def test_layout_trains_with_one_process_numbers(one_process, name):
    world_size, degrees = LAYOUTS[name]
    config = replace(BASE, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    error = assert_same(config, world_size, one_process)
    figures.count("combinations_passed")
    figures.worst("max_relative_error", error)


def assert_same(config: RunConfig, world_size: int, reference: Numbers) -> float:
    """Return the largest relative error of losses and gradients."""
    difference = compare(parity(config, world_size, MICRO_STEPS), reference)
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference
    return difference.worst


@pytest.mark.parametrize(
    "name",
    ["cp", "ulysses", "pp", "tp", "pp+cp"],
)
@pytest.mark.parity
def test_documents_stay_apart_under_every_layout(name):
    masked = replace(BASE, data=replace(BASE.data, mask_documents=True))
    reference = parity(masked, 1, MICRO_STEPS)[0]
    unmasked = parity(BASE, 1, MICRO_STEPS)[0]
    assert reference.results[0].loss != unmasked.results[0].loss, "the mask does something"
    world_size, degrees = LAYOUTS[name]
    config = replace(masked, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    assert_same(config, world_size, reference)


@pytest.mark.parametrize(
    "name",
    ["tp", "cp", "zbv", "zero", "pp+tp+ep"],
)
@pytest.mark.parity
def test_compiled_blocks_train_with_one_process_numbers(one_process, name):
    world_size, degrees = LAYOUTS[name]
    compiled = replace(BASE, train=replace(BASE.train, compile=True, recompute="attention"))
    config = replace(compiled, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    assert_same(config, world_size, one_process)


TIED = ("pp", "tp", "zbv", "four stages", "interleaved", "pp+zero", "pp+tp+ep+zero")


@pytest.mark.parametrize(
    "name", [n if n == "pp" else pytest.param(n, marks=pytest.mark.parity) for n in TIED]
)
def test_embedding_and_head_stay_one_matrix_under_every_layout(name):
    tied = replace(BASE, model=replace(BASE.model, tie_embeddings=True))
    world_size, degrees = LAYOUTS[name]
    config = replace(tied, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    assert_same(config, world_size, parity(tied, 1, MICRO_STEPS)[0])


RECOMPUTED = [
    *(("tp", "layer"), ("zero", "layer"), ("pp", "layer"), ("zbv+zero", "layer")),
    *(("pp+tp+ep", "layer"), ("cp", "selective"), ("zero 1", "selective")),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "recompute"), RECOMPUTED)
def test_recomputing_changes_nothing_under_any_layout(one_process, name, recompute):
    world_size, degrees = LAYOUTS[name]
    train = replace(BASE.train, recompute=recompute)
    config = replace(BASE, parallel=ParallelConfig(**degrees), train=train)  # type: ignore[arg-type]
    assert_same(config, world_size, one_process)
