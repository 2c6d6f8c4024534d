"""One rank of a run as integers: its layers, tokens, parameters and groups, for formulas about it. Pure.

T tokens of a tensor-parallel group in one micro-batch (after cp), t = T / tp of them this rank's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moesys.config.schema import MoEConfig, RunConfig
from moesys.plan.parameters import (
    Parameter,
    block_parameters,
    outer_parameters,
    parameters_over_depth,
)
from moesys.plan.pipeline import stages_of_rank


@dataclass(frozen=True, kw_only=True)
class RankOfRun:
    """Its micro-batch is that of `config.train`."""

    config: RunConfig
    axes: Mapping[str, int]
    """Degrees, by the names of ParallelDims: those of both grids."""
    at: Mapping[str, int]
    """This rank's index along each."""
    stages: Sequence[Sequence[int]]
    """The layers of each pipeline stage, of all ranks."""

    @property
    def own_stages(self) -> list[int]:
        parallel = self.config.parallel
        if parallel.pp == 1:
            return [0]
        return stages_of_rank(
            parallel.pp_schedule, self.at["pp"], parallel.pp, parallel.pp_virtual_stages
        )

    @property
    def layers(self) -> list[int]:
        return [layer for stage in self.own_stages for layer in self.stages[stage]]

    @property
    def has_first(self) -> bool:
        return 0 in self.own_stages

    @property
    def has_last(self) -> bool:
        return len(self.stages) - 1 in self.own_stages

    def is_moe(self, layer: int) -> bool:
        return layer in self.config.model.moe_layers

    def has_memory(self, layer: int) -> bool:
        return layer in self.config.model.memory_layers.layers

    @property
    def moe_configs(self) -> list[MoEConfig]:
        """Of each MoE layer that is here."""
        return [self.config.model.moe_of(i) for i in self.layers if self.is_moe(i)]

    @property
    def dp(self) -> int:
        return self.axes["dp_replicate"] * self.axes["dp_shard"]

    @property
    def micro_steps(self) -> int:
        return self.config.train.micro_steps(self.dp)

    @property
    def tokens(self) -> int:
        """T."""
        return self.config.train.micro_batch_tokens // self.axes["cp"]

    @property
    def own_tokens(self) -> int:
        """t."""
        return self.tokens // self.axes["tp"]

    @property
    def width(self) -> int:
        """Bytes of the compute type."""
        return self.config.train.compute_bytes

    @property
    def world_size(self) -> int:
        return self.axes["pp"] * self.stage_size

    @property
    def stage_size(self) -> int:
        return self.dp * self.axes["cp"] * self.axes["tp"]

    def size(self, group: str) -> int:
        """Ranks of the group: an axis, or stage, replica, sequence, edp, ends, world as parallel/mesh.py has them."""
        axes = self.axes
        sizes = {
            **axes,
            "shard": axes["dp_shard"] * axes["cp"],
            "edp": axes["edp_replicate"] * axes["edp_shard"],
            "sequence": axes["cp"] * axes["tp"],
            "replica": self.dp * axes["cp"],
            "stage": self.stage_size,
            "ends": min(2, axes["pp"]),
            "world": self.world_size,
        }
        return sizes[group]

    @property
    def parameters(self) -> Iterator[Parameter]:
        """All that are here, before data ranks share them out."""
        for stage in self.own_stages:
            for unit in self.units(stage):
                yield from unit

    def units(self, stage: int) -> Iterator[list[Parameter]]:
        """The parameters of a stage that FSDP gathers together."""
        for layer in self.stages[stage]:
            yield from self.block_units(layer)
        yield from self.outer_units(stage)

    def outer_units(self, stage: int) -> Iterator[list[Parameter]]:
        """Of embedding, last norm and head, where the stage has them, and of what layers share."""
        model, last = self.config.model, stage == len(self.stages) - 1
        # In a V the last stage's table is the first's.
        has_table = stage == 0 or (last and model.has_two_tables and not self.has_first)
        outer = list(outer_parameters(model, self.axes, has_table, last))
        if model.has_two_tables:
            root = outer
        else:
            norm = [parameter for parameter in outer if len(parameter.shape) == 1]
            yield from ([parameter] for parameter in outer if parameter not in norm)
            root = norm
        if stage == self.own_stages[0]:  # the stages of a rank have one
            for unit in self._units(parameters_over_depth(self.config.model, self.axes)):
                if unit[0].is_expert:
                    yield unit
                else:
                    root = [*root, *unit]
        if root:
            yield root

    def block_units(self, layer: int) -> Iterator[list[Parameter]]:
        """Experts, then the rest."""
        return self._units(block_parameters(self.config.model, self.axes, layer))

    @staticmethod
    def _units(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
        parameters = list(parameters)
        for is_expert in (True, False):
            if unit := [p for p in parameters if p.is_expert is is_expert]:
                yield unit

    def shard_rank(self, parameter: Parameter) -> int:
        """This rank's place among those that `zero` shares the parameter out over."""
        if parameter.is_expert:
            return self.at["edp_shard"]
        return self.at["dp_shard"] * self.axes["cp"] + self.at["cp"]

    def num_shards(self, parameter: Parameter) -> int:
        """1 without `zero`."""
        return self.size("edp_shard" if parameter.is_expert else "shard")
