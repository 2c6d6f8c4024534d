"""What routers hand on from layer to layer, and their own losses, are one process's numbers under every layout.

20 steps, gradients accumulated over 4 micro-steps. Stages that end before the first router have no state to send.
"""

from dataclasses import replace

import pytest

from moesys.config.schema import ComponentConfig, ParallelConfig, RunConfig
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import compare, parity
from moesys.testing.ranks import RankError
from tests.train.recurrent_router import RecurrentRouter


class UndeclaredRouter(RecurrentRouter):
    """Says that its state is narrower than it is."""

    state_dim = 4

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.state_dim = 0


def with_router(name: str, *, num_dense_layers: int, recompute="none") -> RunConfig:
    moe = replace(BASE.model.moe, router=ComponentConfig(target=f"tests.train.{name}"))
    model = replace(BASE.model, moe=moe, num_dense_layers=num_dense_layers)
    return replace(BASE, model=model, train=replace(BASE.train, recompute=recompute))


CASES = [
    ("pp", 2, "none"),
    ("pp+tp without sequence parallelism", 2, "none"),
    ("interleaved", 2, "layer"),
    ("zbv", 0, "none"),
    ("interleaved_zero_bubble", 1, "layer"),
    ("pp+cp", 1, "layer"),
    ("pp+tp+ep", 2, "selective"),
    ("pp+zero", 2, "none"),
    ("tp without sequence parallelism", 1, "layer"),
]
MORE_LAYOUTS = {
    "pp+tp without sequence parallelism": (4, {"pp": 2, "tp": 2, "sequence_parallel": False})
}


@pytest.mark.parametrize(
    ("name", "num_dense_layers", "recompute"),
    [case if case[0] == "pp" else pytest.param(*case, marks=pytest.mark.parity) for case in CASES],
)
def test_a_state_travels_under_every_layout(name, num_dense_layers, recompute):
    config = with_router(
        "recurrent_router.RecurrentRouter", num_dense_layers=num_dense_layers, recompute=recompute
    )
    reference = parity(config, 1, MICRO_STEPS)[0]
    first = f"layers.{num_dense_layers}.moe.router"
    carried = {n for n in reference.gradients[0] if n.endswith(".carry")}
    assert len(carried) == 3 - num_dense_layers, "the first router has no state to read"
    assert f"{first}.mix" in reference.gradients[0]
    world_size, degrees = (LAYOUTS | MORE_LAYOUTS)[name]
    spread = replace(config, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    difference = compare(parity(spread, world_size, MICRO_STEPS), reference)
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference


def test_a_pipeline_refuses_a_state_of_unknown_width():
    config = with_router("test_router_state.UndeclaredRouter", num_dense_layers=1)
    config = replace(config, parallel=ParallelConfig(pp=2))
    with pytest.raises(RankError, match=r"UndeclaredRouter.*write state_dim = 4"):
        parity(config, 2, MICRO_STEPS)
