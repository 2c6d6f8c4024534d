"""Wrong configurations, as a user types them: each is refused with its key, the rule and a fix."""

import pickle
import re
import sys
import time
from pathlib import Path

import pytest

from moesys.config.compose import compose
from moesys.config.errors import ConfigError
from moesys.config.validate import check
from tests.config.prepared import prepared_data
from tests.config.wrong import Wrong, refused

UNKNOWN = "is not a configuration key"
WRONG = [
    # Misspelt keys, at every depth and in the wrong section.
    Wrong("traim.steps=3", "traim.steps", UNKNOWN, "did you mean train.steps?"),
    Wrong("train.stepz=3", "train.stepz", UNKNOWN, "did you mean train.steps"),
    Wrong("train.lr=1e-3", "train.lr", UNKNOWN, "did you mean optim.lr?"),
    Wrong("optim.steps=3", "optim.steps", UNKNOWN, "did you mean train.steps or optim.eps?"),
    Wrong("lr=1e-3", "lr", UNKNOWN, "optim.lr"),
    Wrong("model.num_experts=8", "model.num_experts", UNKNOWN, "model.moe.num_experts"),
    Wrong("model.moe.nexperts=8", "model.moe.nexperts", UNKNOWN, "model.moe.num_experts"),
    Wrong(
        "model.moe.balance.globl_loss_coef=0.1",
        "model.moe.balance.globl_loss_coef",
        UNKNOWN,
        "model.moe.balance.global_loss_coef",
    ),
    Wrong("moe.top_k=2", "moe.top_k", UNKNOWN, "model.moe.top_k"),
    Wrong("+train.warmup=3", "train.warmup", UNKNOWN, "schedule.warmup_steps"),
    Wrong("data.zzz=3", "data.zzz", UNKNOWN, "data has path, sources, mixing, seq_len"),
    Wrong("++optim.betas=[0.9,0.95]", "optim.betas", UNKNOWN, "optim.beta1"),
    Wrong("optim.lr.peak=1", "optim.lr.peak", UNKNOWN, "optim.lr is a single value"),
    Wrong("zzz=1", "zzz", UNKNOWN, "the sections are run, model"),
    Wrong("scheduel=wsd", "scheduel", UNKNOWN, "did you mean schedule=..., one of constant"),
    # Group options.
    Wrong(
        "experiment=quikstart",
        "experiment",
        "must be one of compare, quickstart",
        "did you mean quickst",
    ),
    Wrong("model=smaall", "model", "must be one of mixtral_8x7b", "did you mean small"),
    Wrong("router=topk", "router", "must be one of", "topk_softmax"),
    Wrong("optim=null", "optim", "must be one of adamw", "choose from adamw"),
    # Not a value, or not one value.
    Wrong("train.steps", "train.steps", "is not a key=value override", "write section.key=value"),
    Wrong("optim.lr=1e-3,1e-4", "optim.lr", "must be one value", "one run for each value"),
    Wrong("hydra.run.dir=x", "hydra.run.dir", "has no effect", "set run.dir"),
    Wrong("~data.path", "data.path", "is required", "set it to a folder"),
    Wrong("run.name=???", "run.name", "is required", "set it: run.name="),
    # Interpolations that could differ between ranks, or that lead nowhere.
    Wrong("run.name=${now:%H-%M}", "run.name", "must be the same on every rank", "${run.name}"),
    Wrong("run.dir=${hydra:runtime.cwd}", "run.dir", "must be the same on every rank", "value"),
    Wrong("run.name=${run.namee}", "run.name", "could not be resolved", "refer to an existing key"),
    # Types.
    Wrong("train.steps=many", "train.steps", "must be an integer", "give an integer"),
    Wrong("train.steps=1e3", "train.steps", "must be an integer", "write 1000"),
    Wrong("train.steps=true", "train.steps", "must be an integer", "give an integer"),
    Wrong("train.steps=null", "train.steps", "must be an integer", "give an integer"),
    Wrong("optim.lr='1e-3'", "optim.lr", "must be a finite number", "write 0.001 without quotes"),
    Wrong("optim.lr=nan", "optim.lr", "must be a finite number", "give a finite number"),
    Wrong("optim.lr=inf", "optim.lr", "must be a finite number", "give a finite number"),
    Wrong("optim.lr=true", "optim.lr", "must be a finite number", "give a finite number"),
    Wrong("optim.lr=[1]", "optim.lr", "must be a finite number", "give a finite number"),
    Wrong("data.shuffle=1", "data.shuffle", "must be true or false", "write true or false"),
    Wrong("run.name=3", "run.name", "must be text", 'write "3" in quotes'),
    Wrong(
        "metrics.wandb=on", "metrics.wandb", "must be one of off, offline, online", "choose from"
    ),
    Wrong("train.dtype=fp16", "train.dtype", "must be one of fp32, bf16", "did you mean"),
    Wrong("train=3", "train", "must be a section", "steps, global_batch_tokens"),
    Wrong("model.head_dim=none", "model.head_dim", "an integer or null", "give an integer"),
    # Ranges.
    Wrong("optim.lr=0", "optim.lr", "must be above 0", "use a value above 0"),
    Wrong(
        "metrics.straggler_every_steps=-1",
        "metrics.straggler_every_steps",
        "at least 0",
        "at least 0",
    ),
    Wrong("metrics.straggler_ratio=1", "metrics.straggler_ratio", "above 1", "above 1"),
    Wrong("optim.beta2=1", "optim.beta2", "at least 0.0 and below 1.0", "below 1.0"),
    Wrong("optim.weight_decay=-0.1", "optim.weight_decay", "at least 0", "at least 0"),
    Wrong(
        "optim.frozen_experts=8",
        "optim.frozen_experts",
        "below model.moe.num_experts=8",
        "use 0 to 7, or null",
    ),
    Wrong(
        "optim.frozen_experts=0 model.num_dense_layers=2",
        "optim.frozen_experts",
        "nothing to train with model.num_dense_layers=2",
        "with experts",
    ),
    Wrong(
        "optim.frozen_experts=1 model.moe.copy_experts=1",
        "model.moe.copy_experts",
        "must be 0 with optim.frozen_experts=1",
        "use 0",
    ),
    Wrong(
        "optim.frozen_experts=1 balance=aux_free",
        "model.moe.balance.bias_update_rate",
        "must be 0 with optim.frozen_experts=1",
        "use 0",
    ),
    Wrong(
        "train.steps=0 schedule=constant schedule.warmup_steps=0", "train.steps", "at least 1", "1"
    ),
    Wrong("train.timeout_s=0", "train.timeout_s", "must be above 0", "above 0"),
    Wrong("train.offload_ratio=2", "train.offload_ratio", "0.0 and at most 1.0", "at most 1.0"),
    Wrong(
        "train.offload_ratio=null placement=balanced placement.copies=2 parallel.ep=2",
        "train.offload_ratio",
        "placement.policy=balanced has some that come and go",
        "use placement=fixed, or train.offload_ratio=0",
    ),
    Wrong("train.start_timeout_s=0", "train.start_timeout_s", "must be above 0", "above 0"),
    Wrong("run.seed=-1", "run.seed", "at least 0", "at least 0"),
    Wrong("run.name=a/b run.dir=build/x", "run.name", "name a folder", "run.dir"),
    Wrong("checkpoint.keep_last=0", "checkpoint.keep_last", "at least 1", "at least 1"),
    Wrong("model.moe.top_k=0", "model.moe.top_k", "at least 1", "at least 1"),
    Wrong("model.moe.top_k=9", "model.moe.top_k", "at most model.moe.num_experts=8", "use 1 to 8"),
    Wrong(
        "model.moe.experts_by_layer=[8,8]",
        "model.moe.experts_by_layer",
        "a number for each of the 1 MoE layers, and has 2",
        "write 1 numbers, or null",
    ),
    Wrong(
        "model.moe.experts_by_layer=[8.5]",
        "model.moe.experts_by_layer",
        "must be a list of integers or null",
        "write a list, [4, 8]",
    ),
    Wrong(
        "model.moe.experts_by_layer=[0]", "model.moe.experts_by_layer", "at least 1", "multiples"
    ),
    Wrong(
        "model.num_layers=3 model.moe.experts_by_layer=[4,16]",
        "model.moe.num_experts",
        "must be the largest of model.moe.experts_by_layer=[4, 16]",
        "use 16",
    ),
    Wrong(
        "model.moe.expert_widths=[32,64]",
        "model.moe.d_expert",
        "must be the mean of model.moe.expert_widths=[32, 64], 48",
        "use 48",
    ),
    Wrong(
        "model.moe.expert_widths=[32,33]", "model.moe.d_expert", "32.5", "the mean must be whole"
    ),
    Wrong("model.moe.expert_widths=[0,128]", "model.moe.expert_widths", "at least 1", "a list"),
    Wrong(
        "model.moe.expert_widths=[32,64,96]",
        "model.moe.num_experts",
        "must be a multiple of 3 (each rank has as many of each of model.moe.expert_widths)",
        "use 6 or 9",
    ),
    Wrong(
        "parallel.ep=2 model.moe.expert_widths=[32,64,96] model.moe.num_experts=9",
        "model.moe.num_experts",
        "must be a multiple of 3 * parallel.ep=2 = 6",
        "use 6 or 12",
    ),
    Wrong(
        "parallel.etp=2 model.moe.expert_widths=[33,64,92] model.moe.d_expert=63 model.moe.num_experts=6",
        "model.moe.expert_widths",
        "must be a multiple of parallel.etp=2",
        "parallel.etp=1",
    ),
    Wrong(
        "model.moe.balance.width_loss_coef=0.1",
        "model.moe.balance.width_loss_coef",
        "model.moe.expert_widths=null",
        "set model.moe.expert_widths",
    ),
    Wrong(
        "model.num_layers=3 model.moe.experts_by_layer=[2,8] model.moe.top_k=3",
        "model.moe.top_k",
        "at most the 2 of a layer in model.moe.experts_by_layer",
        "use 1 to 2",
    ),
    Wrong(
        "model.num_layers=3 model.moe.experts_by_layer=[4,8] model.moe.balance.device_groups=8 "
        "model.moe.balance.device_loss_coef=0.1",
        "model.moe.balance.device_groups",
        "must divide the 4 of a layer in model.moe.experts_by_layer",
        "that divides",
    ),
    Wrong(
        "model.num_dense_layers=3", "model.num_dense_layers", "at most model.num_layers=2", "0 to 2"
    ),
    Wrong("model.moe.capacity_factor=0", "model.moe.capacity_factor", "above 0", "above 0"),
    Wrong(
        "model.moe.balance.z_loss_coef=-1",
        "model.moe.balance.z_loss_coef",
        "at least 0",
        "at least 0",
    ),
    Wrong("anomaly.sigma=2", "anomaly.sigma", "at least 3", "at least 3"),
    Wrong("anomaly.tries=0", "anomaly.tries", "at least 1", "at least 1"),
    Wrong("anomaly.window_steps=8", "anomaly.window_steps", "at least 16", "at least 16"),
    Wrong("anomaly.warmup_steps=200", "anomaly.warmup_steps", "at most 128", "at most 128"),
    Wrong("anomaly.rate_factor=1", "anomaly.rate_factor", "below 1.0", "below 1.0"),
    Wrong("anomaly.replicas_every_steps=-1", "anomaly.replicas_every_steps", "at least 0", "0"),
    Wrong("schedule.min_lr_ratio=2", "schedule.min_lr_ratio", "at most 1.0", "at most 1.0"),
    # Rules between keys.
    Wrong(
        "anomaly.policy=roll_back",
        "anomaly.policy",
        "checkpoint.every_steps=0",
        "set checkpoint.every_steps",
    ),
    Wrong(
        "model.num_kv_heads=3", "model.num_kv_heads", "must divide model.num_heads=4", "use 2 or 4"
    ),
    Wrong("model.head_dim=15", "model.head_dim", "must be even", "use 14 or 16"),
    Wrong(
        "model.d_model=60", "model.d_model", "even multiple of model.num_heads=4", "use 56 or 64"
    ),
    Wrong(
        "model.moe.expert_backend=grouped_mm model.moe.d_expert=66",
        "model.moe.d_expert",
        "must be a multiple of 4 (rows of 16 bytes in train.dtype=fp32)",
        "use 64 or 68",
    ),
    Wrong(
        "schedule.warmup_steps=101", "schedule", "must fit in train.steps=100", "train.steps=101"
    ),
    Wrong(
        "schedule=infinite schedule.decay_steps=80",
        "schedule",
        "warmup_steps=10 + cooldown_steps=20 + decay_steps=80 make 110 steps",
        "train.steps=110",
    ),
    Wrong(
        "schedule=wsd schedule.decay_steps=0", "schedule.decay_steps", "at least 1", "use a tenth"
    ),
    Wrong("schedule=power schedule.power_b=0.5", "schedule.power_b", "at most 0", "use -0.51"),
    Wrong(
        "schedule=infinite schedule.constant_lr_ratio=0.05",
        "schedule.constant_lr_ratio",
        "at least schedule.min_lr_ratio=0.1",
        "use 0.1 to 1.0",
    ),
    # The world.
    Wrong("parallel.ep=0", "parallel.ep", "at least 1", "at least 1"),
    Wrong("parallel.ep=4", "parallel.ep", "must divide the world size 2", "use parallel.ep=2"),
    Wrong(
        "experiment=quickstart", "parallel.ep", "must divide the world size 1", "start 2 ranks", 1
    ),
    Wrong(
        "parallel.ep=4 model.moe.num_experts=6",
        "model.moe.num_experts",
        "must be a multiple of parallel.ep=4",
        "use 4 or 8",
        4,
    ),
    Wrong(
        "parallel.ep=4 model.num_layers=4 model.moe.experts_by_layer=[6,8,6]",
        "model.moe.experts_by_layer",
        "must be a multiple of parallel.ep=4",
        "or 8, or parallel.ep=2",
        4,
    ),
    Wrong(
        "train.micro_batch_tokens=1000", "train.micro_batch_tokens", "data.seq_len=256", "use 768"
    ),
    Wrong(
        "train.global_batch_tokens=5000",
        "train.global_batch_tokens",
        "train.micro_batch_tokens=1024 * dp=2 = 2048",
        "use 4096 or 6144",
    ),
    # Components.
    Wrong(
        "model.moe.router._target_=moesys.moe.routers.TopkRouter",
        "model.moe.router._target_",
        "must name a class of moesys.moe.routers",
        "did you mean TopKRouter?",
    ),
    Wrong(
        "model.moe.router._target_=no_such_package.Router",
        "model.moe.router._target_",
        "must be importable (No module named 'no_such_package')",
        "check the spelling",
    ),
    Wrong(
        "model.moe.router._target_=TopKRouter",
        "model.moe.router._target_",
        "with its module",
        "write package.module.ClassName",
    ),
    Wrong(
        "model.moe.router._target_='os;system'",
        "model.moe.router._target_",
        "must be the import path of a class",
        "write package.module.ClassName",
    ),
    Wrong(
        "model.moe.router._target_=os.path.join",
        "model.moe.router._target_",
        "must be a subclass of torch.nn.Module",
        "name a router",
    ),
    Wrong(
        "model.moe.router.scaling=2.5",
        "model.moe.router.scaling",
        "is not an option of moesys.moe.routers.TopKRouter",
        "did you mean scaling_factor",
    ),
    Wrong(
        "model.moe.router.score_function=softmx",
        "model.moe.router.score_function",
        "must be one of softmax, sigmoid",
        "did you mean softmax",
    ),
    Wrong(
        "model.moe.router.normalize_weights=1",
        "model.moe.router.normalize_weights",
        "must be true or false",
        "write true or false",
    ),
    Wrong(
        "model.moe.router.top_k=2",
        "model.moe.router.top_k",
        "is passed by the model",
        "model.moe.top_k",
    ),
    Wrong(
        "model.moe.router._partial_=true", "model.moe.router._partial_", "is reserved", "remove it"
    ),
    # Files.
    Wrong("data.path=no/such/folder", "data.path", "does not exist", "run moesys prep --input"),
    Wrong("data.path=DATA/..", "data.path", "holds no manifest.json", "--output"),
    Wrong("data.path=''", "data.path", "must not be empty", "name a folder"),
    Wrong("run.dir=DATA/manifest.json/x", "run.dir", "manifest.json is a file", "another run.dir"),
    Wrong("model.vocab_size=2000", "model.vocab_size", "at least the 2048 tokens", "=2048"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_data(tmp_path_factory.mktemp("wrong") / "data")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.overrides)
def test_wrong_configuration_is_refused_with_key_rule_and_fix(wrong: Wrong, data: Path) -> None:
    start = time.process_time()
    problems = refused(wrong.overrides.split(" "), wrong.world_size, data)
    seconds = time.process_time() - start
    assert len(problems) == 1, [str(problem) for problem in problems]
    (problem,) = problems
    assert problem.key == wrong.key
    assert wrong.rule in problem.rule
    assert wrong.fix in problem.fix
    assert str(problem).count("\n") == 0
    assert seconds < 3.0
    if "torch.distributed" in sys.modules:
        assert not sys.modules["torch.distributed"].is_initialized()


def test_table_is_long_enough_and_the_base_is_right(data: Path) -> None:
    assert len(WRONG) >= 40
    assert len({wrong.overrides for wrong in WRONG}) == len(WRONG)
    assert refused([], 2, data) == ()


NUMERIC = [wrong for wrong in WRONG if re.match(r"use \d+ or \d+", wrong.fix)]


@pytest.mark.parametrize("wrong", NUMERIC, ids=lambda wrong: wrong.overrides)
def test_every_value_that_a_fix_names_is_accepted(wrong: Wrong, data: Path) -> None:
    for value in re.findall(r"\d+", wrong.fix):
        fixed = [*wrong.overrides.split(" "), f"{wrong.key}={value}"]
        assert refused(fixed, wrong.world_size, data) == ()


def test_all_misspelt_keys_and_wrong_types_are_listed_together(data: Path) -> None:
    problems = refused(
        ["experiment=quikstart", "train.stepz=3", "train.lr=1", "optim.lr=x", "run.name=${now:}"],
        2,
        data,
    )
    keys = [problem.key for problem in problems]
    assert keys == ["experiment", "train.stepz", "train.lr", "run.name", "optim.lr"]


def test_a_reference_beside_a_refused_one_is_no_wrong_type(data: Path) -> None:
    overrides = ["train.steps=${train.micro_batch_tokens}", "run.name=${now:%Y}"]
    assert [problem.key for problem in refused(overrides, 2, data)] == ["run.name"]
    assert refused(overrides[:1], 2, data) == ()


def test_the_message_has_one_line_per_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["train.stepz=3", "optim.lr=x", "run.seed=1.5"])
    assert str(caught.value).splitlines() == [
        "configuration: 3 problems",
        "  - train.stepz=3 is not a configuration key: did you mean train.steps?",
        "  - run.seed=1.5 must be an integer: give an integer, e.g. 8",
        "  - optim.lr='x' must be a finite number: give a finite number, e.g. 0.1",
    ]
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_rules_components_and_files_are_listed_together(data: Path) -> None:
    problems = refused(
        [
            "optim.lr=-1",
            "model.moe.num_experts=6",
            "parallel.ep=4",
            "model.moe.router.scaling=2",
            "model.moe.router.score_function=softmx",
            "data.path=nowhere",
            "run.dir=DATA/manifest.json",
        ],
        4,
        data,
    )
    assert [problem.key for problem in problems] == [
        "optim.lr",
        "model.moe.num_experts",
        "model.moe.router.score_function",
        "model.moe.router.scaling",
        "data.path",
        "run.dir",
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("model.moe.capacity_policy=pad", "capacity_policy=pad has no effect without"),
        (
            "balance=none model.moe.balance.device_groups=4",
            "device_groups=4 has no effect with model.moe.balance.device_loss_coef=0",
        ),
        ("model.moe.balance.bias_end_step=4", "bias_end_step=4 has no effect with"),
        ("model.share_depth=all", "share_depth=all has no effect with fewer than two MoE layers"),
        ("model.memory_layers.rank=3", "rank=3 has no effect with model.memory_layers.layers=[]"),
        ("model.memory_layers.layers=[1]", "leaves no MoE layer: model.moe has no effect"),
        (
            "model.attention_experts_kv=shared",
            "attention_experts_kv=shared has no effect with model.attention_experts=1",
        ),
        ("model.moe.capacity_priority=random", "capacity_priority=random has no effect without"),
        (
            "schedule.decay_steps=1000",
            "schedule.decay_steps=1000 has no effect with schedule.kind=cosine",
        ),
        ("schedule.power_a=3", "only with power"),
        ("model.num_dense_layers=2", "leaves no MoE layer"),
        ("train.offload_ratio=null", "offload_ratio=null saves no memory with 2 layers"),
        ("parallel.sequence_parallel=false", "no effect with parallel.tp=1"),
        ("parallel.cp_attention=ulysses", "no effect with parallel.cp=1"),
        ("parallel.tp=2 parallel.zero=3", "dp_shard=1 * cp=1 = 1 rank"),
        ("parallel.zero=1 parallel.dp_shard=1", "zero=1 has no effect"),
        ("metrics.wandb_project=x", "has no effect with metrics.wandb=off"),
        (
            "metrics.straggler_every_steps=0 metrics.straggler_ratio=2",
            "straggler_ratio=2.0 has no effect",
        ),
        (
            "placement.speeds=measured",
            "speeds=measured has no effect with placement.policy=fixed",
        ),
        ("train.eval_every_steps=101", "beyond train.steps=100"),
        ("anomaly.warmup_steps=16", "anomaly.warmup_steps=16 has no effect with anomaly.sigma=0"),
        ("anomaly.tries=2", "no effect with anomaly.policy=stop"),
        (
            "anomaly.policy=skip anomaly.reinject_after_steps=9",
            "no effect with anomaly.policy=skip",
        ),
        ("checkpoint.every_steps=101", "beyond train.steps=100"),
    ],
)
def test_option_without_effect_is_a_warning(overrides: str, sentence: str, data: Path) -> None:
    config = compose([*overrides.split(" "), f"data.path={data}"])
    (warning,) = check(config, 2)
    assert sentence in warning
    assert check(compose([f"data.path={data}"]), 2) == []
