"""Everything a run consists of, built once from its configuration.

Shapes: V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesys.config.schema import RunConfig
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import EvalBatches, TokenLoader
from moesys.data.manifest import DataManifest
from moesys.models.transformer import Transformer
from moesys.optim.build import build_optimizer
from moesys.parallel.bootstrap import Process
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import build_model


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run on this rank."""

    config: RunConfig
    process: Process
    meshes: Meshes
    manifest: DataManifest
    model: Transformer
    optimizer: torch.optim.AdamW
    loader: TokenLoader
    eval_batches: EvalBatches
    token_bytes_V: Tensor
    """int64 on the run's device: UTF-8 bytes that each token stands for."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def bytes_per_token(self) -> float:
        """Of the training split."""
        split = self.manifest.splits["train"]
        return split.bytes / split.tokens


def build_run(config: RunConfig, process: Process) -> Run:
    """Collective. Data files are checked before a model is built."""
    data = Path(config.data.path)
    manifest = DataManifest.load(data)
    micro_batch_samples = config.train.micro_batch_tokens // config.data.seq_len
    vocab_size = config.model.vocab_size
    loader = TokenLoader(
        IndexedTokens(data / "train", vocab_size),
        seq_len=config.data.seq_len,
        global_batch_samples=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch_samples=micro_batch_samples,
        dp_rank=process.rank,
        dp_size=process.world_size,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    eval_batches = EvalBatches(
        IndexedTokens(data / "val", vocab_size),
        seq_len=config.data.seq_len,
        micro_batch_samples=micro_batch_samples,
        dp_rank=process.rank,
        dp_size=process.world_size,
        eval_tokens=config.train.eval_tokens,
    )
    dims = ParallelDims(world_size=process.world_size, ep=config.parallel.ep)
    meshes = build_meshes(dims, process.device.type)
    model = build_model(config.model, meshes, process.device, config.run.seed)
    token_bytes_V = torch.from_numpy(np.load(data / "token_bytes.npy", allow_pickle=False))
    return Run(
        config=config,
        process=process,
        meshes=meshes,
        manifest=manifest,
        model=model,
        optimizer=build_optimizer(model, config.optim),
        loader=loader,
        eval_batches=eval_batches,
        token_bytes_V=token_bytes_V.to(process.device, torch.int64),
    )
