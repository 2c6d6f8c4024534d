"""Every parallel axis alone, every pair, and some triples train with one process's numbers, over 20 steps.

fp32, dropless, global-batch balance loss, selection bias, gradients accumulated over 4 micro-steps. A few layouts run
with every test; all of them with `make parity`.
"""

from dataclasses import replace
from itertools import combinations
from math import prod

import pytest

from moesys.config.schema import ParallelConfig, RunConfig
from moesys.testing.parity import Numbers, compare, parity
from tests import figures
from tests.train.test_parity import CONFIG

MICRO_STEPS = 4
MODEL = replace(CONFIG.model, num_layers=4, qk_norm=True)
BASE = replace(
    CONFIG,
    model=MODEL,
    # Gradients of q and k norms cancel: at a rate of 3e-3 rounding reaches 1.03e-5 of one by step 19 (cp with tp).
    optim=replace(CONFIG.optim, lr=1e-3),
    train=replace(CONFIG.train, global_batch_tokens=16 * CONFIG.data.seq_len),
)

AXES: dict[str, dict[str, object]] = {
    "pp": {"pp": 2},
    "dp": {},
    "zero": {"zero": 3},
    "cp": {"cp": 2},
    "tp": {"tp": 2},
    "ep": {"ep": 2},
    "etp": {"etp": 2},
}
"""dp and zero double the data ranks; ep and etp fold over whatever ranks a stage has."""

TRIPLES = [("pp", "tp", "ep"), ("dp", "cp", "ep"), ("pp", "cp", "ep"), ("tp", "cp", "etp")]


def layout(*axes: str) -> tuple[int, dict[str, object]]:
    """World size and degrees: 2 along each axis, and as many ranks as that takes."""
    degrees: dict[str, object] = {}
    for axis in axes:
        degrees |= AXES[axis]
    sharing = prod(2 for axis in axes if axis in ("dp", "zero", "cp", "tp"))
    experts = prod(2 for axis in axes if axis in ("ep", "etp"))
    return (2 if "pp" in axes else 1) * max(sharing, experts), degrees


LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    **{axis: layout(axis) for axis in AXES},
    **{"+".join(pair): layout(*pair) for pair in combinations(AXES, 2)},
    **{"+".join(triple): layout(*triple) for triple in TRIPLES},
    "pp+tp+ep+zero": (8, {"pp": 2, "tp": 2, "ep": 2, "zero": 3}),
    "tp without sequence parallelism": (2, {"tp": 2, "sequence_parallel": False}),
    "tp+ep without sequence parallelism": (4, {"tp": 2, "ep": 4, "sequence_parallel": False}),
    "ulysses": (2, {"cp": 2, "cp_attention": "ulysses"}),
    "tp+ulysses": (4, {"tp": 2, "cp": 2, "cp_attention": "ulysses"}),
    "zero 1": (2, {"zero": 1}),
    "zero 2": (4, {"zero": 2, "ep": 2}),
    "two copies of two shards": (4, {"zero": 3, "dp_shard": 2}),
    "experts over two copies": (4, {"zero": 2, "dp_shard": 2, "ep": 4}),
    "four stages": (4, {"pp": 4}),
    **{
        schedule: (2, {"pp": 2, "pp_schedule": schedule})
        for schedule in ("gpipe", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev")
    },
    "dualpipev+tp+ep": (4, {"pp": 2, "tp": 2, "ep": 2, "pp_schedule": "dualpipev"}),
    "zbv+zero": (4, {"pp": 2, "zero": 2, "pp_schedule": "zbv"}),
}

QUICK = ("tp", "zero", "cp", "etp", "pp+tp+ep", "zbv")


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
    assert difference.worst < 1e-5, difference
    assert difference.weights < 1e-4, difference
    return difference.worst


@pytest.mark.parametrize("name", marked(["cp", "ulysses", "pp", "tp", "pp+cp"]))
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
    ["tp", *(pytest.param(n, marks=pytest.mark.parity) for n in ("cp", "zbv", "zero", "pp+tp+ep"))],
)
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
