"""The endless order: the same on any number of ranks, exact after a resume, nothing lost or doubled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.data.indexed import IndexedTokens
from moesys.data.loader import IGNORED_TARGET, EvalBatches, TokenLoader
from moesys.data.source import Source
from tests.data.files import stream, write_tokens

SEQ = 4


def loader(tokens: IndexedTokens, **changed: Any) -> TokenLoader:
    arguments: dict[str, Any] = {
        "seq_len": SEQ,
        "global_batch_samples": 8,
        "micro_batch_samples": 2,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 5,
        "shuffle": True,
    }
    return TokenLoader([Source(tokens=tokens)], **{**arguments, **changed})


def ranks(tokens: IndexedTokens, dp_size: int, **changed: Any) -> list[TokenLoader]:
    return [loader(tokens, dp_rank=r, dp_size=dp_size, **changed) for r in range(dp_size)]


def step(loaders: list[TokenLoader]) -> list[int]:
    """Sample numbers of one step in its global order: micro-step major, then rank, then row."""
    per_rank = [one.next_step() for one in loaders]
    assert len({len(batches) for batches in per_rank}) == 1
    found = []
    for m in range(len(per_rank[0])):
        for batches in per_rank:
            inputs, targets = batches[m].input_ids_BS, batches[m].target_ids_BS
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous()
            assert targets.is_contiguous()
            # Tokens count up from 0, so the first token of a sample tells which one it is.
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(inputs.shape[1]))
            assert torch.equal(targets, inputs + 1)
            found += (inputs[:, 0] // SEQ).tolist()
    return found


def test_each_sample_once_per_epoch_and_epochs_run_on(tmp_path: Path) -> None:
    tokens = stream(
        tmp_path, 30 * SEQ + 3
    )  # 30 samples; a step of 8 straddles every epoch but the 4th
    one = loader(tokens)
    order = [sample for _ in range(15) for sample in step([one])]
    epochs = [order[k : k + 30] for k in range(0, 120, 30)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert one.consumed_of_sources() == {"": 4 * 30}


def test_without_shuffle_the_stream_is_read_in_order(tmp_path: Path) -> None:
    one = loader(stream(tmp_path, 10 * SEQ + 1), shuffle=False)
    assert step([one]) + step([one]) == [*range(10), *range(6)]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    tokens = stream(tmp_path, 300 * SEQ + 1)
    assert step([loader(tokens)]) == step([loader(tokens)])
    assert step([loader(tokens)]) != step([loader(tokens, seed=6)])


@settings(max_examples=40)
@given(st.data())
def test_steps_do_not_depend_on_ranks_or_micro_batches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    micro_steps, dp_size, micro = (data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3))
    size = micro_steps * dp_size * micro
    num_samples = data.draw(st.integers(size, 3 * size + 5))
    tokens = stream(
        tmp_path_factory.mktemp("s"), num_samples * SEQ + 1 + data.draw(st.integers(0, SEQ - 1))
    )
    alone = loader(tokens, global_batch_samples=size, micro_batch_samples=1)
    many = ranks(tokens, dp_size, global_batch_samples=size, micro_batch_samples=micro)
    for _ in range(4):
        assert step(many) == step([alone])


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2)])
def test_resume_is_exact_in_the_middle_of_an_epoch(tmp_path: Path, before: int, after: int) -> None:
    tokens = stream(tmp_path, 30 * SEQ + 1)
    reference = loader(tokens)
    first = ranks(tokens, before)
    for _ in range(5):  # into the second epoch
        assert step(first) == step([reference])
    states = [json.loads(json.dumps(one.state_dict())) for one in first]
    assert all(state == states[0] for state in states)
    second = ranks(tokens, after, micro_batch_samples=1)
    for one in second:
        one.load_state_dict(states[0])
    for _ in range(6):
        assert step(second) == step([reference])


def test_the_global_batch_may_grow_at_a_resume(tmp_path: Path) -> None:
    tokens = stream(tmp_path, 100 * SEQ + 1)
    reference, small = loader(tokens), loader(tokens, global_batch_samples=4)
    wanted = step([reference]) + step([reference])
    got = step([small])
    large = loader(tokens, global_batch_samples=12)
    large.load_state_dict(small.state_dict())
    assert got + step([large]) == wanted


def test_another_dataset_or_order_is_refused_with_all_differences(tmp_path: Path) -> None:
    state = loader(stream(tmp_path, 400)).state_dict()
    other = loader(stream(tmp_path, 404, "other"), seed=6, seq_len=5, shuffle=False)
    with pytest.raises(ValueError, match="5 problems") as caught:
        other.load_state_dict(state)
    text = str(caught.value)
    assert "num_tokens is 404 here but 400 in the checkpoint: point data.path" in text
    assert "seq_len is 5 here but 4 in the checkpoint: set data.seq_len back" in text
    assert "seed is 6 here but 5" in text
    assert "shuffle is False here but True" in text
    assert "dataset is " in text


def test_same_lengths_but_other_tokens_are_another_dataset(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [list(range(100))])
    write_tokens(tmp_path / "b", [[*range(99), 7]])
    state = loader(IndexedTokens(tmp_path / "a")).state_dict()
    with pytest.raises(ValueError, match="dataset is"):
        loader(IndexedTokens(tmp_path / "b")).load_state_dict(state)


@pytest.mark.parametrize("consumed", [-1, 1.5, None, True, "8"])
def test_a_senseless_state_is_refused(tmp_path: Path, consumed: Any) -> None:
    one = loader(stream(tmp_path, 400))
    state = {**one.state_dict(), "consumed_samples": consumed}
    with pytest.raises(ValueError, match="consumed_samples must be an integer >= 0"):
        one.load_state_dict(state)
    with pytest.raises(ValueError, match="has no 'seed'"):
        one.load_state_dict({"consumed_samples": 8})


def test_too_little_text_and_bad_sizes_are_told_together(tmp_path: Path) -> None:
    tokens = stream(tmp_path, 7 * SEQ + 1)
    with pytest.raises(
        ValueError, match=r"29 tokens make 7 samples of 4 \+ 1, fewer than one step of 8"
    ):
        loader(tokens)
    with pytest.raises(ValueError, match="make 0 samples of 1000") as caught:
        loader(tokens, seq_len=1000, global_batch_samples=9, dp_size=2)
    assert "multiple of micro_batch_samples * dp_size = 2 * 2 = 4: use 8" in str(caught.value)
    with pytest.raises(ValueError, match=r"dp_rank=2 must lie in \[0, dp_size=2\)"):
        loader(tokens, dp_rank=2, dp_size=2, global_batch_samples=4)
    with pytest.raises(ValueError, match="seq_len=0 must be >= 1"):
        loader(tokens, seq_len=0)


def test_one_sample_is_enough_for_a_step_of_one(tmp_path: Path) -> None:
    one = loader(stream(tmp_path, SEQ + 1), global_batch_samples=1, micro_batch_samples=1)
    assert [step([one]) for _ in range(3)] == [[0], [0], [0]]


def test_positions_stay_exact_beyond_32_bits(tmp_path: Path) -> None:
    one = loader(stream(tmp_path, 30 * SEQ + 1), shuffle=False)
    one.load_state_dict({**one.state_dict(), "consumed_samples": 30 * 2**40 + 29})
    assert step([one])[:3] == [29, 0, 1]
    assert one.consumed_of_sources()[""] == 30 * 2**40 + 29 + 8


def evaluated(tokens: IndexedTokens, dp_size: int, micro: int, eval_tokens: int) -> list[int]:
    """All targets that count, over all ranks."""
    every = [
        EvalBatches(
            tokens,
            seq_len=SEQ,
            micro_batch_samples=micro,
            dp_rank=rank,
            dp_size=dp_size,
            eval_tokens=eval_tokens,
        )
        for rank in range(dp_size)
    ]
    assert len({len(one) for one in every}) == 1
    targets = []
    for one in every:
        batches = list(one)
        assert len(batches) == len(one)
        for batch in batches:
            assert batch.input_ids_BS.shape == batch.target_ids_BS.shape == (micro, SEQ)
            valid = batch.target_ids_BS != IGNORED_TARGET
            assert torch.equal(batch.target_ids_BS[valid], batch.input_ids_BS[valid] + 1)
            targets += batch.target_ids_BS[valid].tolist()
    assert len(targets) == every[0].num_targets
    return targets


@settings(max_examples=60)
@given(
    num_tokens=st.integers(2, 90),
    dp_size=st.integers(1, 4),
    micro=st.integers(1, 3),
    eval_tokens=st.integers(0, 100),
)
def test_evaluation_covers_each_target_once_on_any_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    dp_size: int,
    micro: int,
    eval_tokens: int,
) -> None:
    tokens = stream(tmp_path_factory.mktemp("s"), num_tokens)
    targets = evaluated(tokens, dp_size, micro, eval_tokens)
    assert len(targets) == min(eval_tokens or num_tokens - 1, num_tokens - 1)
    assert len(set(targets)) == len(targets)
    assert sorted(targets) == sorted(evaluated(tokens, 1, 1, eval_tokens))


def test_a_short_evaluation_is_spread_over_the_stream(tmp_path: Path) -> None:
    tokens = stream(tmp_path, 100 * SEQ + 1)
    starts = [t - 1 for t in evaluated(tokens, 2, 2, 4 * SEQ) if t % SEQ == 1]
    assert sorted(starts) == [0, 25 * SEQ, 50 * SEQ, 75 * SEQ]


def test_a_stream_without_a_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 2 tokens or more") as caught:
        EvalBatches(
            stream(tmp_path, 1),
            seq_len=SEQ,
            micro_batch_samples=1,
            dp_rank=0,
            dp_size=1,
            eval_tokens=-1,
        )
    assert "eval_tokens=-1 must be >= 0" in str(caught.value)
