"""The records of metrics.jsonl and summary.json, from what a run and its steps are. Pure.

Shapes: M MoE layers, E experts.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moesys.checkpoint.saver import Saved
from moesys.config.schema import ModelConfig, RunConfig
from moesys.moe.similarity import divergence
from moesys.parallel.bootstrap import Process
from moesys.parallel.dims import ParallelDims
from moesys.train.evaluate import Evaluation
from moesys.train.step import StepResult


def start_record(config: RunConfig, dims: ParallelDims, process: Process) -> dict[str, Any]:
    """What every start says of its configuration and its ranks; the trainer adds what it found out."""
    return {
        "kind": "start",
        "world_size": process.world_size,
        "dp": dims.dp,
        **{axis: getattr(dims, axis) for axis in ("pp", "cp", "tp", "ep", "etp", "dp_shard")},
        "zero": config.parallel.zero,
        "device": str(process.device),
        "dtype": config.train.dtype,
        "backend": process.backend,
        "launcher": process.launcher,
        "nodes": list(dict.fromkeys(process.nodes)),
        "rank_order": process.rank_order,
        "steps": config.train.steps,
    }


def train_record(
    config: RunConfig,
    result: StepResult,
    *,
    step: int,
    tokens: int,
    lr: float,
    step_s: float,
    sections_ms: Mapping[str, float],
    bytes_per_token: float,
    flops_per_token: float,
    world_size: int,
    peak_tflops: float,
) -> dict[str, Any]:
    """One optimizer step. `sections_ms` of rank 0: data, forward, backward, optimizer, checkpoint."""
    tokens_per_s = result.num_tokens / step_s
    tflops_per_rank = tokens_per_s * flops_per_token / world_size / 1e12
    imbalances = [imbalance(load_E) for load_E in result.expert_load_ME]
    entropies = result.router_entropy_M
    return {
        "kind": "train",
        "step": step,
        "tokens": tokens,
        "loss": result.loss,
        "bits_per_byte": result.loss / math.log(2) / bytes_per_token,
        "aux_loss": result.balance_loss,
        "z_loss": result.z_loss,
        **({"mtp_loss": result.mtp_loss} if config.model.mtp_depth else {}),
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens_per_s,
        "tflops_per_rank": tflops_per_rank,
        "mfu": tflops_per_rank / peak_tflops,
        "load_imbalance": sum(imbalances) / len(imbalances) if imbalances else 1.0,
        "max_load_imbalance": max(imbalances, default=1.0),
        "dead_experts": sum(load_E.count(0) for load_E in result.expert_load_ME),
        "dropped_slots": sum(result.dropped_slots_M),
        "router_entropy": sum(entropies) / len(entropies) if entropies else 0.0,
        "sent_bytes": result.sent_bytes,
        "between_nodes_bytes": result.between_nodes_bytes,
        **_node_fields(result),
        **_codec_fields(config.model, result),
        **_ratio_field(config, result),
        **_placement_fields(result),
        "step_ms": step_s * 1e3,
        **{
            f"{name}_ms": sections_ms.get(name, 0.0)
            for name in ("data", "forward", "backward", "optimizer", "checkpoint")
        },
        "exchange_ms": result.exchange_ms,
        "router_entropy_by_layer": entropies,
        "dropped_slots_by_layer": result.dropped_slots_M,
        "expert_load": result.expert_load_ME,
    }


def _codec_fields(model: ModelConfig, result: StepResult) -> dict[str, Any]:
    """Rows that travelled over the slots that they are of, where a codec makes fewer. Null experts' never travel."""
    if not result.coded_rows_M:
        return {}
    experts_M = [model.moe_of(layer).num_experts for layer in model.moe_layers]
    slots_M = [
        sum(load_E[:experts]) - dropped
        for load_E, experts, dropped in zip(
            result.expert_load_ME, experts_M, result.dropped_slots_M, strict=True
        )
    ]
    rows_M = [
        rows or slots for rows, slots in zip(result.coded_rows_M, slots_M, strict=True)
    ]  # a codec leaves no layer without rows
    return {
        "codec_rows": sum(rows_M) / max(1, sum(slots_M)),
        "codec_rows_by_layer": [
            rows / max(1, slots) for rows, slots in zip(rows_M, slots_M, strict=True)
        ],
    }


