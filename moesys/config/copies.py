"""How many copies of experts a rank may hold, where memory decides (Hecate's m, 2502.02581). Pure."""

from bisect import bisect_right
from dataclasses import replace

from moesys.config.errors import ConfigError, Problem
from moesys.config.memory import GIB, plan_memory
from moesys.config.schema import RunConfig
from moesys.parallel.dims import ParallelDims


def with_copies(
    config: RunConfig, dims: ParallelDims, gpu_memory_gib: float | None, expert_load: float = 1.0
) -> RunConfig:
    """The configuration, one without problems, with a number for `placement.copies` where it has none and one is read: the most
    with which all ranks fit GPUs of so much memory, at most as many as a layer has beside a rank's own. At least 1, and
    `placement.spare`: whether that fits is for `memory_problems` to say.

    Raises:
        ConfigError: the memory is not known.
    """
    placement = config.placement
    if placement.copies is not None or not placement.makes_copies or dims.ep == 1:
        return config
    if gpu_memory_gib is None:
        raise ConfigError(
            [
                Problem(
                    key="placement.copies",
                    given=None,
                    rule="is as many as the memory of a GPU allows, which is not known",
                    fix="use a number, e.g. 2, or say the memory: cluster.gpu_memory_gib of a cluster, "
                    "--gpu-memory-gib of moesys config memory",
                )
            ]
        )

    def with_number(copies: int) -> RunConfig:
        return replace(config, placement=replace(placement, copies=copies))

    def needed(copies: int) -> int:
        stages = plan_memory(with_number(copies), dims, expert_load)
        return max(stage.total for stage in stages)

    layers = (config.model.moe_of(layer).num_experts for layer in config.model.moe_layers)
    experts, least = max(layers, default=0), max(1, placement.spare)
    numbers = range(least, max(least, experts - experts // dims.ep) + 1)
    fitting = bisect_right(numbers, gpu_memory_gib * GIB, key=needed)
    return with_number(numbers[max(fitting, 1) - 1])
