"""As many copies of experts as memory allows: one more would not fit."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.cli import main
from moesys.config.compose import compose
from moesys.config.copies import with_copies
from moesys.config.errors import ConfigError
from moesys.config.memory import GIB, memory_problems, plan_memory
from moesys.config.schema import ParallelConfig, RunConfig
from moesys.parallel.bootstrap import Process
from moesys.parallel.dims import parallel_dims
from moesys.train.setup import build_run

WORDS = ["model=small", "placement=balanced", "parallel.ep=4", "placement.copies=null"]
RANKS = 8
CONFIG = compose([*WORDS, "train.micro_batch_tokens=512"])
DIMS = parallel_dims(CONFIG.parallel, RANKS)
EXPERTS = CONFIG.model.moe.num_experts
MOST = EXPERTS - EXPERTS // 4


def of(copies: int) -> RunConfig:
    return replace(CONFIG, placement=replace(CONFIG.placement, copies=copies))


def needed(copies: int) -> int:
    return max(stage.total for stage in plan_memory(of(copies), DIMS))


@given(st.integers(2, MOST))
def test_one_more_would_not_fit(copies: int) -> None:
    assert with_copies(CONFIG, DIMS, needed(copies) / GIB) == of(copies)
    assert with_copies(CONFIG, DIMS, (needed(copies) - 1) / GIB) == of(copies - 1)


def test_a_rank_needs_no_more_than_others_have() -> None:
    assert with_copies(CONFIG, DIMS, 1e6) == of(MOST)
    pyramid = replace(CONFIG.model.moe, experts_by_layer=(EXPERTS // 2, EXPERTS, EXPERTS // 2))
    config = replace(CONFIG, model=replace(CONFIG.model, moe=pyramid))
    assert with_copies(config, DIMS, 1e6).placement.copies == MOST


@pytest.mark.parametrize("spare", [0, 3])
def test_what_does_not_fit_with_the_least_is_left_to_the_rule_of_memory(spare: int) -> None:
    least = max(1, spare)
    config = replace(CONFIG, placement=replace(CONFIG.placement, spare=spare))
    memory_gib = (needed(least) - 1) / GIB
    found = with_copies(config, DIMS, memory_gib)
    assert found.placement.copies == least
    (problem,) = memory_problems(found, DIMS, memory_gib)
    assert problem.key == "memory"


def test_what_is_given_or_read_by_nothing_stays() -> None:
    fixed = replace(CONFIG, placement=replace(CONFIG.placement, policy="fixed"))
    for config in (of(3), fixed):
        assert with_copies(config, DIMS, None) is config
    alone = replace(CONFIG, parallel=ParallelConfig())
    assert with_copies(alone, parallel_dims(alone.parallel, RANKS), None) is alone


def test_memory_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"placement.copies=null .*cluster.gpu_memory_gib"):
        with_copies(CONFIG, DIMS, None)
    process = Process(
        rank=0, world_size=RANKS, local_rank=0, device=torch.device("cpu"), backend="gloo"
    )
    with pytest.raises(ConfigError, match=r"placement.copies=null .*use a number"):
        build_run(CONFIG, process)


def test_the_command_says_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["config", "memory", "--world-size", str(RANKS), *WORDS, "train.micro_batch_tokens=512"]
    assert main([*words, "--gpu-memory-gib", str(needed(3) / GIB)]) == 0
    assert "placement.copies=3, as many as fit" in capsys.readouterr().out
    assert main([*words, "--gpu-memory-gib", str(needed(3) / GIB), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["placement.copies"] == 3
    assert main([*words, "--gpu-memory-gib", str((needed(1) - 1) / GIB)]) == 1
    assert "which must be at most" in capsys.readouterr().err
    assert main(words) == 2
    assert "--gpu-memory-gib" in capsys.readouterr().err
