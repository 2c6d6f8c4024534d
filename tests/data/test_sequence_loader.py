"""Steps of sequences: each once per epoch, the same on any ranks, exact after a resume, planned ahead or not.

Shapes: S sequences.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesys.data.eval_sequences import EvalSequences
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import TokenLoader
from moesys.data.plan_ahead import PlanAhead, PlannedStep, PlanRequest
from moesys.data.sequence_loader import SequenceLoader
from moesys.data.source import Source
from moesys.data.step_batch import RankBatch
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.plan import BatchPlan, Piece
from tests.data.test_sequences import documents

LONGEST, CAPACITY, BATCH = 64, 24, 160
COSTS = BatchCosts(attention=(AttentionKind(pair_s=1e-6, window=16),), token_s=1e-5, piece_s=1e-6)


def request(num_ranks: int, policy: str = "hdp", meets: bool = True) -> PlanRequest:
    return PlanRequest(
        policy=policy, num_ranks=num_ranks, capacity_tokens=CAPACITY, costs=COSTS, meets=meets
    )


def of_lengths(folder: Path, seed: int = 0, number: int = 30) -> IndexedTokens:
    folder.mkdir(exist_ok=True)
    lengths = np.random.default_rng(seed).lognormal(2.5, 1, number).astype(int) + 1
    return documents(folder, lengths.tolist())


Make = Callable[..., SequenceLoader]


@pytest.fixture
def make() -> Iterator[Make]:
    """A loader of one source, or of those given; its process is ended."""
    made = []

    def loader(
        *tokens: IndexedTokens, dp_rank: int = 0, dp_size: int = 4, **changed: Any
    ) -> SequenceLoader:
        names = [""] if len(tokens) == 1 else ["one", "two"]
        arguments: dict[str, Any] = {
            "longest_tokens": LONGEST,
            "global_batch_tokens": BATCH,
            "request": request(dp_size),
            "dp_rank": dp_rank,
            "seed": 5,
            "shuffle": True,
            "skips_empty": False,
        }
        sources = [Source(tokens=t, name=n) for t, n in zip(tokens, names, strict=True)]
        made.append(SequenceLoader(sources, **arguments | changed))
        return made[-1]

    yield loader
    for one in made:
        one.close()


def read(loaders: list[SequenceLoader]) -> list[int]:
    """Targets of one step of all ranks, in order; tokens count up, so a target tells where it is in the stream."""
    steps = [one.next_step() for one in loaders]
    assert len({len(step.micro_batches) for step in steps}) == 1
    assert len({step.num_tokens for step in steps}) == 1
    batches = [batch for step in steps for batch in step.micro_batches]
    for batch in batches:
        assert torch.equal(batch.targets_BSN[..., 0], batch.input_ids_BS + 1)
        assert batch.pieces is not None
        assert batch.pieces.num_tokens <= CAPACITY
    places = torch.cat([batch.places_BS[0] for batch in batches])
    assert sorted(places.tolist()) == list(range(steps[0].num_tokens))
    targets = torch.cat([batch.targets_BSN[0, :, 0] for batch in batches])
    # In the order of the step's sequences, on whichever ranks they were.
    return targets[places.argsort()].tolist()


def test_each_sequence_once_per_epoch(tmp_path: Path, make: Make) -> None:
    tokens = of_lengths(tmp_path)
    loaders = [make(tokens, dp_rank=rank) for rank in range(4)]
    num_targets = loaders[0].sequences[0].num_inputs
    epochs: list[int] = []
    while len(epochs) < 3 * num_targets:
        epochs += read(loaders)
    assert all(len(set(epochs[k * num_targets :][:num_targets])) == num_targets for k in range(3))
    assert epochs[:num_targets] != epochs[num_targets : 2 * num_targets]
    assert loaders[0].consumed_tokens == len(epochs)


@pytest.mark.parametrize("policy", ["naive", "static", "karmarkar_karp", "hdp"])
@pytest.mark.parametrize("num_ranks", [3, 4, 8])
def test_the_order_is_the_same_on_any_ranks_and_by_any_policy(
    tmp_path: Path, make: Make, policy: str, num_ranks: int
) -> None:
    tokens = of_lengths(tmp_path)
    four = [make(tokens, dp_rank=rank) for rank in range(4)]
    others = [
        make(tokens, dp_rank=r, dp_size=num_ranks, request=request(num_ranks, policy))
        for r in range(num_ranks)
    ]
    assert [read(four) for _ in range(6)] == [read(others) for _ in range(6)]


def test_a_step_has_as_many_as_fit(tmp_path: Path, make: Make) -> None:
    loader = make(
        documents(tmp_path, [61, 61, 31, 11, 51, 6, 61]), shuffle=False, global_batch_tokens=100
    )
    lengths = [loader.next_step().lengths_L.tolist() for _ in range(4)]
    assert lengths == [[60], [60, 30, 10], [50, 5], [60]]


def test_a_resume_goes_on_with_other_ranks(tmp_path: Path, make: Make) -> None:
    tokens = of_lengths(tmp_path)
    four = [make(tokens, dp_rank=rank) for rank in range(4)]
    for _ in range(5):
        read(four)
    state = json.loads(json.dumps(four[2].state_dict()))
    eight = [make(tokens, dp_rank=rank, dp_size=8) for rank in range(8)]
    for one in eight:
        one.load_state_dict(state)
    assert eight[0].consumed_tokens == four[0].consumed_tokens
    assert [read(eight) for _ in range(5)] == [read(four) for _ in range(5)]


def test_a_state_of_another_order_is_refused(tmp_path: Path, make: Make) -> None:
    tokens = of_lengths(tmp_path)
    state = make(tokens).state_dict()
    with pytest.raises(
        ValueError, match=r"long_documents is 'skip' here but 'cut' in the checkpoint"
    ):
        make(tokens, long_documents="skip").load_state_dict(state)
    samples = TokenLoader(
        [Source(tokens=tokens)],
        seq_len=LONGEST,
        global_batch_samples=2,
        micro_batch_samples=1,
        dp_rank=0,
        dp_size=1,
        seed=5,
        shuffle=True,
    )
    with pytest.raises(ValueError, match=r"has sequences='documents': set batch.policy back"):
        samples.load_state_dict(state)
    with pytest.raises(ValueError, match=r"no 'sequences': set batch.policy back"):
        make(tokens).load_state_dict(samples.state_dict())


@contextmanager
def counted_asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many plans were made by another process, and how many here."""
    counts = [0, 0]
    ask, plan = PlanAhead._ask, PlanRequest.plan

    def asking(self: PlanAhead, lengths_S: np.ndarray) -> PlannedStep:
        counts[0] += 1
        return ask(self, lengths_S)

    def planning(self: PlanRequest, lengths_S: np.ndarray) -> PlannedStep:
        counts[1] += 1
        return plan(self, lengths_S)

    monkeypatch.setattr(PlanAhead, "_ask", asking)
    monkeypatch.setattr(PlanRequest, "plan", planning)
    yield counts


