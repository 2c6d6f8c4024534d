"""Wrong layouts: each is refused with its key, the rule and a fix, and the fix helps. Slow ones are a warning."""

import re
from pathlib import Path

import pytest

from moesys.config.compose import compose
from moesys.config.errors import Problem
from moesys.config.nodes import spell_groups
from moesys.config.schema import ParallelConfig
from moesys.config.validate import check
from moesys.parallel.dims import parallel_dims
from tests.config.prepared import prepared_data
from tests.config.wrong import Wrong, refused

WRONG = [
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_virtual_stages=0",
        "parallel.pp_virtual_stages",
        "at least 1",
        "at least 1",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_schedule=zbv parallel.zero=1 model.num_layers=4 model.tie_embeddings=true train.global_batch_tokens=8192",
        "model.tie_embeddings",
        "makes one matrix of two stages that parallel.pp_schedule=zbv puts on one rank",
        "use model.tie_embeddings=false, or parallel.zero=0, or parallel.pp_schedule=1f1b",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_schedule=zbv parallel.zero=1 model.num_layers=4 model.share_depth=all train.global_batch_tokens=8192",
        "model.share_depth",
        "makes one set of parameters of several stages that parallel.pp_schedule=zbv puts on one rank",
        "use parallel.zero=0, or parallel.pp_schedule=1f1b, or model.share_depth=none",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_schedule=zbv model.num_layers=4 train.global_batch_tokens=8192 train.offload_ratio=0.5",
        "train.offload_ratio",
        "brings back what a backward reads until that is through, and parallel.pp_schedule=zbv does half of it much later",
        "use parallel.pp_schedule=1f1b, interleaved or gpipe, or train.offload_ratio=0",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 train.micro_batch_tokens=2048 train.global_batch_tokens=2048",
        "train.global_batch_tokens",
        "makes 1 micro-batches of a data rank, whose number must be at least the number of stages 2",
        "use 4096, or parallel.pp_schedule=gpipe",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_schedule=interleaved train.micro_batch_tokens=2048 "
        "train.global_batch_tokens=10240 model.num_layers=4",
        "train.global_batch_tokens",
        "must be a multiple of its 2 rounds (5 // parallel.pp=2)",
        "use 8192 or 12288, or parallel.pp_schedule=1f1b",
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=1 parallel.pp_schedule=dualpipev train.global_batch_tokens=16384",
        "parallel.pp",
        "makes 2 * 2 = 4 stages with parallel.pp_schedule=dualpipev, which must be at most model.num_layers=2",
        "parallel.pp_schedule=1f1b",
    ),
    Wrong("parallel.tp=0", "parallel.tp", "at least 1", "at least 1"),
    Wrong("parallel.dp_shard=0 parallel.zero=1", "parallel.dp_shard", "at least 1", "at least 1"),
    Wrong(
        "parallel.tp=4 model.num_kv_heads=4",
        "parallel.tp",
        "must divide the world size 2",
        "use parallel.tp=2",
    ),
    Wrong(
        "parallel.tp=2",
        "parallel.tp",
        "must divide the world size 3",
        "use parallel.tp=1, or start 2 or 4 ranks",
        3,
    ),
    Wrong(
        "parallel.pp=2 parallel.tp=2",
        "parallel.pp",
        "pp=2 * cp=1 * tp=2 = 4 must divide world_size=2",
        "use parallel.pp=1, or parallel.tp=1, or start 4 ranks",
    ),
    Wrong(
        "parallel.pp=4",
        "parallel.pp",
        "makes 4 * 1 = 4 stages with parallel.pp_schedule=1f1b, which must be at most model.num_layers=2",
        "use 2",
        4,
    ),
    Wrong(
        "parallel.ep=4 parallel.etp=4 train.global_batch_tokens=8192",
        "parallel.ep",
        "ep=4 * etp=4 = 16 must divide the 8 ranks of a pipeline stage",
        "use parallel.ep=2, or parallel.etp=2, or start 16 ranks",
        8,
    ),
    Wrong(
        "parallel.pp=2 parallel.ep=4 train.global_batch_tokens=8192",
        "parallel.ep",
        "ep=4 * etp=1 = 4 must divide the 2 ranks of a pipeline stage",
        "use parallel.ep=2, or start 8 ranks",
        4,
    ),
    Wrong(
        "parallel.ep=4 parallel.zero=1 parallel.dp_shard=6 train.global_batch_tokens=12288",
        "parallel.ep",
        "must divide dp_shard*cp*tp=6",
        "use parallel.ep=2, or parallel.dp_shard=4 or 12",
        12,
    ),
    Wrong(
        "parallel.zero=2 parallel.dp_shard=3",
        "parallel.dp_shard",
        "dp_shard=3 must divide dp=4",
        "use parallel.dp_shard=2 or 4, or start 3 or 6 ranks",
        4,
    ),
    Wrong(
        "parallel.dp_shard=2",
        "parallel.dp_shard",
        "must be null with parallel.zero=0",
        "use parallel.dp_shard=null, or parallel.zero=1, 2 or 3",
    ),
    Wrong(
        "parallel.tp=4 model.num_heads=6 model.num_kv_heads=6 model.head_dim=16",
        "model.num_kv_heads",
        "must be a multiple of parallel.tp=4",
        "use parallel.tp=2",
        4,
    ),
    Wrong(
        "parallel.tp=4",
        "model.num_kv_heads",
        "must be a multiple of parallel.tp=4",
        "use 4, or parallel.tp=2",
        4,
    ),
    Wrong(
        "parallel.tp=2 model.vocab_size=4097",
        "model.vocab_size",
        "must be a multiple of parallel.tp=2",
        "use 4098, or parallel.tp=1",
    ),
    Wrong(
        "parallel.tp=2 model.d_ffn=255",
        "model.d_ffn",
        "must be a multiple of parallel.tp=2",
        "use 254 or 256",
    ),
    Wrong(
        "parallel.etp=4 model.moe.d_expert=66",
        "model.moe.d_expert",
        "must be a multiple of parallel.etp=4",
        "use 64 or 68",
        4,
    ),
    Wrong(
        "parallel.etp=2 model.moe.d_expert=68 model.moe.expert_backend=grouped_mm train.dtype=bf16",
        "model.moe.d_expert",
        "must be a multiple of 8 * parallel.etp=2 = 16 (rows of 16 bytes in train.dtype=bf16)",
        "use 64 or 80, or model.moe.expert_backend=loop",
    ),
    Wrong(
        "parallel.ep=4 model.moe.num_experts=6 model.moe.top_k=5",
        "model.moe.num_experts",
        "must be a multiple of parallel.ep=4",
        "use 8, or parallel.ep=2",
        4,
    ),
    Wrong(
        "parallel.cp=2 data.seq_len=255 train.micro_batch_tokens=1020 train.global_batch_tokens=4080",
        "data.seq_len",
        "must be a multiple of 2 * parallel.cp=2 = 4 (a rank has an early and a late part",
        "use 252 or 256",
    ),
    Wrong(
        "parallel.cp=2 parallel.tp=2 data.seq_len=4 train.micro_batch_tokens=12 "
        "train.global_batch_tokens=24 parallel.ep=8",
        "parallel.ep",
        "must divide the world size 4",
        "use parallel.ep=4, or start 8 ranks",
        4,
    ),
    Wrong(
        "parallel.cp=4 parallel.tp=2 parallel.cp_attention=ulysses",
        "model.num_heads",
        "must be a multiple of parallel.tp=2 * parallel.cp=4 = 8",
        "use parallel.cp=2, or parallel.cp_attention=ring",
        8,
    ),
    Wrong(
        "parallel.cp=4 parallel.tp=2 parallel.cp_attention=ulysses model.attention_experts=3 "
        "model.attention_experts_kv=shared",
        "model.num_heads * model.attention_experts",
        "must be a multiple of parallel.tp=2 * parallel.cp=4 = 8",
        "use parallel.cp=2, or parallel.cp_attention=ring",
        8,
    ),
    Wrong(
        "parallel.cp=2 parallel.cp_attention=ulysses model.num_kv_heads=1 model.attention_experts=3 "
        "model.num_heads=2 model.head_dim=16",
        "parallel.cp",
        "must divide model.num_kv_heads=3 of all attention experts / parallel.tp=1 = 3, or be a multiple of it",
        "use parallel.cp_attention=ring",
    ),
    Wrong(
        "parallel.cp=2 parallel.cp_attention=ulysses model.num_kv_heads=3 model.num_heads=6 "
        "model.head_dim=16",
        "parallel.cp",
        "must divide model.num_kv_heads=3 / parallel.tp=1 = 3, or be a multiple of it",
        "use parallel.cp_attention=ring",
    ),
    Wrong(
        "parallel.cp=2 parallel.tp=2 parallel.ep=4 data.seq_len=4 train.micro_batch_tokens=20 "
        "train.global_batch_tokens=24",
        "train.global_batch_tokens",
        "train.micro_batch_tokens=20 * dp=1 = 20",
        "use 20 or 40",
        4,
    ),
    Wrong(
        "parallel.tp=2 data.seq_len=15 train.micro_batch_tokens=45 train.global_batch_tokens=180",
        "train.micro_batch_tokens",
        "must be a multiple of parallel.tp=2 (the ranks share out its tokens)",
        "use 30 or 60",
    ),
    Wrong(
        "parallel.tp=2 train.global_batch_tokens=1536",
        "train.global_batch_tokens",
        "train.micro_batch_tokens=1024 * dp=1 = 1024",
        "use 1024 or 2048",
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_data(tmp_path_factory.mktemp("wrong") / "data")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.overrides)
def test_wrong_layout_is_refused_with_key_rule_and_fix(wrong: Wrong, data: Path) -> None:
    problems = refused(wrong.overrides.split(" "), wrong.world_size, data)
    assert len(problems) == 1, [str(problem) for problem in problems]
    (problem,) = problems
    assert problem.key == wrong.key
    assert wrong.rule in problem.rule
    assert wrong.fix in problem.fix


