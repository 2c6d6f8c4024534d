"""The layer benchmark: peers compute what we do, the check sees it when they do not, rows have the form."""

import importlib.util
from typing import Any

import pytest
import torch

from benchmarks import layer
from benchmarks.peers.moe_layer import LayerShape, LayerWeights
from benchmarks.results import write_result

TINY = LayerShape(num_experts=4, top_k=2, num_tokens=48, d_model=16, d_expert=8)
# More experts than slots: some get no token, and peers give them no gradient.
SPARSE = LayerShape(num_experts=32, top_k=3, num_tokens=5, d_model=16, d_expert=8)
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("deepspeed")),
    reason="transformers and deepspeed are the peers",
)


def contestants(
    shape: LayerShape,
) -> tuple[layer.OurLayer, dict[str, Any], torch.Tensor]:
    torch.manual_seed(3)
    weights = LayerWeights.random(shape, CPU, torch.float32)
    x_TD = torch.randn(shape.num_tokens, shape.d_model)
    return layer.OurLayer(shape, weights), layer.build_peers(shape, weights), x_TD


def test_rows_of_a_run_have_the_form(tmp_path: Any) -> None:
    lines: list[str] = []
    result = layer.compare(
        [TINY, SPARSE], device=CPU, dtype=torch.float32, budget_s=0.0, progress=lines.append
    )
    assert write_result("layer", result.headline, result.rows, "x", quick=True, folder=tmp_path)
    assert len(lines) == len(result.rows) == result.headline["shapes"] == 2
    row = result.rows[0]
    assert row["shape"] == "E4 K2 T48 D16 F8"
    peers = {
        "transformers_eager",
        "transformers_grouped_mm",
        "transformers_batched_mm",
        "deepspeed",
    }
    assert row["best_peer"] in peers
    ratios = {peer: row[f"{peer}_ratio"] for peer in peers}
    assert row["ratio_to_best_peer"] == ratios[row["best_peer"]] == min(ratios.values())  # type: ignore[index, type-var]
    assert result.headline["min_ratio_to_best_peer"] == min(
        float(row["ratio_to_best_peer"] or 0) for row in result.rows
    )
    assert set(result.rows[0]) == set(result.rows[1]), "one table"


@pytest.mark.parametrize("shape", [TINY, SPARSE], ids=["tiny", "sparse"])
def test_peers_agree_with_ours_in_outputs_and_all_gradients(shape: LayerShape) -> None:
    ours, peers, x_TD = contestants(shape)
    errors = layer.check_parity(ours, peers, x_TD)
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["transformers_grouped_mm", "deepspeed"])
def test_a_peer_with_other_weights_is_refused(name: str) -> None:
    ours, peers, x_TD = contestants(TINY)
    parameter = max(peers[name].parameters(), key=torch.numel)
    with torch.no_grad():
        parameter[-1] *= 1.01  # one slice of one weight, by a hundredth
    with pytest.raises(RuntimeError, match=rf"{name} computes something else.*output \d"):
        layer.check_parity(ours, {name: peers[name]}, x_TD)


def test_gradients_are_compared_not_only_outputs() -> None:
    ours, peers, x_TD = contestants(TINY)
    peer = peers["transformers_grouped_mm"]
    peer.block.experts.down_proj.register_hook(lambda grad: grad * 1.01)
    with pytest.raises(RuntimeError, match="computes something else"):
        layer.check_parity(ours, {"peer": peer}, x_TD)


def test_full_shapes_cover_the_corners() -> None:
    for axis, (least, most) in {
        "num_experts": (8, 64),
        "top_k": (2, 8),
        "num_tokens": (512, 8192),
        "d_model": (256, 1024),
    }.items():
        values = {getattr(shape, axis) for shape in layer.SHAPES}
        assert (min(values), max(values)) == (least, most)
        assert len(values) >= 3
    assert len(layer.SHAPES) == len(set(layer.SHAPES)) == 24
