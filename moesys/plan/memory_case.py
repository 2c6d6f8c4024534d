"""One rank of a run, as the formulas of its memory read it: tokens, layers of a kind, shards. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from moesys.config.schema import Recompute
from moesys.plan.activations import ActivationCase, block_bytes
from moesys.plan.in_flight import micro_batches_in_flight
from moesys.plan.parameters import Parameter
from moesys.plan.rank import RankOfRun

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MemoryCase(RankOfRun):
    """A rank, and what its bytes depend on besides. Routers are linear."""

    on_gpu: bool = True
    expert_load: float = 1.0
    """Rows that this rank's experts serve, as a multiple of the even share."""

    def __post_init__(self) -> None:
        assert self.micro_steps >= 1, "the batch is one that the rules accept"

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Micro-batches of each own stage."""
        parallel = self.config.parallel
        if parallel.pp == 1:
            return (1,)
        return micro_batches_in_flight(
            parallel.pp_schedule,
            self.at["pp"],
            parallel.pp,
            parallel.pp_virtual_stages,
            self.micro_steps,
        )

    def activations(self, layer: int, recompute: Recompute) -> ActivationCase:
        """Of a layer and one micro-batch, under that level."""
        parallel, moe = self.config.parallel, self.config.model.moe
        even = Fraction(self.own_tokens * moe.top_k * parallel.etp)
        return ActivationCase(
            model=self.config.model.all_as(layer),
            tokens=self.tokens,
            activation_bytes=self.config.train.compute_bytes,
            tp=parallel.tp,
            sequence_parallel=parallel.sequence_parallel,
            ep=parallel.ep,
            etp=parallel.etp,
            recompute=recompute,
            received_rows=round(even * Fraction(self._load)),
        )

    @property
    def _load(self) -> float:
        """A capacity bounds it; padded rows come in any case."""
        moe = self.config.model.moe
        if moe.capacity_factor is None:
            return self.expert_load
        if moe.capacity_policy == "pad":
            return moe.capacity_factor
        return min(self.expert_load, moe.capacity_factor)

    @property
    def norm_tokens(self) -> int:
        """Those that this rank norms and adds."""
        return self.own_tokens if self.config.parallel.sequence_parallel else self.tokens

    @property
    def residual_bytes(self) -> int:
        """The residual stream of one micro-batch."""
        return FP32 * self.norm_tokens * self.config.model.d_model

    def block_bytes(self, layer: int, recompute: Recompute) -> int:
        """What a layer keeps of one micro-batch."""
        return round(block_bytes(self.activations(layer, recompute), layer))

    @cached_property
    def first_alike(self) -> list[int]:
        """Of each layer the first one of its kind: dense, with a memory, or MoE of as many experts."""
        model = self.config.model
        layers = range(model.total_layers)
        experts = [model.moe_of(i).num_experts if self.is_moe(i) else 0 for i in layers]
        kinds = [(number, self.has_memory(i)) for i, number in zip(layers, experts, strict=True)]
        return [kinds.index(kind) for kind in kinds]

    def kinds(self, stage: int) -> Counter[int]:
        """How many of a stage's layers are of which kind, the first layer of which stands for it."""
        return Counter(self.first_alike[layer] for layer in self.stages[stage])

    def shard_bytes(self, parameter: Parameter) -> int:
        """fp32, of this rank's share."""
        if not self.config.parallel.zero:
            return FP32 * parameter.size
        return FP32 * parameter.shard_of(self.shard_rank(parameter), self.num_shards(parameter))

    def flat_bytes(self, unit: Sequence[Parameter]) -> int:
        """fp32, of what is gathered together, padded."""
        return FP32 * sum(p.padded_shard(n := self.num_shards(p)) * n for p in unit)

    @cached_property
    def blocks(self) -> list[tuple[int, list[list[Parameter]]]]:
        """(how many, units of one): blocks of a kind are equal, and there are many."""
        counts = Counter(self.first_alike[layer] for layer in self.layers)
        return [(count, [*self.block_units(layer)]) for layer, count in counts.items()]

    @cached_property
    def counted_units(self) -> list[tuple[int, list[Parameter]]]:
        """(how many, parameters that FSDP gathers together)."""
        outer = [(1, unit) for stage in self.own_stages for unit in self.outer_units(stage)]
        return [(count, unit) for count, units in self.blocks for unit in units] + outer

    def is_sharded(self, unit: Sequence[Parameter]) -> bool:
        """Whether FSDP has it: experts that may have copies lie whole on their owners."""
        return not (
            self.config.placement.makes_copies and self.axes["ep"] > 1 and unit[0].is_expert
        )

    @property
    def sharded_units(self) -> list[tuple[int, list[Parameter]]]:
        """Of the counted ones."""
        return [(count, unit) for count, unit in self.counted_units if self.is_sharded(unit)]

    @property
    def sharded_bytes(self) -> int:
        """fp32, of this rank's shares of these."""
        return sum(count * self.shard_bytes(p) for count, unit in self.sharded_units for p in unit)

    @property
    def counted_parameters(self) -> Iterator[tuple[int, Parameter]]:
        """(how many, one parameter) of all that are here."""
        for count, unit in self.counted_units:
            yield from ((count, parameter) for parameter in unit)

    @property
    def stored_bytes(self) -> int:
        """fp32, of this rank's shares of all parameters."""
        return sum(count * self.shard_bytes(p) for count, p in self.counted_parameters)
