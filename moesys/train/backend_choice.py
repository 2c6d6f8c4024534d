"""Which expert backend a run computes with, kept in its folder from the first start on."""

import json

import torch

from moesys.parallelize.expert_backend import choose_expert_backend, set_expert_backend
from moesys.train.folder import write_text
from moesys.train.setup import Run


def choose_backend(run: Run, dtype: torch.dtype) -> dict[str, str]:
    """Set the model's backend; return its name and why, as the start record has them. Collective.

    What this run folder's first start measured on this layout is kept: another backend rounds differently.
    """
    config, path, dims = run.config, run.folder / "expert_backend.json", run.meshes.dims
    layout = [run.process.device.type, dims.ep, dims.etp]
    saved = json.loads(path.read_text()) if path.exists() else {}
    is_auto = config.model.moe.expert_backend == "auto"
    if is_auto and config.checkpoint.resume and saved.get("layout") == layout:
        backend, reason = saved["backend"], f"kept from {path.name}"
    elif not config.model.moe_layers:
        backend, reason = "grouped_mm", "no MoE layers"
    else:
        backend, reason = choose_expert_backend(
            config.model,
            run.meshes,
            micro_batch_tokens=config.train.micro_batch_tokens,
            dtype=dtype,
        )
    set_expert_backend(run.model, backend)
    if run.process.rank == 0 and is_auto:
        # All ranks have looked: choosing is collective.
        write_text(path, json.dumps({"backend": backend, "layout": layout}) + "\n")
    return {"expert_backend": backend, "expert_backend_reason": reason}
