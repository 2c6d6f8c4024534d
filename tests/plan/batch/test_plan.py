"""A batch plan as a value: written and read, and what is wrong with one is told."""

import json

import numpy as np
import pytest

from moesys.plan.batch.local import LocalPieces
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan, problems

LENGTHS_S = np.array([10, 0, 3, 7])
STEPS = ((Piece(0, (2, 0)), Piece(2, (1,))), (Piece(3, (0,)),))


def plan_of(*steps: tuple[Piece, ...]) -> BatchPlan:
    return batch_plan(LENGTHS_S, 3, steps)


def test_a_plan_is_written_and_read() -> None:
    plan = plan_of(*STEPS)
    found = BatchPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert found.micro_steps == plan.micro_steps
    assert found.num_ranks == 3
    assert found.lengths_S.tolist() == LENGTHS_S.tolist()
    with pytest.raises(ValueError, match="version 9, where 1 is read"):
        BatchPlan.from_json(plan.to_json() | {"version": 9})


def test_tokens_and_pieces_of_ranks() -> None:
    plan = plan_of(*STEPS)
    assert problems(plan, 7) == []
    # The first of the ring has slices 0 and 3 of 2, 3, 2, 3 tokens.
    assert plan.tokens_MR().tolist() == [[5, 3, 5], [7, 0, 0]]
    assert plan.of_rank(0) == [[STEPS[0][0]], [STEPS[1][0]]]
    assert plan.of_rank(1) == [[STEPS[0][1]], []]


def test_all_ranks_know_how_many_rows_the_fullest_has() -> None:
    """Filled up; also those that have nothing."""
    for step, most in zip(STEPS, (6, 8), strict=True):
        local = [LocalPieces.of_plan(step, LENGTHS_S, rank, multiple_of=2) for rank in range(3)]
        assert [pieces.most_rows for pieces in local] == [most] * 3
        assert max(pieces.num_rows for pieces in local) == most


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((STEPS[0],), "sequence 3 of 7 tokens is in 0 pieces"),
        ((*STEPS, STEPS[1]), "sequence 3 of 7 tokens is in 2 pieces"),
        ((*STEPS, (Piece(1, (0,)),)), "sequence 1 of 0 tokens is in 1 pieces"),
        ((*STEPS, (Piece(4, (0,)),)), "micro-step 2 has sequence 4 of 4"),
        (((Piece(0, (3,)),),), "sequence 0 is on ranks [3], which are to be some of 0 to 2"),
        (((Piece(0, ()),),), "sequence 0 is on ranks []"),
        (((Piece(0, (1, 1)),),), "sequence 0 is twice on a rank: [1, 1]"),
        (((Piece(0, (0,)), *STEPS[0][1:]), STEPS[1]), "rank 0 has 10 tokens in micro-step 0, and memory for 7"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(steps: tuple[tuple[Piece, ...], ...], said: str) -> None:
    (found,) = problems(plan_of(*steps), 7)
    assert found.startswith(said)
