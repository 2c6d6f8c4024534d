"""How many slots of real tokens each expert gets in forwards that are not training: a layer's own counters stay as they are.

Shapes: T tokens on this rank, E experts, K experts per token, M MoE layers.
"""

from collections.abc import Mapping

from torch import Tensor

from moesys.moe.layer import MoELayer
from moesys.moe.listening import Listening
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Known
from moesys.ops import tokens_per_expert


class VisitCounter(Listening):
    """While open, adds the slots that routers give, before anything is dropped, to the counts that it was told."""

    def __init__(self, layers: Mapping[int, MoELayer]) -> None:
        """`layers` of this rank by their place among all MoE layers."""
        super().__init__(layers, self._add)
        self._counts_ME: Tensor | None = None
        self._is_real_T: Tensor | None = None

    def count_into(self, counts_ME: Tensor, is_real_BS: Tensor) -> None:
        """Where the next forward's slots go, int64, and which of its tokens are no padding, bool, on the device."""
        self._counts_ME, self._is_real_T = counts_ME, is_real_BS.flatten()

    def _add(self, at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        assert self._counts_ME is not None
        assert self._is_real_T is not None
        ids_TK = visited(routed, layer.config.top_k)
        is_real_T = layer.share.own_run(self._is_real_T, len(ids_TK))
        real_TK = ids_TK.masked_fill(~is_real_T[:, None], -1)
        number = layer.config.num_choices
        self._counts_ME[at, :number] += tokens_per_expert(real_TK, number)


def slots(routed: RoutingResult) -> Tensor:
    """How many slots each expert has, int64 [E]."""
    return tokens_per_expert(routed.topk_ids_TK, routed.logits_TE.shape[1])


def visited(routed: RoutingResult, top_k: int) -> Tensor:
    """The experts of each token, int64 [T, K], -1 = none; of a blend, where all see all, the top_k of largest share."""
    if routed.blend is None:
        return routed.topk_ids_TK
    return routed.probs_TE.topk(top_k, dim=-1).indices
