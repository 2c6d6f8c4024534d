"""The layouts that train with one process's numbers: every parallel axis alone, every pair, some triples, each schedule."""

from dataclasses import replace
from itertools import combinations
from math import prod

from moesys.config.schema import BalanceConfig, OptimConfig
from moesys.testing.small_run import small_config, small_model

SMALL = small_config(
    small_model(
        balance=BalanceConfig(global_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.01)
    ),
    seq_len=16,
    sequences=8,
    steps=20,
    seed=7,
    # AdamW divides by |g|: with eps near the rounding of g, a first step may go either way for it (2e-5 of wq).
    optim=OptimConfig(lr=3e-3, eps=1e-5),
)
"""20 steps of 8 sequences in one micro-batch."""

MICRO_STEPS = 4
"""Of a data rank."""
MAX_ERROR, MAX_WEIGHT_ERROR = 1e-5, 1e-4
"""Relative, of a layout's numbers from one process's: losses and gradients; weights after the last step."""
BASE = replace(
    SMALL,
    model=replace(SMALL.model, num_layers=4, qk_norm=True),
    # Gradients of q and k norms cancel: at a rate of 3e-3 rounding reaches 1.03e-5 of one by step 19 (cp with tp).
    optim=replace(SMALL.optim, lr=1e-3),
    train=replace(SMALL.train, global_batch_tokens=16 * SMALL.data.seq_len),
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