def _node_fields(result: StepResult) -> dict[str, Any]:
    nodes = result.between_nodes_bytes_N
    return {"between_nodes_bytes_by_node": nodes} if nodes else {}


def _ratio_field(config: RunConfig, result: StepResult) -> dict[str, Any]:
    """Bytes of a row for each slot in the compute type over those sent, where rows may be compressed."""
    if not (config.dispatch.compresses and result.sent_bytes):
        return {}
    rows = _codec_fields(config.model, result).get("codec_rows", 1.0)
    return {"compression_ratio": result.plain_bytes / result.sent_bytes / rows}


def _placement_fields(result: StepResult) -> dict[str, Any]:
    """What copies of experts did; slowest ranks' rows are means over layers."""
    if (found := result.placement) is None:
        return {}
    fields = {
        "copies_bytes": found.sent_bytes,
        "copies_between_nodes_bytes": found.between_nodes_bytes,
        "copies_wait_ms": found.wait_ms,
        "moved_experts": found.moved_experts,
        "reshard_bytes": found.reshard_bytes,
        "rank_imbalance": statistics.fmean(found.busiest_rank_M),
        "owner_imbalance": statistics.fmean(found.busiest_owner_M),
        "rank_imbalance_by_layer": found.busiest_rank_M,
        "owner_imbalance_by_layer": found.busiest_owner_M,
    }
    if errors := found.prediction_error_M:
        fields |= {
            "load_prediction_error": statistics.fmean(errors),
            "load_prediction_error_by_layer": errors,
        }
    if found.added_copies is not None:
        fields["added_copies"] = found.added_copies
    if found.overlap_degree is not None:
        fields["overlap_degree"] = found.overlap_degree
    if found.speeds_P is not None:
        fields["rank_speeds"] = found.speeds_P
    if found.holders_ME:
        fields["expert_holders"] = found.holders_ME
    return fields


def checkpoint_record(saved: Saved) -> dict[str, Any]:
    """Of a save that has ended."""
    return {
        "kind": "checkpoint",
        "step": saved.result.step,
        "checkpoint_ms": saved.waited_s * 1e3,
        "save_ms": saved.result.seconds * 1e3,
        "bytes": saved.result.bytes,
    }


def imbalance(load_E: Sequence[int]) -> float:
    """Load of the busiest expert over the mean; 1 = even, E = all on one."""
    total = sum(load_E)
    return max(load_E) * len(load_E) / total if total else 1.0


def eval_record(evaluation: Evaluation, *, step: int, eval_ms: float) -> dict[str, Any]:
    """With losses and loads of each source that has a name."""
    whole, similarities = evaluation.whole, evaluation.expert_similarity_M
    named = {name: result for name, result in evaluation.by_source.items() if name}
    record = {
        "kind": "eval",
        "step": step,
        "val_loss": whole.loss,
        "val_bits_per_byte": whole.bits_per_byte,
        "val_tokens": whole.tokens,
        "eval_ms": eval_ms,
        "expert_similarity": sum(similarities) / len(similarities) if similarities else 0.0,
        "expert_similarity_by_layer": similarities,
    }
    if errors := evaluation.codec_error_M:
        record |= {"codec_error": sum(errors) / len(errors), "codec_error_by_layer": errors}
    if named:
        loads = [evaluation.load_by_source[name] for name in named]
        divergences = [divergence(of_layer) for of_layer in zip(*loads, strict=True)]
        record |= {
            "val_loss_by_source": {name: result.loss for name, result in named.items()},
            "val_bits_per_byte_by_source": {n: one.bits_per_byte for n, one in named.items()},
            "source_divergence": sum(divergences) / len(divergences) if divergences else 0.0,
            "source_divergence_by_layer": divergences,
            "load_by_source": dict(zip(named, loads, strict=True)),
        }
    return record


def eval_summary(last_eval: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json says of the last evaluation; null before the first."""
    keys = ("val_loss", "val_bits_per_byte", "val_loss_by_source")
    return {key: last_eval.get(key) for key in keys if key in last_eval or "source" not in key}