def test_plans_made_ahead_are_those_made_in_time(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = of_lengths(tmp_path)
    ahead, alone = make(tokens, plan_ahead_steps=2), make(tokens)
    with counted_asking(monkeypatch) as counts:
        for _ in range(5):
            steps = [one.next_step() for one in (ahead, alone)]
            assert ahead.plan_fields() == alone.plan_fields()
            assert_equal(*(step.micro_batches for step in steps))
        assert ahead._ahead is not None
        for _, planned in ahead._ahead._plans.values():
            planned.result()
    assert counts == [5 + 2, 5], "each step once, two ahead of the last"
    process = ahead._ahead._process
    assert process is not None
    ahead.close()
    assert process.returncode == 0


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, RankBatch)
        assert torch.equal(a.input_ids_BS, b.input_ids_BS)
        assert a.pieces is not None
        assert a.pieces.pieces == b.pieces.pieces


def test_a_mix_that_turns_is_planned_again(tmp_path: Path, make: Make) -> None:
    streams = [of_lengths(tmp_path / str(seed), seed) for seed in (1, 2)]
    ahead, alone = (make(*streams, plan_ahead_steps=n) for n in (2, 0))
    for step in range(6):
        if step == 3:
            for one in (ahead, alone):
                one.turn_mix([0.9, 0.1])
        ours, theirs = (one.next_step() for one in (ahead, alone))
        assert ours.lengths_L.tolist() == theirs.lengths_L.tolist()
        assert_equal(ours.micro_batches, theirs.micro_batches)
    assert ahead.tokens_of_sources() == alone.tokens_of_sources()
    assert ahead.consumed_of_sources()["one"] > ahead.consumed_of_sources()["two"]


def test_a_process_that_ended_is_told_of(tmp_path: Path, make: Make) -> None:
    loader = make(of_lengths(tmp_path), plan_ahead_steps=1)
    loader.next_step()
    assert loader._ahead is not None
    assert loader._ahead._process is not None
    loader._ahead._process.kill()
    with pytest.raises(RuntimeError, match=r"makes batch plans has ended \(exit code -9\)"):
        # Of which the first may have been planned before.
        print([loader.next_step().num_tokens for _ in range(3)])


