"""A configuration for the ranks that there are: with train.elastic another layout where the given one does not fit."""

from moesys.config.errors import ConfigError, Problem
from moesys.config.layout import find_layout_problems
from moesys.config.pipeline import find_pipeline_problems
from moesys.config.schema import RunConfig
from moesys.plan.elastic import changes, elastic_layout


def fit_to_world(config: RunConfig, world_size: int) -> tuple[RunConfig, list[str]]:
    """The configuration to use on `world_size` ranks, the same on all, and a sentence if it is another one.

    Without train.elastic, and where it fits, `config` itself; `check` judges it.

    Raises:
        ConfigError: train.elastic, and no layout works: why the given one does not.
    """
    if not config.train.elastic or _is_allowed(config, world_size):
        return config, []
    found = elastic_layout(config, world_size, _is_allowed)
    if found is None:
        raise ConfigError(_problems(config, world_size))
    changed = ", ".join(changes(config, found))
    return found, [f"train.elastic: {world_size} ranks do not fit the layout, so {changed}"]


def _is_allowed(config: RunConfig, world_size: int) -> bool:
    return not _problems(config, world_size)


def _problems(config: RunConfig, world_size: int) -> list[Problem]:
    return [*find_layout_problems(config, world_size), *find_pipeline_problems(config, world_size)]
