"""Every router of ours trains with one process's numbers under every axis: losses, all gradients, counters."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesys.config.schema import BalanceConfig, ComponentConfig, ParallelConfig, RunConfig
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import Numbers, compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps

ALL = BalanceConfig(
    micro_loss_coef=0.0,  # counts other tokens under other layouts
    sequence_loss_coef=0.01,
    global_loss_coef=0.01,
    device_loss_coef=0.02,
    device_groups=4,
    z_loss_coef=0.001,
)
NO_LOSS = BalanceConfig(z_loss_coef=0.001)
BIASED = replace(ALL, bias_update_rate=0.01, bias_end_step=3)
GROUPS = {"num_groups": 4, "top_groups": 2, "group_score_top": 2}

ROUTERS: dict[str, tuple[str, dict, BalanceConfig, int]] = {
    "softmax": ("TopKRouter", {}, ALL, 2),
    "sigmoid": ("TopKRouter", {"score_function": "sigmoid"}, BIASED, 2),
    "grouped": ("GroupLimitedRouter", GROUPS | {"score_function": "sigmoid"}, BIASED, 3),
    "switch": ("SwitchRouter", {"jitter": 0.0}, ALL, 1),
    "cosine": ("CosineRouter", {"temperature": 0.5}, ALL, 2),
    "expert choice": ("ExpertChoiceRouter", {}, NO_LOSS, 2),
    "soft": ("SoftRouter", {"slots_per_expert": 3}, NO_LOSS, 2),
    "hash": ("HashRouter", {}, NO_LOSS, 2),
    "relu": ("ReLURouter", {"l1_initial": 0.01}, NO_LOSS, 2),
    "recurrent": ("RecurrentRouter", {"state_width": 6}, ALL, 2),
    "pre-gated": ("PreGatedRouter", {}, ALL, 2),
}
"""Class, options, balance, top_k."""
LAYERS: dict[str, dict] = {
    "latent experts": {"d_latent": 12},
    "experts without a feed-forward": {
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "top_k": 3,
    },
    "weighed shared expert": {"shared_gate": "sigmoid"},
    "pyramid": {"num_experts": 12, "experts_by_layer": (4, 12, 8), "balance": BIASED},
    "widths": {"num_experts": 12, "expert_widths": (8, 24, 40)},
    "widths of a pyramid": {
        "num_experts": 12,
        "experts_by_layer": (4, 12, 8),
        "expert_widths": (16, 32),
        "balance": replace(ALL, width_loss_coef=0.02),
        "copy_experts": 4,
    },
    "residual MoE, latent": {"shared_gate": "softmax", "d_latent": 12, "num_shared_experts": 2},
}
"""Keys of model.moe."""
AXES = ["ep", "pp", "tp", "cp"]
QUICK = [("expert choice", "pp"), ("soft", "ep"), ("recurrent", "pp")]
QUICK_LAYERS = [
    ("residual MoE, latent", "ep", "none"),
    ("experts without a feed-forward", "pp", "layer"),
    ("pyramid", "pp", "layer"),
]
MORE = [
    ("recurrent", "interleaved", "none", 2),
    ("recurrent", "zbv", "layer", 0),
    ("recurrent", "pp+zero", "none", 1),
    ("recurrent", "pp+tp without sequence parallelism", "none", 2),
    ("recurrent", "four stages", "none", 3),
    ("pre-gated", "four stages", "layer", 1),
    ("hash", "interleaved", "layer", 0),
    ("hash", "tp without sequence parallelism", "none", 0),
    ("expert choice", "cp+tp", "layer", 1),
    ("soft", "cp+tp", "layer", 1),
    ("soft", "tp without sequence parallelism", "selective", 1),
    ("soft", "cp+ep", "moe", 1),
    ("relu", "pp+tp+ep", "layer", 1),
]
MORE_LAYOUTS = {
    "pp+tp without sequence parallelism": (4, {"pp": 2, "tp": 2, "sequence_parallel": False})
}


def configured(name: str, recompute="none", num_dense_layers: int = 1) -> RunConfig:
    target, options, balance, top_k = ROUTERS[name]
    router = ComponentConfig(target=f"moesys.moe.routers.{target}", options=options)
    moe = replace(BASE.model.moe, router=router, balance=balance, top_k=top_k)
    model = replace(BASE.model, moe=moe, num_dense_layers=num_dense_layers)
    return replace(BASE, model=model, train=replace(BASE.train, recompute=recompute, steps=6))


_references: dict[str, list[Numbers]] = {}


def assert_as_one(config: RunConfig, layout: str) -> None:
    key = repr(config)
    if key not in _references:
        _references[key] = parity(config, 1, MICRO_STEPS)
    world_size, degrees = (LAYOUTS | MORE_LAYOUTS)[layout]
    spread = replace(config, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    difference = compare(parity(spread, world_size, MICRO_STEPS), _references[key][0])
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        (name, axis)
        if (name, axis) in QUICK
        else pytest.param(name, axis, marks=pytest.mark.parity)
        for name in ROUTERS
        for axis in AXES
    ],
)
def test_one_axis(name: str, axis: str) -> None:
    assert_as_one(configured(name), axis)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout", "recompute", "num_dense_layers"), MORE)
def test_more_layouts(name: str, layout: str, recompute: str, num_dense_layers: int) -> None:
    assert_as_one(configured(name, recompute, num_dense_layers), layout)


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        case if case in QUICK_LAYERS else pytest.param(*case, marks=pytest.mark.parity)
        for case in (
            (name, layout, recompute)
            for name in LAYERS
            for layout, recompute in (
                *(("ep", "none"), ("ep", "moe"), ("pp", "none"), ("pp", "layer")),
                *(("tp", "selective"), ("cp", "none"), ("etp", "none"), ("zero", "layer")),
                ("tp without sequence parallelism", "none"),
            )
        )
    ],
)
def test_layer_variants(name: str, layout: str, recompute: str) -> None:
    config = configured("softmax", recompute)
    moe = replace(config.model.moe, **LAYERS[name])
    assert_as_one(replace(config, model=replace(config.model, moe=moe)), layout)


def _load_and_buffers(
    rank: int, world_size: int, config: RunConfig, buffer: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Of each MoE layer after a step."""
    run = SmallRun(with_micro_steps(config, world_size, MICRO_STEPS), world_size)
    load_ME = run.step().expert_load_ME
    return load_ME, [layer.router.get_buffer(buffer).tolist() for layer in run.model.moe_layers()]


