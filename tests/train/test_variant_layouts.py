"""Variants of the decoder's layers train with one process's numbers under every axis: losses, all gradients, counters."""

from dataclasses import replace

import pytest

from moesys.config.schema import MemoryLayersConfig, RunConfig
from tests.train.test_router_layouts import assert_as_one, configured

ATTENTIONS: dict[str, dict] = {
    "attention experts": {"attention_experts": 3},
    "of shared keys and values": {"attention_experts": 2, "attention_experts_kv": "shared"},
}
"""Keys of model."""


def varied(changes: dict, recompute: str = "none", router: str = "softmax") -> RunConfig:
    config = configured(router, recompute)
    return replace(config, model=replace(config.model, **changes))


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("attention experts", "pp", "none"),
        ("of shared keys and values", "ep", "none"),
        pytest.param("of shared keys and values", "tp+ulysses", "none", marks=pytest.mark.parity),
        *(
            pytest.param(name, layout, recompute, marks=pytest.mark.parity)
            for name in ATTENTIONS
            for layout, recompute in (
                *(("ep", "layer"), ("pp", "layer"), ("tp", "none"), ("cp", "selective")),
                *(("tp", "attention"), ("tp", "layer")),
                *(("tp without sequence parallelism", "none"), ("ulysses", "none")),
                *(("tp without sequence parallelism", "layer"), ("etp", "none")),
                *(("zero", "layer"), ("pp+tp+ep+zero", "none"), ("zbv", "none")),
            )
        ),
    ],
)
def test_attention_experts(name: str, layout: str, recompute: str) -> None:
    assert_as_one(varied(ATTENTIONS[name], recompute), layout)


MEMORY = MemoryLayersConfig(
    layers=(2,), num_keys=8, top_k=3, d_key=8, d_value=16, d_pre=4, rank=2, heads=2
)
MEMORIES: dict[str, dict] = {
    "between MoE layers": {"memory_layers": MEMORY},
    "alone": {
        "memory_layers": replace(MEMORY, layers=(0, 1, 2, 3), d_pre=0, heads=1),
        "num_dense_layers": 0,
    },
    "beside what layers share": {
        "memory_layers": replace(MEMORY, layers=(1, 3)),
        "num_dense_layers": 0,
        "share_depth": "all",
    },
}
"""Keys of model."""


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("between MoE layers", "ep", "none"),
        ("between MoE layers", "pp", "none"),
        *(
            pytest.param("between MoE layers", layout, recompute, marks=pytest.mark.parity)
            for layout, recompute in (
                *(("ep", "layer"), ("zero", "layer"), ("zero 1", "none"), ("zero 2", "selective")),
                *(("tp", "none"), ("tp", "layer"), ("tp without sequence parallelism", "none")),
                *(("tp without sequence parallelism", "layer"), ("cp", "none"), ("tp+ep", "none")),
                *(("pp+tp+ep", "moe"), ("pp+tp+ep+zero", "none"), ("zbv", "none")),
                *(("interleaved_zero_bubble", "none"), ("experts over two copies", "none")),
            )
        ),
        *(
            pytest.param(name, layout, "none", marks=pytest.mark.parity)
            for name in ("alone", "beside what layers share")
            for layout in ("ep", "zero", "four stages", "tp+ep", "pp+tp+ep")
        ),
    ],
)
def test_memory_layers(name: str, layout: str, recompute: str) -> None:
    assert_as_one(varied(MEMORIES[name], recompute), layout)


SHARED: dict[str, dict] = {
    "moe": {"share_depth": "moe"},
    "all": {"share_depth": "all"},
    "all, attention experts": {"share_depth": "all", "attention_experts": 2},
}
"""Keys of model."""


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("all", "ep", "none"),
        ("all", "pp", "none"),
        *(
            pytest.param("all", layout, recompute, marks=pytest.mark.parity)
            for layout, recompute in (
                *(("zero", "layer"), ("zero 1", "none"), ("zero 2", "selective"), ("etp", "moe")),
                *(("tp", "attention"), ("tp without sequence parallelism", "none"), ("cp", "none")),
                *(("pp+tp+ep+zero", "none"), ("pp", "layer"), ("experts over two copies", "none")),
                *(("interleaved", "none"), ("interleaved_zero_bubble", "none"), ("zbv", "none")),
                *(("dualpipev", "layer"), ("gpipe", "none"), ("four stages", "moe")),
            )
        ),
        *(
            pytest.param(name, layout, recompute, marks=pytest.mark.parity)
            for name in SHARED
            if name != "all"
            for layout, recompute in (
                *(("ep", "layer"), ("zero", "none"), ("pp+tp+ep", "none"), ("zbv", "none")),
                *(("cp", "selective"), ("tp without sequence parallelism", "layer")),
            )
        ),
    ],
)
def test_shared_depth(name: str, layout: str, recompute: str) -> None:
    assert_as_one(varied(SHARED[name], recompute), layout)


@pytest.mark.parity
@pytest.mark.parametrize("router", ["sigmoid", "recurrent", "relu"])
@pytest.mark.parametrize("layout", ["ep", "four stages", "zero"])
def test_shared_routers(router: str, layout: str) -> None:
    assert_as_one(varied({"share_depth": "all"}, router=router), layout)
