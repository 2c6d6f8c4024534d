"""A Mixtral trained by DeepSpeed's AutoEP and by us, from the same checkpoint on the same samples: what the ranks run.

Shapes: B samples of S tokens, M MoE layers, E experts.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.checkpoint.huggingface import load_hf, model_config_from_hf
from moesys.config.build import build
from moesys.config.schema import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from moesys.data.loader import MicroBatch
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.testing.small_run import small_config
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

SEQUENCES, SEQ_LEN, STEPS, LR, EPS = 4, 16, 5, 3e-3, 1e-5
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    tp: int
    ep: int
    clip: float
    """Largest gradient norm; 0 = without clipping."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step over all ranks."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Before clipping."""
    load_ME: list[list[int]]


def samples(step: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, S] of all ranks, text with something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, vocab_size, (SEQUENCES, 1), generator=generator)
    ids = (start + 7 * torch.arange(SEQ_LEN + 1)) % vocab_size
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def run_both(rank: int, size: int, folder: Path, case: Case) -> tuple[list[Step], list[Step]]:
    """(ours, theirs)."""
    return _our_steps(size, folder, case), _their_steps(rank, size, folder, case)


def _our_steps(size: int, folder: Path, case: Case) -> list[Step]:
    """Imported from `folder` into the layout, then trained by a TrainStep."""
    config = small_config(
        build(ModelConfig, model_config_from_hf(folder)),
        seq_len=SEQ_LEN,
        sequences=SEQUENCES,
        micro_batch_sequences=SEQUENCES * case.tp // size,
        steps=STEPS,
        optim=OptimConfig(lr=LR, eps=EPS, weight_decay=0.0, clip_grad_norm=case.clip),
        parallel=ParallelConfig(tp=case.tp, ep=case.ep),
    )
    meshes = build_meshes(parallel_dims(config.parallel, size), "cpu")
    parallel = build_parallel_model(config, meshes, CPU)
    load_hf(folder, parallel.whole, config.model)
    set_expert_backend(parallel.whole, "loop")
    optimizer = build_optimizer(parallel.whole, config.optim)
    step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(CPU))
    done = []
    for index in range(STEPS):
        ids, targets = (
            x.chunk(meshes.dims.dp)[meshes.dp_rank] for x in samples(index, config.model.vocab_size)
        )
        result = step([MicroBatch(input_ids_BS=ids, target_ids_BS=targets)], LR)
        load_ME = result.expert_load_ME
        done.append(Step(loss=result.loss, grad_norm=result.grad_norm, load_ME=load_ME))
    return done


def _their_steps(rank: int, size: int, folder: Path, case: Case) -> list[Step]:
    """transformers' Mixtral under deepspeed.initialize: ZeRO 1 where it clips, else stage 0."""
    engine: Any = _their_engine(folder, case)
    layers = [m for m in engine.module.modules() if type(m).__name__ == "AutoEPMoELayer"]
    dp, at_dp = size // case.tp, rank // case.tp
    done = []
    for index in range(STEPS):
        ids, targets = (x.chunk(dp)[at_dp] for x in samples(index, engine.module.config.vocab_size))
        for layer in layers:
            layer.tokens_per_expert.zero_()
        loss = engine(input_ids=ids, labels=targets, shift_labels=targets).loss
        load_ME = torch.stack([layer.tokens_per_expert for layer in layers]).clone()
        engine.backward(loss)
        norm = 0.0 if case.clip else _norm_of_gradients(engine.module, case, size)
        engine.step()
        if case.clip:
            norm = float(engine.get_global_grad_norm())
        mean_loss = loss.detach().clone()
        # All ranks of tp have the same samples and count all of their slots.
        for total in (mean_loss, load_ME):
            dist.all_reduce(total)
        load_ME = (load_ME / case.tp).long().tolist()
        done.append(Step(loss=mean_loss.item() / size, grad_norm=norm, load_ME=load_ME))
    return done


def _their_engine(folder: Path, case: Case) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from transformers import AutoModelForCausalLM

    # Its all-reduce over shared memory would be compiled at the first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    adam = {"lr": LR, "betas": [0.9, 0.95], "eps": EPS, "weight_decay": 0.0, "torch_adam": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES * case.tp // dist.get_world_size(),
        "zero_optimization": {"stage": 1 if case.clip else 0},
        "gradient_clipping": case.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "expert_parallel": {"enabled": True, "autoep_size": case.ep, "preset_model": "mixtral"},
    }
    if case.tp > 1:
        config["tensor_parallel"] = {"autotp_size": case.tp, "preset_model": "mixtral"}
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return deepspeed.initialize(model=model.train(), config=config)[0]


def _norm_of_gradients(model: torch.nn.Module, case: Case, size: int) -> float:
    """From the reduced gradients: each parameter's square, divided by the ranks that hold the same part of it."""
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        copies = size
        if ".experts." in name:
            copies = size // case.ep
        elif ".self_attn." in name:
            copies = size // case.tp
        assert parameter.grad is not None, name
        total += parameter.grad.double().square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt().item()
