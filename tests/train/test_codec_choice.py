"""A run that chooses its layers' codecs: when it is due, within the budget, once, and the same after a resume."""

from types import SimpleNamespace
from typing import Any

import pytest

from moesys.config.build import config_hash
from moesys.config.dispatch_schema import CandidateConfig, DispatchConfig
from moesys.config.schema import ComponentConfig
from moesys.moe.compression import UNCOMPRESSED, Compression
from moesys.moe.layer import MoELayer
from moesys.train.codec_choice import CodecChoice
from tests.moe.test_lsh import D, as_in_paper, make_layer
from tests.train.launched import overrides, records
from tests.train.launched import run as run_ranks

LSH = "_target_:moesys.moe.codecs.LshCodec,compensation:slope"
INT8 = "dispatch_forward:int8,dispatch_backward:int8,combine_forward:int8,combine_backward:int8"
D_ROW = 64
CANDIDATES = [
    "codec=none",
    f"+dispatch.candidates.int8={{wire:{{{INT8}}}}}",
    f"+dispatch.candidates.near={{codec:{{{LSH},error_bound:0.5}},wire:{{{INT8}}}}}",
    f"+dispatch.candidates.far={{codec:{{{LSH},error_bound:1.0}}}}",
    "+dispatch.candidates.there={wire:{dispatch_forward:int8,combine_forward:int8}}",
    *("dispatch.warmup_steps=4", "model.num_layers=4", "parallel.ep=2"),
    # Noise would be drawn again by a layer that runs again.
    "model.moe.router._target_=moesys.moe.routers.TopKRouter",
]
NAMES = {"none", "int8", "near", "far", "there"}


def exact(folder):
    keys = ("step", "loss", "grad_norm", "sent_bytes", "codec_rows_by_layer")
    return [{key: record.get(key) for key in keys} for record in records(folder, "train")]


def by_bytes(folder, data, share, *more):
    budget = [*CANDIDATES, f"dispatch.byte_budget={share}"]
    return overrides(folder, data, *budget, *more)


@pytest.mark.parity
def test_all_layers_keep_to_a_budget_of_bytes(tiny_data, tmp_path):
    output = run_ranks(2, by_bytes(tmp_path, tiny_data, 0.4, "train.steps=12", "optim.lr=1e-7"))
    assert "codecs from here, by MoE layers: " in output
    (choice,) = records(tmp_path, "codecs")
    assert choice["step"] == 5
    taken, trials = choice["codec_by_layer"], choice["trials"]
    assert set(trials) == NAMES
    assert len(taken) == 3
    plain = trials["none"]["sent_bytes_by_layer"]
    assert trials["none"]["error_by_layer"] == [0.0] * 3
    sent = [trials[name]["sent_bytes_by_layer"][at] for at, name in enumerate(taken)]
    assert min(plain) > 0
    there = trials["there"]["sent_bytes_by_layer"]
    ratio = (2 * (D_ROW + 4) + 2 * 4 * D_ROW) / (4 * 4 * D_ROW)
    assert there == pytest.approx([ratio * nbytes for nbytes in plain]), "the way back counts too"
    assert sum(sent) <= 0.4 * sum(plain)
    train = records(tmp_path, "train")
    before, after = ([r["sent_bytes"] for r in part] for part in (train[:4], train[4:]))
    # Other tokens than those tried, which cluster a little differently.
    assert max(after) < 0.5 * min(before)
    assert all("codec_rows" not in record for record in train[:4])
    for record in train[4:]:
        for name, rows in zip(taken, record["codec_rows_by_layer"], strict=True):
            assert (rows < 1) == (name in ("near", "far"))
    measured = records(tmp_path, "eval")[0]["codec_error_by_layer"]
    for at, name in enumerate(taken):
        tried = trials[name]["error_by_layer"][at]
        assert measured[at] == pytest.approx(tried, rel=0.1), "the model has hardly changed"