def test_what_follows_the_load_in_a_pyramid_follows_each_layers_own_experts() -> None:
    pyramid = {"num_experts": 12, "experts_by_layer": (4, 12, 8)}
    found = {}
    for name, buffer in (("sigmoid", "selection_bias_E"), ("relu", "fractions_E")):
        config = configured(name)
        moe = replace(config.model.moe, **pyramid)
        config = replace(config, model=replace(config.model, moe=moe))
        found[name] = run_ranks(_load_and_buffers, 1, config, buffer)[0]
    for load_ME, buffers_ME in found.values():
        assert [len(load_E) for load_E in load_ME] == [len(b) for b in buffers_ME] == [4, 12, 8]
    for load_E, bias_E in zip(*found["sigmoid"], strict=True):
        mean = sum(load_E) / len(load_E)
        assert bias_E == pytest.approx([0.01 * ((load < mean) - (load > mean)) for load in load_E])
    for load_E, fractions_E in zip(*found["relu"], strict=True):
        slots = 2 * BASE.train.global_batch_tokens
        assert fractions_E == pytest.approx([len(load_E) * load / slots for load in load_E])


def _biases(rank: int, world_size: int, config: RunConfig) -> dict[str, Tensor]:
    run = SmallRun(with_micro_steps(config, world_size, MICRO_STEPS), world_size)
    for _ in range(50):
        run.step()
    return {n: b.clone() for n, b in run.model.named_buffers() if n.endswith("selection_bias_E")}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.parity) for x in ("ep", "dp", "pp", "tp", "cp", "zero")],
)
def test_biases_after_fifty_steps_are_bitwise_those_of_one_process(layout: str) -> None:
    config = configured("sigmoid")
    balance = replace(config.model.moe.balance, bias_end_step=0)
    config = replace(
        config, model=replace(config.model, moe=replace(config.model.moe, balance=balance))
    )
    if "biases" not in _biases_of_one:
        _biases_of_one.update(biases=run_ranks(_biases, 1, config)[0])
    expected = _biases_of_one["biases"]
    assert len(set(torch.cat([*expected.values()]).tolist())) > 5
    world_size, degrees = LAYOUTS[layout]
    spread = replace(config, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    for rank in run_ranks(_biases, world_size, spread):
        found |= rank
        assert all(torch.equal(bias_E, expected[name]) for name, bias_E in rank.items())
    assert found.keys() == expected.keys()


_biases_of_one: dict[str, dict[str, Tensor]] = {}


def _biases_of_steps(rank: int, world_size: int, config: RunConfig) -> list[Tensor]:
    run = SmallRun(with_micro_steps(config, world_size, MICRO_STEPS), world_size)
    seen = []
    for _ in range(5):
        run.step()
        seen.append(torch.cat([b for n, b in run.model.named_buffers() if n.endswith("bias_E")]))
    return seen


def test_a_bias_stays_after_its_end_step() -> None:
    (seen,) = run_ranks(_biases_of_steps, 1, configured("sigmoid"))
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[4])
