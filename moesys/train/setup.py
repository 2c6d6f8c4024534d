"""Everything a run consists of, built once from its configuration.

Shapes: V vocabulary.
"""

from collections.abc import Callable
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
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import ParallelModel, build_parallel_model


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run on this rank."""

    config: RunConfig
    process: Process
    meshes: Meshes
    manifest: DataManifest
    parallel: ParallelModel
    optimizer: torch.optim.AdamW
    loader: TokenLoader
    eval_batches: EvalBatches
    token_bytes_V: Tensor
    """int64 on the run's device: UTF-8 bytes that each token stands for."""

    @property
    def model(self) -> Transformer:
        """What this rank has of the decoder."""
        return self.parallel.whole

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def bytes_per_token(self) -> float:
        """Of the training split."""
        split = self.manifest.splits["train"]
        return split.bytes / split.tokens


def build_run(
    config: RunConfig, process: Process, mark: Callable[[str], None] = lambda part: None
) -> Run:
    """Collective. Data files are checked before a model is built. `mark` is told when "data" and "model" are done."""
    dims = parallel_dims(config.parallel, process.world_size)
    meshes = build_meshes(dims, process.device.type)
    data = Path(config.data.path)
    manifest = DataManifest.load(data)
    micro_batch_samples = config.train.micro_batch_tokens // config.data.seq_len
    vocab_size = config.model.vocab_size
    loader = TokenLoader(
        IndexedTokens(data / "train", vocab_size),
        seq_len=config.data.seq_len,
        global_batch_samples=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch_samples=micro_batch_samples,
        dp_rank=meshes.dp_rank,
        dp_size=dims.dp,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        with_documents=config.data.mask_documents,
    )
    eval_batches = EvalBatches(
        IndexedTokens(data / "val", vocab_size),
        seq_len=config.data.seq_len,
        micro_batch_samples=micro_batch_samples,
        dp_rank=meshes.dp_rank,
        dp_size=dims.dp,
        eval_tokens=config.train.eval_tokens,
        with_documents=config.data.mask_documents,
    )
    mark("data")
    parallel = build_parallel_model(config, meshes, process.device)
    optimizer = build_optimizer(parallel.whole, config.optim)
    mark("model")
    token_bytes_V = torch.from_numpy(np.load(data / "token_bytes.npy", allow_pickle=False))
    return Run(
        config=config,
        process=process,
        meshes=meshes,
        manifest=manifest,
        parallel=parallel,
        optimizer=optimizer,
        loader=loader,
        eval_batches=eval_batches,
        token_bytes_V=token_bytes_V.to(process.device, torch.int64),
    )