LAYOUTS = [
    wrong for wrong in WRONG if "parallel." in wrong.overrides and "at least" not in wrong.fix
]


def fixes(wrong: Wrong, problem: Problem) -> list[tuple[list[str], int]]:
    """What a fix says can be changed: further overrides, and a world size."""
    found: list[tuple[list[str], int]] = []
    for said in problem.fix.removeprefix("use ").split(", or "):
        if start := re.fullmatch(r"start (\d+(?: or \d+)?) ranks \(--nproc\)", said):
            found += [([], int(ranks)) for ranks in start[1].split(" or ")]
            continue
        key, equals, values = said.rpartition("=")
        for value in re.split(r", | or ", values):
            found.append(([f"{key if equals else problem.key}={value}"], wrong.world_size))
    return found


@pytest.mark.parametrize("wrong", LAYOUTS, ids=lambda wrong: wrong.overrides)
def test_everything_that_a_fix_of_a_layout_says_helps(wrong: Wrong, data: Path) -> None:
    """The rule holds then. A batch is for a number of ranks and a length, so it may be what is wrong next."""
    given = wrong.overrides.split(" ")
    (problem,) = refused(given, wrong.world_size, data)
    said = fixes(wrong, problem)
    assert said
    for overrides, world_size in said:
        left = refused([*given, *overrides], world_size, data)
        batches = {"train.global_batch_tokens"}
        if problem.key == "data.seq_len":
            batches.add("train.micro_batch_tokens")
        assert {one.key for one in left} <= batches, (overrides, world_size)


