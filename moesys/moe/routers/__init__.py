"""Routers: each decides, per token, which experts serve it and with what weight."""

from moesys.moe.routers.topk import TopKRouter

__all__ = ["TopKRouter"]
