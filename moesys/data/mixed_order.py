"""The endless order of samples of one source or several, and where a run stands in it.

An epoch of a source is a permutation of its samples (moesys.data.order); epochs follow each other without a gap, so a step may
straddle two. The mix (moesys.data.mix) says from which source each position of the common order reads.
"""

from collections.abc import Sequence
from typing import Any

from moesys.data.mix import Mix
from moesys.data.source import Source, SourceOrder

_SAME_DATA = "point data.path at the data the run began with, or start a new run"
_OTHER_SOURCES = "it was written with other data.sources: set them back, or start a new run"
_RESUME_FIX = {
    "dataset": _SAME_DATA,
    "num_tokens": _SAME_DATA,
    "sources": "set data.sources back, or start a new run",
    "seq_len": "set data.seq_len back, or start a new run",
    "seed": "set run.seed back, or start a new run",
    "shuffle": "set data.shuffle back, or start a new run",
    "long_documents": "set batch.long_documents back, or start a new run",
    "sequences": "set batch.policy back, to samples or from it, or start a new run",
}
_OF_SEQUENCES = ("sequences", "long_documents")


class MixedOrder:
    """Of which a loader reads position after position, whatever the number of ranks."""

    def __init__(
        self, sources: Sequence[Source], orders: Sequence[SourceOrder], facts: dict[str, Any]
    ) -> None:
        """`facts`: what the samples depend on beside the sources, by the name of its key."""
        self.sources = tuple(sources)
        self.orders = tuple(orders)
        """Of each source."""
        self.mix = Mix.of([source.weight for source in sources])
        """Whose weights may turn at any position that has not been read."""
        self.consumed_samples = 0
        """Samples read by all ranks together since the start of the run."""
        self._facts = facts

    def consumed_of_sources(self) -> dict[str, int]:
        """Of `consumed_samples` those of each source, by name."""
        counts = self.mix.counts_at(self.consumed_samples)
        return {source.name: count for source, count in zip(self.sources, counts, strict=True)}

    def turn_mix(self, weights: Sequence[float]) -> None:
        """Read with these weights, one for each source, from the next sample on."""
        self.mix = self.mix.turned(self.consumed_samples, weights)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in the order, and what the order depends on. Plain JSON values."""
        mix = {} if self._is_one else {"mix": self.mix.to_json()}
        return {"consumed_samples": self.consumed_samples, **self._identity(), **mix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state["consumed_samples"]` samples, with the mix that was read so far.

        The number of data ranks, the micro-batch and the global batch may differ from the run that saved it.

        Raises:
            ValueError: the saved run read other streams or another order; names every difference.
        """
        problems = []
        identity = self._identity()
        for key in _RESUME_FIX:
            if key in state and key not in identity and key != "sources":
                problems.append(f"the checkpoint has {key}={state[key]!r}: {_RESUME_FIX[key]}")
        for key, ours in identity.items():
            if key not in state:
                fix = _RESUME_FIX[key] if key in _OF_SEQUENCES else _OTHER_SOURCES
                problems.append(f"data state has no {key!r}: {fix}")
            elif state[key] != ours:
                fix = _RESUME_FIX[key.rpartition(".")[2]]
                problems.append(
                    f"{key} is {ours!r} here but {state[key]!r} in the checkpoint: {fix}"
                )
        consumed = state.get("consumed_samples")
        if isinstance(consumed, bool) or not isinstance(consumed, int) or consumed < 0:
            problems.append(f"consumed_samples must be an integer >= 0, is {consumed!r}")
        mix = self.mix
        if not self._is_one and not problems:
            try:
                mix = Mix.from_json(state.get("mix"), len(self.sources))
            except ValueError as error:
                problems.append(str(error))
        raise_problems(problems)
        assert isinstance(consumed, int)
        self.consumed_samples, self.mix = consumed, mix

    @property
    def _is_one(self) -> bool:
        """Whether there is nothing to mix: one source, without a name."""
        return [source.name for source in self.sources] == [""]

    def _identity(self) -> dict[str, Any]:
        facts = dict(self._facts)
        if not self._is_one:
            facts["sources"] = [source.name for source in self.sources]
        for source in self.sources:
            prefix = f"{source.name}." if source.name else ""
            facts[f"{prefix}dataset"] = source.tokens.fingerprint
            facts[f"{prefix}num_tokens"] = len(source.tokens)
        return facts


def raise_problems(problems: list[str]) -> None:
    """Raise ValueError with all of them, if there are any."""
    if problems:
        head = (
            "data loader: "
            if len(problems) == 1
            else f"data loader: {len(problems)} problems\n  - "
        )
        raise ValueError(head + "\n  - ".join(problems))
