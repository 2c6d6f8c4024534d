"""The rules of train.offload_ratio. Pure."""

from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.errors import Problem
from moesys.config.schema import RunConfig
from moesys.plan.pipeline import SPLITS_BACKWARD

_KEY = "train.offload_ratio"


def find_offload_problems(config: RunConfig) -> Iterator[Problem]:
    """Values out of range, and what offload does not go with."""
    ratio, parallel = config.train.offload_ratio, config.parallel
    if ratio is not None:
        yield from in_range(_KEY, ratio, 0.0, at_most=1.0)
    if ratio == 0:
        return
    refused = [
        (
            parallel.pp > 1 and parallel.pp_schedule in SPLITS_BACKWARD,
            "brings back what a backward reads until that is through, and "
            f"parallel.pp_schedule={parallel.pp_schedule} does half of it much later",
            "use parallel.pp_schedule=1f1b, interleaved or gpipe",
        ),
        (
            config.placement.makes_copies,
            f"leaves weights where they are, and placement.policy={config.placement.policy} has some that come and go",
            "use placement=fixed",
        ),
    ]
    for is_so, rule, fix in refused:
        if is_so:
            yield Problem(key=_KEY, given=ratio, rule=rule, fix=f"{fix}, or {_KEY}=0")


def offload_warnings(config: RunConfig) -> Iterator[str]:
    """An option that saves nothing."""
    ratio, layers = config.train.offload_ratio, config.model.total_layers
    if ratio != 0 and config.parallel.pp == 1 and layers < 3:
        given = "null" if ratio is None else ratio
        yield f"{_KEY}={given} saves no memory with {layers} layers: while one computes another is on its way"