@pytest.mark.parity
def test_a_resume_keeps_the_choice(tiny_data, tmp_path):
    """Before it is due, and after."""
    for folder, parts in (("whole", [12]), ("cut", [3, 7, 12])):
        for steps in parts:
            more = [f"train.steps={steps}", "schedule=constant", "schedule.warmup_steps=2"]
            run_ranks(2, by_bytes(tmp_path / folder, tiny_data, 0.4, *more))
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    (whole,), (cut,) = (records(tmp_path / folder, "codecs") for folder in ("whole", "cut"))
    assert cut["codec_by_layer"] == whole["codec_by_layer"]
    more = ["train.steps=13", "schedule=constant", "schedule.warmup_steps=2"]
    run_ranks(2, by_bytes(tmp_path / "cut", tiny_data, 1.0, *more))
    assert records(tmp_path / "cut", "codecs")[-1]["codec_by_layer"] == ["none"] * 3, (
        "another budget, another choice"
    )


@pytest.mark.parity
@pytest.mark.parametrize("degrees", [["parallel.pp=2"], ["parallel.etp=2"], ["parallel.tp=2"]])
def test_other_axes_choose_too(degrees, tiny_data, tmp_path):
    """By errors alone; more axes change no routing but by rounding, and tp which tokens are together."""
    budget = ["dispatch.error_budget=0.2", "model.mtp_depth=1", "train.steps=8"]
    run_ranks(4, overrides(tmp_path, tiny_data, *CANDIDATES, *budget, *degrees))
    (choice,) = records(tmp_path, "codecs")
    assert len(choice["codec_by_layer"]) == 3
    for at, name in enumerate(choice["codec_by_layer"]):
        assert choice["trials"][name]["error_by_layer"][at] <= 0.2
        assert choice["trials"]["far"]["error_by_layer"][at] > 0
    assert len(records(tmp_path, "train")) == 8
    (evaluated,) = (record["codec_error_by_layer"] for record in records(tmp_path, "eval")[:1])
    assert len(evaluated) == 3, "no evaluation runs the layer for multi-token prediction"


def with_candidates(ep: int) -> tuple[CodecChoice, MoELayer, DispatchConfig]:
    """Of a run with one MoE layer."""
    layer = make_layer(None)
    layer.candidates = {"near": Compression(codec=as_in_paper(d_model=D))}
    codec = ComponentConfig(target="moesys.moe.codecs.LshCodec")
    dispatch = DispatchConfig(
        candidates={"near": CandidateConfig(codec=codec)}, error_budget=0.2, warmup_steps=4
    )
    run: Any = SimpleNamespace(
        config=SimpleNamespace(
            dispatch=dispatch,
            parallel=SimpleNamespace(ep=ep),
            model=SimpleNamespace(moe_layers=(0,)),
        ),
        model=SimpleNamespace(moe_places=lambda: {0: layer}, moe_layers=lambda: [layer]),
    )
    return CodecChoice(run), layer, dispatch


def test_a_roll_back_goes_back_to_what_was_chosen_then() -> None:
    """Or to having to choose."""
    choice, layer, dispatch = with_candidates(ep=2)
    choice.rewind(None)
    assert choice.state is None
    of_four = {"by_layer": ["near"], "of": config_hash(dispatch)}
    choice.rewind(of_four)
    assert choice.state == of_four
    assert layer.compression is layer.candidates["near"]
    choice.rewind(of_four | {"by_layer": ["far"], "of": "other candidates"})
    assert choice.state is None
    assert layer.compression is UNCOMPRESSED
    choice.rewind(of_four)
    choice.rewind(None)
    assert choice.state is None
    assert layer.compression is UNCOMPRESSED
    assert choice.before(4) is None, "not yet"
    with pytest.raises(AttributeError, match="eval_batches"):
        choice.before(5)  # due again


def test_one_rank_has_nothing_to_choose() -> None:
    choice, *_ = with_candidates(ep=1)
    assert choice.before(5) is None
