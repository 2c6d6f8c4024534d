"""The checks that import torch."""

from moesys.doctor import checkpoint, exchange, torch_build
from moesys.doctor.finding import Check

NODE_CHECKS: tuple[Check, ...] = (
    Check(name="compiled ops", limit_s=10.0, find=torch_build.ops),
    Check(name="GPUs and backends", limit_s=20.0, find=torch_build.gpus_and_backends),
)
"""What each node of a cluster looks at too; its ranks meet in earnest there."""

TORCH_CHECKS: tuple[Check, ...] = (
    *NODE_CHECKS,
    Check(name="checkpoint", limit_s=30.0, find=checkpoint.checkpoint),
    Check(name="exchange", limit_s=2 * exchange.LIMIT_S + 5.0, find=exchange.exchange),
)
