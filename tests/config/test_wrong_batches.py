"""Documents as sequences: what they do not go with is refused with its key, the rule and a fix, all else is not."""

from pathlib import Path

import pytest

from tests.config.prepared import prepared_data
from tests.config.wrong import Wrong, refused

PLANNED = ["batch=hdp", "train.global_batch_tokens=16384", "train.micro_batch_tokens=2048"]
WRONG = [
    Wrong(
        "parallel.cp=2 parallel.ep=1",
        "batch.policy",
        "lays a sequence over any number of data ranks, and parallel.cp=2 over a fixed one",
        "use parallel.cp=1, or batch.policy=samples",
    ),
    Wrong(
        "data.seq_len=32768",
        "train.global_batch_tokens",
        "must be at least data.seq_len=32768",
        "use 32768 or more, or a smaller data.seq_len",
    ),
    Wrong(
        "data.seq_len=8200",
        "data.seq_len",
        "lies on 5 ranks of train.micro_batch_tokens=2048, and there are dp=4 data ranks",
        "use 8188 or less",
        4,
    ),
]
RIGHT = [
    "balance=aux_sequence",
    "balance=aux_free router=topk_sigmoid",
    "placement=balanced",
    "placement=hecate parallel.pp=2",
    "model.moe.capacity_factor=1.5 model.moe.capacity_policy=pad",
    "model.memory_layers.layers=[2] model.num_layers=4",
    "codec=lsh_int8",
    "dispatch.exchange=deduplicated dispatch.ranks_per_node=2",
    "parallel.tp=2 parallel.etp=2 parallel.ep=2",
    "parallel.zero=3",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.overrides)
def test_it_is_refused_and_told_how_to_mend_it(wrong: Wrong, data: Path) -> None:
    found = refused([*PLANNED, *wrong.overrides.split()], wrong.world_size, data)
    (problem,) = [problem for problem in found if problem.key == wrong.key]
    assert wrong.rule in problem.rule
    assert wrong.fix in problem.fix


@pytest.mark.parametrize("overrides", RIGHT)
def test_all_else_goes_with_them(overrides: str, data: Path) -> None:
    layout = [] if "parallel.ep" in overrides else ["parallel.ep=2"]
    assert refused([*PLANNED, *layout, *overrides.split()], 4, data) == ()
