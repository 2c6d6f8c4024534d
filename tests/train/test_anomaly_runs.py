"""Poisoned batches in real runs: each policy does what it says, on all ranks, and a resume does it again to the bit."""

import math

import pytest
import torch

from tests.train.launched import STEPS, records
from tests.train.poisoned import Poison, train

EXACT = ("step", "tokens", "loss", "aux_loss", "lr", "grad_norm", "expert_load")
SPIKES = ("anomaly.sigma=6", "anomaly.window_steps=16", "anomaly.warmup_steps=16")


def told(folder) -> list[tuple]:
    """Of each anomaly: its step, reason and action."""
    return [(r["step"], r["reason"], r["action"]) for r in records(folder, "anomaly")]


def trained(folder) -> list[int]:
    return [r["step"] for r in records(folder, "train")]


def exact(folder) -> list[dict]:
    return [{key: r[key] for key in EXACT} for r in records(folder, "train")]


def without(*steps: int) -> list[int]:
    return [step for step in range(1, STEPS + 1) if step not in steps]


def is_finite(outcomes) -> bool:
    return all(bool(t.isfinite().all()) for o in outcomes for t in o.tensors.values())


def rates(folder) -> dict[int, float]:
    return {r["step"]: r["lr"] for r in records(folder, "train")}


@pytest.fixture(scope="module")
def healthy(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    (outcome,) = train(folder, tiny_data, [])
    assert not outcome.error
    return folder


@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.chaos)])
def test_by_default_what_is_not_finite_stops_the_run(tiny_data, tmp_path, kind):
    (outcome,) = train(tmp_path, tiny_data, [Poison(7, kind)])
    assert outcome.error.startswith("FloatingPointError: step 7: loss=")
    assert "not finite. The last checkpoint is untouched; lower optim.lr" in outcome.error
    name = "loss" if kind == "loss" else "grad_norm"
    assert told(tmp_path) == [(7, f"{name} is not finite", "stop")]
    assert records(tmp_path, "anomaly")[0][name] is None
    assert trained(tmp_path) == list(range(1, 7))
    assert records(tmp_path, "stop")[-1]["reason"].startswith("failed: step 7")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "parallel.ep=2"),
        *(
            pytest.param(*case, marks=pytest.mark.chaos)
            for case in ((1, "parallel.zero=0"), (2, "parallel.pp=2"), (2, "parallel.zero=3"))
        ),
    ],
)
def test_a_poisoned_batch_is_skipped_under_every_layout(tiny_data, tmp_path, ranks, layout):
    poisons = [Poison(7, "gradient"), Poison(18, "loss")]
    outcomes = train(tmp_path, tiny_data, poisons, "anomaly.policy=skip", layout, ranks=ranks)
    assert [o.error for o in outcomes] == [""] * ranks
    assert is_finite(outcomes)
    assert told(tmp_path) == [
        (7, "grad_norm is not finite", "skip"),
        (18, "loss is not finite", "skip"),
    ]
    assert trained(tmp_path) == without(7, 18)
    assert [r["tokens"] for r in records(tmp_path, "train")][-1] == STEPS * 512, "the data goes on"


@pytest.mark.chaos
def test_a_watched_run_without_anomalies_is_bitwise_an_unwatched_one(healthy, tiny_data, tmp_path):
    (outcome,) = train(tmp_path, tiny_data, [], "anomaly.policy=skip", *SPIKES)
    assert not outcome.error
    assert not told(tmp_path)
    assert exact(tmp_path) == exact(healthy)


def test_a_spike_is_found_before_the_update_and_stops_the_run(tiny_data, tmp_path):
    (outcome,) = train(tmp_path, tiny_data, [Poison(20, "loss", 1.5)], *SPIKES)
    (anomaly,) = records(tmp_path, "anomaly")
    assert told(tmp_path) == [(20, "loss spikes", "stop")]
    assert anomaly["loss"] > anomaly["limit"] > records(tmp_path, "train")[-1]["loss"]
    assert "6 deviations above the last 16 good steps" in outcome.error
    assert "raise anomaly.sigma" in outcome.error
    assert outcome.tensors["optim.embed.weight.step"] == 19, "there was no update"


@pytest.mark.chaos
def test_a_batch_is_trained_on_later_once(tiny_data, tmp_path):
    poisons = [Poison(7, "gradient"), Poison(10, "gradient", again=True)]
    again = ["anomaly.policy=reinject", "anomaly.reinject_after_steps=6"]
    outcomes = train(tmp_path, tiny_data, poisons, *again, ranks=2)
    assert [o.error for o in outcomes] == ["", ""]
    order = [*range(1, 13), 7, 13, 14, 10, *range(15, STEPS - 1)]
    assert [o.batches for o in outcomes] == [order, order]
    # The second batch is bad both times: it is dropped.
    assert [r["action"] for r in records(tmp_path, "anomaly")] == ["reinject", "reinject", "skip"]
    assert trained(tmp_path) == without(7, 10, 16)