def test_an_earlier_step_is_read_again(tmp_path: Path, make: Make) -> None:
    loader = make(of_lengths(tmp_path))
    loader.next_step()
    first = loader.consumed_samples
    second = loader.next_step()
    loader.next_step()
    consumed = loader.consumed_samples
    assert_equal(loader.step_at(first).micro_batches, second.micro_batches)
    assert loader.consumed_samples == consumed


def test_micro_steps_without_tokens_are_left_out_where_that_is_asked(
    tmp_path: Path, make: Make
) -> None:
    tokens = of_lengths(tmp_path)
    free = request(4, "naive", meets=False)
    all_of_them, some = (
        [make(tokens, dp_rank=rank, request=free, skips_empty=skips) for rank in range(4)]
        for skips in (False, True)
    )
    empty = 0
    for _ in range(6):
        for kept, left in zip(all_of_them, some, strict=True):
            ours, theirs = (one.next_step().micro_batches for one in (left, kept))
            with_tokens = [batch for batch in theirs if batch.input_ids_BS.numel()]
            empty += len(theirs) - len(with_tokens)
            assert_equal(ours, with_tokens or theirs[:1])
    assert empty > 0


def test_a_micro_step_in_which_a_rank_only_passes_keys_on_is_not_left_out(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(documents(tmp_path, [2, 2]), dp_rank=1, global_batch_tokens=2, skips_empty=True)
    right = loader._request.plan

    def one_token_on_four(_: PlanRequest, lengths_S: np.ndarray) -> PlannedStep:
        steps = tuple((Piece(sequence, (0, 1, 2, 3)),) for sequence in (0, 1))
        plan = BatchPlan(lengths_S=lengths_S, num_ranks=4, micro_steps=steps)
        return PlannedStep(plan, right(lengths_S).figures)

    monkeypatch.setattr(PlanRequest, "plan", one_token_on_four)
    assert [batch.input_ids_BS.numel() for batch in loader.next_step().micro_batches] == [0, 0]


def test_a_plan_that_cannot_be_executed_is_refused(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(of_lengths(tmp_path))

    right = loader._request.plan

    def wrong(_: PlanRequest, lengths_S: np.ndarray) -> PlannedStep:
        all_at_once = tuple(Piece(s, (0,)) for s in range(len(lengths_S)))
        plan = BatchPlan(lengths_S=lengths_S, num_ranks=4, micro_steps=(all_at_once,))
        return PlannedStep(plan, right(lengths_S).figures)

    monkeypatch.setattr(PlanRequest, "plan", wrong)
    with pytest.raises(ValueError, match=r"batch.policy=hdp.*memory for 24"):
        loader.next_step()


def test_targets_further_ahead_end_with_the_sequence(tmp_path: Path, make: Make) -> None:
    loaders = [
        make(documents(tmp_path, [50, 3, 2]), dp_rank=rank, shuffle=False, mtp_depth=2)
        for rank in range(4)
    ]
    batches = [batch for one in loaders for batch in one.next_step().micro_batches]
    found = {
        ids: targets
        for batch in batches
        for ids, targets in zip(
            batch.input_ids_BS[0].tolist(), batch.targets_BSN[0].tolist(), strict=True
        )
    }
    none = IGNORED_TARGET
    assert found[0] == [1, 2, 3]
    assert [found[47], found[48]] == [[48, 49, none], [49, none, none]]
    assert [found[50], found[51], found[53]] == [[51, 52, none], [52, none, none], [54, none, none]]


@pytest.mark.parametrize("eval_tokens", [0, 100, 1])
def test_held_out_targets_are_counted_once(tmp_path: Path, eval_tokens: int) -> None:
    tokens = of_lengths(tmp_path)
    ranks = [
        EvalSequences(
            tokens,
            longest_tokens=LONGEST,
            batch_tokens=BATCH,
            request=request(4),
            dp_rank=rank,
            eval_tokens=eval_tokens,
        )
        for rank in range(4)
    ]
    batches = [[*one] for one in ranks]
    assert [len(of_rank) for of_rank in batches] == [len(one) for one in ranks]
    assert len({len(one) for one in ranks}) == 1
    targets = [t for of in batches for batch in of for t in batch.targets_BSN.flatten().tolist()]
    assert len(targets) == len(set(targets)) == ranks[0].num_targets
    firsts = set(tokens.document_offsets.tolist())
    if not eval_tokens:
        assert set(targets) == set(range(len(tokens))) - firsts
    elif eval_tokens > 1:
        assert 0.5 * eval_tokens < len(targets) <= eval_tokens
        assert max(targets) > 0.5 * len(tokens), "spread over the stream"
