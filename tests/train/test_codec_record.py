"""What a step's record says of rows that a codec made fewer."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moesys.config.dispatch_schema import CandidateConfig, DispatchConfig
from moesys.testing.small_run import small_model
from moesys.train.record import _codec_fields, _node_fields, _ratio_field
from tests.train.coded import INT8, PLAIN


def test_slots_of_null_experts_are_none_that_could_travel() -> None:
    model = small_model(num_layers=3)
    model = replace(model, moe=replace(model.moe, num_experts=4, zero_experts=2))
    result: Any = SimpleNamespace(
        coded_rows_M=[50, 0],
        expert_load_ME=[[30, 30, 30, 20, 70, 30], [25, 25, 25, 25, 0, 40]],
        dropped_slots_M=[10, 0],
    )
    fields = _codec_fields(model, result)
    assert fields["codec_rows_by_layer"] == [0.5, 1.0]
    assert fields["codec_rows"] == pytest.approx(150 / 200)
    assert _codec_fields(model, SimpleNamespace(coded_rows_M=[])) == {}  # type: ignore[arg-type]


def test_a_ratio_is_of_fewer_bits_and_fewer_rows() -> None:
    """100 of 200 slots travel, in a quarter of the bytes: an eighth."""
    config = replace(PLAIN, dispatch=DispatchConfig(wire=INT8))
    told: Any = SimpleNamespace(
        plain_bytes=4000,
        sent_bytes=1000,
        coded_rows_M=[50, 50, 0],
        expert_load_ME=[[100, 0], [100, 0], [0, 0]],
        dropped_slots_M=[0, 0, 0],
    )
    model = config.model
    assert len(model.moe_layers) == 3
    experts = model.moe_of(model.moe_layers[0]).num_experts
    told.expert_load_ME = [[*row, *[0] * (experts - 2)] for row in told.expert_load_ME]
    assert _ratio_field(config, told) == {"compression_ratio": 8.0}
    told.coded_rows_M = []
    assert _ratio_field(config, told) == {"compression_ratio": 4.0}
    candidates = {"a": CandidateConfig(wire=INT8)}
    chosen = replace(PLAIN, dispatch=DispatchConfig(candidates=candidates))
    assert _ratio_field(chosen, told) == {"compression_ratio": 4.0}
    assert _ratio_field(PLAIN, told) == {}
    told.sent_bytes = 0
    assert _ratio_field(config, told) == {}


def test_bytes_by_node_are_told_where_there_are_several() -> None:
    several: Any = SimpleNamespace(between_nodes_bytes_N=[3, 5])
    assert _node_fields(several) == {"between_nodes_bytes_by_node": [3, 5]}
    assert _node_fields(SimpleNamespace(between_nodes_bytes_N=[])) == {}  # type: ignore[arg-type]
