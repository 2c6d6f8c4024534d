"""config.json of Mixtral and Qwen3-MoE beside our ModelConfig, both ways. What one cannot express is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesys.checkpoint.errors import itemize
from moesys.checkpoint.hf_names import Family
from moesys.config.schema import ModelConfig

TOPK_ROUTER = "moesys.moe.routers.TopKRouter"

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_ARCHITECTURES: dict[Family, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): name a folder with config.json"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object: name a Hugging Face model folder")
    return data


def family_of(hf: Mapping[str, Any]) -> Family:
    """Which of the two a config.json is of."""
    match hf.get("model_type"):
        case "mixtral":
            return "mixtral"
        case "qwen3_moe":
            return "qwen3_moe"
        case other:
            raise ValueError(f"config.json: model_type={other!r} must be mixtral or qwen3_moe")


def model_config_from_hf(folder: Path) -> dict[str, Any]:
    """The `model` section of a configuration for the checkpoint in `folder`, with a TopKRouter.

    Raises:
        ValueError: every setting that this model cannot express, and every one that is missing.
    """
    hf = read_hf_config(folder)
    family = family_of(hf)
    missing: list[str] = []

    def get(*names: str) -> Any:
        """The first of several spellings."""
        for name in names:
            if name in hf:
                return hf[name]
        missing.append(names[0])
        return 0

    model: dict[str, Any] = {ours: get(theirs) for ours, theirs in _SIZES.items()}
    model |= {
        "num_dense_layers": 0,
        "head_dim": hf.get("head_dim"),
        "rope_theta": float(
            (hf.get("rope_parameters") or {}).get("rope_theta") or get("rope_theta")
        ),
        "qk_norm": family == "qwen3_moe",
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "init_std": hf.get("initializer_range", 0.02),
        "moe": {
            "num_experts": get("num_local_experts", "num_experts"),
            "top_k": get("num_experts_per_tok"),
            "d_expert": get(
                "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
            ),
            "router": {
                "_target_": TOPK_ROUTER,
                "score_function": "softmax",
                "normalize_weights": family == "mixtral" or get("norm_topk_prob"),
            },
        },
    }
    problems = [f"{name} is missing" for name in dict.fromkeys(missing)]
    problems += _unsupported(hf, family)
    if family == "qwen3_moe" and not missing:
        dense = _dense_layers(hf)
        model["num_dense_layers"] = len(dense)
        if dense != list(range(len(dense))):
            problems.append(f"dense layers {dense} must be the first ones")
    if problems:
        raise ValueError(itemize(f"{folder / 'config.json'} cannot be expressed here", problems))
    return model


def _unsupported(hf: Mapping[str, Any], family: Family) -> list[str]:
    problems = []
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        problems.append(f"rope_type={rope_type!r} must be 'default'")
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={hf['hidden_act']!r} must be 'silu'")
    if hf.get("attention_bias", False):
        problems.append("attention_bias=true must be false")
    if hf.get("quantization_config"):
        problems.append("quantization_config must be absent: convert to bf16 first")
    windowed = family == "mixtral" or hf.get("use_sliding_window", False)
    if windowed and hf.get("sliding_window") is not None:
        problems.append(
            f"sliding_window={hf['sliding_window']} must be null: attention here is full"
        )
    return problems


def _dense_layers(hf: Mapping[str, Any]) -> list[int]:
    every = hf.get("decoder_sparse_step", 1)
    only = hf.get("mlp_only_layers") or []
    return [i for i in range(hf["num_hidden_layers"]) if i in only or (i + 1) % every != 0]


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for a model of `config` saved in `dtype`: Qwen3-MoE with qk_norm, else Mixtral.

    Raises:
        ValueError: every key that neither can express.
    """
    moe, family = config.moe, family_for(config)
    options = {"score_function": "softmax", "normalize_weights": True, "scaling_factor": 1.0}
    options |= moe.router.options
    problems = []
    if config.attention_experts > 1:
        problems.append(f"model.attention_experts={config.attention_experts} must be 1")
    if memory := list(config.memory_layers.layers):
        problems.append(f"model.memory_layers.layers={memory} must be []")
    if moe.num_shared_experts:
        problems.append(f"model.moe.num_shared_experts={moe.num_shared_experts} must be 0")
    for name in ("zero_experts", "copy_experts", "constant_experts"):
        if number := getattr(moe, name):
            problems.append(f"model.moe.{name}={number} must be 0")
    if moe.experts_by_layer is not None:
        problems.append(f"model.moe.experts_by_layer={list(moe.experts_by_layer)} must be null")
    if moe.expert_widths is not None:
        problems.append(f"model.moe.expert_widths={list(moe.expert_widths)} must be null")
    if moe.d_latent is not None:
        problems.append(f"model.moe.d_latent={moe.d_latent} must be null")
    if not is_topk_router(moe.router.target):
        problems.append(f"model.moe.router._target_={moe.router.target} must be {TOPK_ROUTER}")
    for name, want in (("score_function", "softmax"), ("scaling_factor", 1.0)):
        if options[name] != want:
            problems.append(f"model.moe.router.{name}={options[name]} must be {want}")
    if family == "mixtral" and not options["normalize_weights"]:
        problems.append("model.moe.router.normalize_weights=false needs model.qk_norm=true")
    if family == "mixtral" and config.num_dense_layers:
        problems.append(
            f"model.num_dense_layers={config.num_dense_layers} must be 0 or model.qk_norm=true"
        )
    if problems:
        name = _ARCHITECTURES[family]
        raise ValueError(itemize(f"a {name} cannot express this model", problems))

    hf = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    hf |= {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "torch_dtype": dtype,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        # Both spellings: transformers 4 reads the first, 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts_per_tok": moe.top_k,
        # The families' defaults name tokens of their own tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "mixtral":
        return hf | {"num_local_experts": moe.num_experts, "intermediate_size": moe.d_expert}
    return hf | {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": options["normalize_weights"],
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.num_dense_layers)),
    }


def family_for(config: ModelConfig) -> Family:
    """The family that a model of `config` is exported as."""
    return "qwen3_moe" if config.qk_norm else "mixtral"


def is_topk_router(target: str) -> bool:
    return target in (TOPK_ROUTER, "moesys.moe.routers.topk.TopKRouter")
