"""Routers: each decides, per token, which experts serve it and with what weight."""

from moesys.moe.routers.cosine import CosineRouter
from moesys.moe.routers.expert_choice import ExpertChoiceRouter
from moesys.moe.routers.forced import RoundRobinRouter, ZipfRouter
from moesys.moe.routers.grouped import GroupLimitedRouter
from moesys.moe.routers.hash import HashRouter
from moesys.moe.routers.load_replay import LoadReplayRouter
from moesys.moe.routers.noisy import NoisyTopKRouter, SwitchRouter
from moesys.moe.routers.pregated import PreGatedRouter
from moesys.moe.routers.recurrent import RecurrentRouter
from moesys.moe.routers.relu import ReLURouter
from moesys.moe.routers.replay import ReplayRouter
from moesys.moe.routers.soft import SoftRouter
from moesys.moe.routers.topk import TopKRouter

__all__ = [
    "CosineRouter",
    "ExpertChoiceRouter",
    "GroupLimitedRouter",
    "HashRouter",
    "LoadReplayRouter",
    "NoisyTopKRouter",
    "PreGatedRouter",
    "ReLURouter",
    "RecurrentRouter",
    "ReplayRouter",
    "RoundRobinRouter",
    "SoftRouter",
    "SwitchRouter",
    "TopKRouter",
    "ZipfRouter",
]
