"""What a rank of the import test runs; apart from the test, so that ranks do not import transformers."""

from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.huggingface import load_hf, model_config_from_hf
from moesys.config.build import build
from moesys.config.schema import ModelConfig
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_model


def import_and_run(rank: int, world_size: int, folders: list[Path], ids: Tensor) -> list[Tensor]:
    """Logits of each folder's model, experts spread over all ranks."""
    logits = []
    meshes = build_meshes(ParallelDims(world_size=world_size, ep=world_size), "cpu")
    for folder in folders:
        config = build(ModelConfig, model_config_from_hf(folder))
        model = build_model(config, meshes, torch.device("cpu"), seed=7).eval()
        load_hf(folder, model, config)
        with torch.no_grad():
            logits.append(model.logits(ids))
    return logits
