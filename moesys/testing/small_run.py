"""A run small enough for a test: its configuration, and one of its ranks on the CPU with batches of its own making.

    config = small_config(small_model(num_layers=4), seq_len=16, sequences=8)
    run = SmallRun(with_micro_steps(config, world_size, 4), world_size)      # on every rank
    result = run.step()

Shapes: B sequences of S tokens.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moesys.config.schema import (
    BalanceConfig,
    CheckpointConfig,
    ComponentConfig,
    DataConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    ScheduleConfig,
    TrainConfig,
)
from moesys.data.loader import MicroBatch
from moesys.data.pieces import rank_batch
from moesys.data.step_batch import StepBatch
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.placement import Integers
from moesys.train.step import StepResult, TrainStep
from moesys.train.timing import SectionTimer

_MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "num_layers": 3,
    "num_dense_layers": 1,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ffn": 48,
    "init_std": 0.1,
}
_MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2, "d_expert": 24, "num_shared_experts": 1}
_MOE_KEYS = frozenset(MoEConfig.__dataclass_fields__)


def small_model(
    *,
    router: str = "moesys.moe.routers.TopKRouter",
    balance: BalanceConfig | None = None,
    **keys: Any,
) -> ModelConfig:
    """A dense layer and two of 8 experts, where `keys` of ModelConfig and MoEConfig say nothing else."""
    moe = _MOE | {key: value for key, value in keys.items() if key in _MOE_KEYS}
    model = _MODEL | {key: value for key, value in keys.items() if key not in _MOE_KEYS}
    return ModelConfig(
        **model,
        moe=MoEConfig(
            **moe, router=ComponentConfig(target=router), balance=balance or BalanceConfig()
        ),
    )


def small_config(
    model: ModelConfig,
    *,
    seq_len: int,
    sequences: int,
    micro_batch_sequences: int | None = None,
    seed: int = 0,
    optim: OptimConfig | None = None,
    parallel: ParallelConfig | None = None,
    **train: Any,
) -> RunConfig:
    """Steps of so many sequences, in micro-batches of all of them or fewer; one step, or as `train` says. No files."""
    micro_batch_tokens = (micro_batch_sequences or sequences) * seq_len
    batch: dict[str, Any] = {
        "steps": 1,
        "global_batch_tokens": sequences * seq_len,
        "micro_batch_tokens": micro_batch_tokens,
    }
    return RunConfig(
        run=RunSection(name="small", dir="unused", seed=seed),
        model=model,
        data=DataConfig(path="unused", seq_len=seq_len),
        optim=optim or OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(),
        parallel=parallel or ParallelConfig(),
        train=TrainConfig(**batch | train),
        checkpoint=CheckpointConfig(),
        metrics=MetricsConfig(),
    )


def with_micro_steps(config: RunConfig, world_size: int, steps: int) -> RunConfig:
    """The configuration whose data ranks take `steps` micro-steps."""
    dims = parallel_dims(config.parallel, world_size)
    tokens = config.train.global_batch_tokens // (steps * dims.dp)
    return replace(config, train=replace(config.train, micro_batch_tokens=tokens))


class SmallRun:
    """A rank of a run. Collective."""

    def __init__(self, config: RunConfig, world_size: int, meshes: Meshes | None = None) -> None:
        """`meshes` of these degrees that are there already are used again."""
        self.config = config
        self.dims = parallel_dims(config.parallel, world_size)
        device = torch.device("cpu")
        self.meshes = meshes or build_meshes(
            self.dims,
            device.type,
            config.dispatch.ranks_per_node or world_size,
            cuts_by_node=config.dispatch.exchange != "flat",
            has_copies=config.placement.makes_copies,
        )
        parallel = build_parallel_model(config, self.meshes, device)
        self.model = parallel.whole
        set_expert_backend(self.model, "loop")
        self.optimizer = build_optimizer(self.model, config.optim)
        self.train_step = TrainStep(
            parallel, self.optimizer, self.meshes, config, SectionTimer(device)
        )
        self.steps = 0
        """Done; may be set, to go on from any."""

    def step(self) -> StepResult:
        """Train one step, on the samples of its number, or on its sequences by a plan of its own."""
        dp_rank, dp_size = self.meshes.dp_rank, self.dims.dp
        if self.config.batch.is_planned:
            batch = sequences_of_step(self.config, self.steps, dp_rank, dp_size)
        else:
            micro_steps = self.config.train.micro_steps(dp_size)
            batch = samples_of_step(self.config, self.steps, dp_rank, dp_size, micro_steps)
        self.steps += 1
        return self.train_step(batch, self.config.optim.lr, step=self.steps)


def samples_of_step(
    config: RunConfig, step: int, dp_rank: int, dp_size: int, micro_steps: int
) -> list[MicroBatch]:
    """The same sequences of a step whatever the layout, cut as the loader cuts them; text with something to learn.

    With `data.mask_documents`, two documents in every sequence.
    """
    seq_len, vocab_size = config.data.seq_len, config.model.vocab_size
    num_sequences = config.train.global_batch_tokens // seq_len
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, vocab_size, (num_sequences, 1), generator=generator)
    stream = (start + 7 * torch.arange(seq_len + 1)) % vocab_size
    cut = torch.randint(1, seq_len, (num_sequences, 1), generator=generator)
    documents = (torch.arange(seq_len) >= cut).long()
    pieces = zip(
        *(x.chunk(micro_steps * dp_size)[dp_rank::dp_size] for x in (stream, documents)),
        strict=True,
    )
    return [
        MicroBatch(
            input_ids_BS=ids[:, :-1],
            target_ids_BS=ids[:, 1:],
            document_ids_BS=document_ids if config.data.mask_documents else None,
        )
        for ids, document_ids in pieces
    ]


PLAN_RANKS = 8
"""Of plans as `any_plan` draws them."""


def sequences_of_step(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> StepBatch:
    """The same sequences of a step, of 1 to data.seq_len tokens, and the same micro-steps of them, whatever the layout.

    `dp_size` divides PLAN_RANKS: what the plan gives several ranks is a rank's then.
    """
    rng = np.random.default_rng((config.run.seed, step))
    longest, total = config.data.seq_len, config.train.global_batch_tokens
    drawn = (longest ** rng.uniform(0, 1, total)).astype(np.int64)
    drawn[:2] = longest, 1
    lengths_S = drawn[: np.searchsorted(np.cumsum(drawn), total, side="right")]
    starts = rng.integers(0, config.model.vocab_size, len(lengths_S)).tolist()
    tokens_S = [
        (start + 7 * np.arange(length + 1)) % config.model.vocab_size
        for start, length in zip(starts, lengths_S.tolist(), strict=True)
    ]
    plan = on_fewer_ranks(any_plan(lengths_S, config.train.micro_steps(dp_size), rng), dp_size)
    depth, tp = config.model.mtp_depth, config.parallel.tp
    batches = [
        rank_batch(micro_step, lengths_S, dp_rank, tokens_S, depth, tp)
        for micro_step in plan.micro_steps
    ]
    return StepBatch(micro_batches=batches, lengths_L=lengths_S)


def any_plan(lengths_S: Integers, micro_steps: int, rng: np.random.Generator) -> BatchPlan:
    """Each sequence in any of the micro-steps on any ranks, but for two of these.

    In the last micro-step is one sequence, on all ranks, so that those that get none of a short one only pass it on. The last rank
    has nothing in the first.
    """
    steps: list[list[Piece]] = [[] for _ in range(micro_steps)]
    *others, last = rng.permutation(len(lengths_S)).tolist()
    for sequence in others:
        index = int(rng.integers(max(1, micro_steps - 1)))
        ranks = rng.permutation(PLAN_RANKS).tolist()
        ranks = ranks[: 1 + int(rng.integers(PLAN_RANKS) ** 2 / PLAN_RANKS)]
        if index == 0:
            ranks = [rank for rank in ranks if rank < PLAN_RANKS - 1] or [0]
        steps[index].append(Piece(sequence, tuple(ranks)))
    steps[-1].append(Piece(last, tuple(range(PLAN_RANKS))))
    return batch_plan(lengths_S, PLAN_RANKS, steps)


def on_fewer_ranks(plan: BatchPlan, num_ranks: int) -> BatchPlan:
    """The same micro-steps where rank r does what all ranks did whose number is r more than a multiple of `num_ranks`."""
    steps = [
        [
            Piece(piece.sequence, tuple(dict.fromkeys(r % num_ranks for r in piece.ranks)))
            for piece in step
        ]
        for step in plan.micro_steps
    ]
    return batch_plan(plan.lengths_S, num_ranks, steps)