def test_broken_layouts_are_listed_together(data: Path) -> None:
    overrides = ["parallel.tp=4", "parallel.ep=4", "parallel.dp_shard=2", "model.vocab_size=4097"]
    problems = refused(overrides, 6, data)
    assert [problem.key for problem in problems] == [
        "parallel.dp_shard",
        "parallel.tp",
        "parallel.ep",
        "model.num_kv_heads",
        "model.vocab_size",
    ]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_tied_embeddings_go_with_every_layout(zero: int, data: Path) -> None:
    for layout in (["parallel.tp=2", "parallel.ep=4"], ["parallel.pp=2", "parallel.ep=2"]):
        tied = ["model.tie_embeddings=true", f"parallel.zero={zero}"]
        assert refused([*tied, *layout], 4, data) == ()


def test_groups_that_talk_much_and_cross_nodes_are_a_warning(data: Path) -> None:
    overrides = ["parallel.tp=4", "model.num_kv_heads=4", "parallel.etp=2", "parallel.ep=2"]
    config = compose([*overrides, f"data.path={data}"])
    assert check(config, 8) == check(config, 8, 4) == check(config, 8, 8) == []
    (warning,) = check(config, 8, 2)
    assert warning == (
        "parallel.tp=4: 2 of 2 tp groups (ranks 0-3, 4-7) lie on several nodes of 2, "
        "and they add up activations in every layer: use parallel.tp=2"
    )
    assert check(compose([*overrides, "parallel.tp=2", f"data.path={data}"]), 8, 2) == []
    tp, etp = check(config, 8, 3)
    assert "use parallel.tp=1" in tp
    assert "1 of 4 etp groups (ranks 2-3)" in etp
    assert "in every MoE layer: use parallel.etp=1" in etp


def test_ranks_are_spelt_as_runs() -> None:
    groups = parallel_dims(ParallelConfig(tp=2, ep=4), 16)
    assert spell_groups(groups.groups("tp")) == "0-1, 2-3, ..., 14-15"
    assert spell_groups(groups.groups("ep")) == "0-3, 4-7, 8-11, 12-15"
    assert spell_groups(groups.groups("dp_replicate")) == "0-14 by 2, 1-15 by 2"
    assert spell_groups([[0, 4], [3]]) == "0+4, 3"
