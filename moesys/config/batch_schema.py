"""The section `batch` of schema.py: what a step's sequences are, and which ranks work on which. Standard library only."""

from dataclasses import dataclass
from typing import Literal

BatchPolicy = Literal["samples", "naive", "static", "sorted", "karmarkar_karp", "flexsp", "hdp"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """All but the policy are read where sequences are documents (docs/batches.md)."""

    policy: BatchPolicy = "samples"
    """samples = every data.seq_len tokens of the text, as many for each data rank. All others: documents, whole, each on as many
    data ranks as the policy plans: hdp = any number of them, such that all have as much work (ByteScale, 2502.21231); naive = as
    few as have memory, in turn; static = all of a group that has memory for data.seq_len; sorted, karmarkar_karp = that, balanced;
    flexsp = groups of powers of two, by a mixed-integer program (2412.01523; needs scipy)."""
    long_documents: Literal["cut", "skip", "refuse"] = "cut"
    """With more than data.seq_len tokens: cut = several sequences of them."""
    empty_documents: Literal["skip", "refuse"] = "skip"
    """With fewer than two tokens, so no target."""
    costs: Literal["measured", "formula"] = "measured"
    """By which plans are made: measured = as pieces are timed at the start (kept in the run's folder); formula = by FLOPs alone,
    the same on any machine."""
    plan_ahead_steps: int = 2
    """Plans that another process makes before they are needed; 0 = each when it is needed, in this one."""

    @property
    def is_planned(self) -> bool:
        """Whether sequences are documents."""
        return self.policy != "samples"
