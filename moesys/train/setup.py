"""Everything a run consists of, built once from its configuration.

Shapes: V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.copies import with_copies
from moesys.config.errors import ConfigError
from moesys.config.memory import GIB, memory_problems
from moesys.config.schema import RunConfig
from moesys.data.eval_sequences import EvalSequences
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import EvalBatches, TokenLoader
from moesys.data.manifest import DataManifest
from moesys.data.sequence_loader import SequenceLoader
from moesys.models.transformer import Transformer
from moesys.optim.build import build_optimizer
from moesys.parallel.bootstrap import Process
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import ParallelModel, build_parallel_model
from moesys.train.batches import build_eval_batches, build_loader


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run on this rank."""

    config: RunConfig
    process: Process
    meshes: Meshes
    manifests: dict[str, DataManifest]
    """Of each source by its name; "" names the only one."""
    parallel: ParallelModel
    optimizer: torch.optim.AdamW
    loader: TokenLoader | SequenceLoader
    eval_batches: dict[str, EvalBatches | EvalSequences]
    """Of each source."""
    mixing_batches: dict[str, EvalBatches | EvalSequences]
    """Of each source, for the policy that mixes them."""
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
    def summary_path(self) -> Path:
        return self.folder / "summary.json"

    @property
    def bytes_per_token(self) -> float:
        """Of the training text, as the sources are mixed now."""
        splits = [manifest.splits["train"] for manifest in self.manifests.values()]
        weights = self.loader.mix.weights_N
        return sum(w * s.bytes / s.tokens for w, s in zip(weights, splits, strict=True))


def build_run(
    config: RunConfig,
    process: Process,
    mark: Callable[[str], None] = lambda part: None,
    meshes: Meshes | None = None,
) -> Run:
    """Collective. Data files are checked before a model is built. `mark` is told when "data" and "model" are done.

    `meshes` of these degrees that are there already are used again.
    """
    dims = parallel_dims(config.parallel, process.world_size)
    if config.placement.copies is None:
        config = _with_copies(config, dims, process.device)
    dispatch = config.dispatch
    meshes = meshes or build_meshes(
        dims,
        process.device.type,
        dispatch.ranks_per_node or process.ranks_per_node,
        cuts_by_node=dispatch.exchange != "flat",
        has_copies=config.placement.makes_copies,
    )
    folders = {name: Path(path) for name, path in config.data.folders.items()}
    manifests = {name: DataManifest.load(folder) for name, folder in folders.items()}
    vocab_size = config.model.vocab_size
    loader = build_loader(config, meshes.dp_rank, dims.dp)
    held_out = {name: IndexedTokens(folder / "val", vocab_size) for name, folder in folders.items()}
    eval_batches, mixing_batches = (
        {
            name: build_eval_batches(config, tokens, num_tokens, meshes.dp_rank, dims.dp)
            for name, tokens in held_out.items()
        }
        for num_tokens in (config.train.eval_tokens, config.data.mixing.tokens)
    )
    mark("data")
    parallel = build_parallel_model(config, meshes, process.device)
    optimizer = build_optimizer(parallel.whole, config.optim)
    mark("model")
    of_any = next(iter(folders.values()))  # all have one tokenizer
    token_bytes_V = torch.from_numpy(np.load(of_any / "token_bytes.npy", allow_pickle=False))
    return Run(
        config=config,
        process=process,
        meshes=meshes,
        manifests=manifests,
        parallel=parallel,
        optimizer=optimizer,
        loader=loader,
        eval_batches=eval_batches,
        mixing_batches=mixing_batches,
        token_bytes_V=token_bytes_V.to(process.device, torch.int64),
    )


def _with_copies(config: RunConfig, dims: ParallelDims, device: torch.device) -> RunConfig:
    """By the memory of the job's smallest GPU. Collective. Raises ConfigError where it has none, or not even one copy fits."""
    if device.type != "cuda":
        return with_copies(config, dims, None)
    total = torch.tensor(torch.cuda.mem_get_info(device)[1], device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    memory_gib = total.item() / GIB
    found = with_copies(config, dims, memory_gib)
    if problems := memory_problems(found, dims, memory_gib):
        raise ConfigError(problems)
    return found
