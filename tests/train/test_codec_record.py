"""What a step's record says of rows that a codec made fewer."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moesys.testing.small_run import small_model
from moesys.train.record import _codec_fields


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
