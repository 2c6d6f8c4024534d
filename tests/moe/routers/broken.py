"""Routers that break the contract, each in one way."""

from dataclasses import replace

import torch

from moesys.moe.routers import TopKRouter


class OutOfRange(TopKRouter):
    def forward(self, x_TD, state=None):
        result = super().forward(x_TD, state)
        return replace(result, topk_ids_TK=result.topk_ids_TK + 3)


class NotANumber(TopKRouter):
    def logits(self, x_TD):
        return super().logits(x_TD) / 0.0 * 0.0


class WrongShape(TopKRouter):
    def forward(self, x_TD, state=None):
        result = super().forward(x_TD, state)
        return replace(result, probs_TE=result.probs_TE[:, :-1])


class Detached(TopKRouter):
    def forward(self, x_TD, state=None):
        result = super().forward(x_TD, state)
        return replace(result, topk_weights_TK=result.topk_weights_TK.detach())


class NoState(TopKRouter):
    def forward(self, x_TD):
        return super().forward(x_TD)


class Fails(TopKRouter):
    def forward(self, x_TD, state=None):
        return torch.zeros(2) @ torch.zeros(3)