@pytest.mark.chaos
def test_a_lower_rate_lasts_for_its_steps(healthy, tiny_data, tmp_path):
    lower = ["anomaly.policy=lower_rate", "anomaly.rate_steps=3", "anomaly.rate_factor=0.25"]
    poisons = [Poison(5, "gradient"), Poison(20, "loss", 1.5)]
    (outcome,) = train(tmp_path, tiny_data, poisons, *lower, *SPIKES)
    assert not outcome.error
    assert [r["action"] for r in records(tmp_path, "anomaly")] == ["lower_rate", "lower_rate"]
    # What is not finite cannot be applied at any rate; a spike is.
    assert trained(tmp_path) == without(5)
    ratios = {step: rate / rates(healthy)[step] for step, rate in rates(tmp_path).items()}
    assert {s for s, ratio in ratios.items() if math.isclose(ratio, 0.25)} == {6, 7, 8, 20, 21, 22}
    assert all(ratio in (1.0, 0.25) for ratio in ratios.values())


@pytest.mark.chaos
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_roll_back_goes_on_behind_the_batches_since(tiny_data, tmp_path, ranks):
    outcomes = train(
        tmp_path, tiny_data, [Poison(13, "gradient")], "anomaly.policy=roll_back", ranks=ranks
    )
    assert [o.error for o in outcomes] == [""] * ranks
    assert outcomes[0].batches == list(range(1, STEPS + 4)), "no batch is read twice"
    (anomaly,) = records(tmp_path, "anomaly")
    assert (anomaly["step"], anomaly["to_step"], anomaly["action"]) == (13, 10, "roll_back")
    assert trained(tmp_path) == list(range(1, STEPS + 1)), "every step once"
    tokens = {r["step"]: r["tokens"] for r in records(tmp_path, "train")}
    assert (tokens[10], tokens[11]) == (10 * 512, 14 * 512)
    assert [r["step"] for r in records(tmp_path, "checkpoint")] == [5, 10, 15, 20, STEPS]
    assert outcomes[0].tensors["optim.embed.weight.step"] == STEPS


def test_a_roll_back_has_the_weights_of_the_checkpoint(tiny_data, tmp_path):
    (whole,) = train(tmp_path / "a", tiny_data, [Poison(13, "loss")], "anomaly.policy=roll_back")
    (cut,) = train(tmp_path / "b", tiny_data, [Poison(11, "die")])
    assert whole.rolled_back.keys() == cut.tensors.keys()
    for name, tensor in cut.tensors.items():
        assert torch.equal(whole.rolled_back[name], tensor), name


def test_answers_follow_one_another_and_end(tiny_data, tmp_path):
    poisons = [Poison(step, "gradient") for step in range(8, 99)]
    more = ["anomaly.policy=skip", "anomaly.tries=2"]
    outcomes = train(tmp_path, tiny_data, poisons, *more, ranks=2)
    assert outcomes[0].error == outcomes[1].error
    assert (
        "(before: 2 x skip, 2 x lower_rate, 2 x roll_back; anomaly.tries=2 each)"
        in outcomes[0].error
    )
    # The second roll back is from the step after the first one's.
    assert [(r["step"], r["action"], r["number"]) for r in records(tmp_path, "anomaly")] == [
        (8, "skip", 1),
        (9, "skip", 2),
        (10, "lower_rate", 3),
        (11, "lower_rate", 4),
        (12, "roll_back", 5),
        (11, "roll_back", 6),
        (11, "stop", 7),
    ]


def test_without_a_checkpoint_there_is_no_way_back(tiny_data, tmp_path):
    poisons = [Poison(step, "gradient") for step in (2, 3, 4)]
    more = ["anomaly.policy=lower_rate", "anomaly.tries=1"]
    (outcome,) = train(tmp_path, tiny_data, poisons, *more)
    assert told(tmp_path)[-1][2] == "stop"
    assert outcome.batches == [1, 2, 3]


@pytest.mark.parametrize(
    "policy",
    ["roll_back", "skip", "reinject", "lower_rate"],
)
@pytest.mark.chaos
def test_a_run_that_dies_after_an_anomaly_goes_on_bitwise(tiny_data, tmp_path, policy):
    poisons = [Poison(18, "gradient"), Poison(20, "loss", 1.5)]
    more = [f"anomaly.policy={policy}", "anomaly.reinject_after_steps=4", *SPIKES]
    (whole,) = train(tmp_path / "whole", tiny_data, poisons, *more)
    assert not whole.error
    dies = [*poisons, Poison(22, "die")]
    (dead,) = train(tmp_path / "killed", tiny_data, dies, *more)
    assert "dies here" in dead.error
    (resumed,) = train(tmp_path / "killed", tiny_data, poisons, *more)
    assert not resumed.error
    assert records(tmp_path / "killed", "start")[1]["resumed_from_step"] >= 15
    assert exact(tmp_path / "killed") == exact(tmp_path / "whole")
    for key in ("step", "number", "reason", "action", "grad_norm", "limit"):
        ours, theirs = (
            [r[key] for r in records(tmp_path / f, "anomaly")] for f in ("killed", "whole")
        )
        assert ours == theirs, key
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
