"""When copies of experts set out, and their gradients: while experts of the layer beside theirs compute."""

from dataclasses import replace
from functools import partial

import pytest

from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import RunConfig
from moesys.moe.copy_set import CopySet
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from tests.train.test_placement import spread


def _order(rank: int, size: int, run_config: RunConfig) -> list[str]:
    """What a second step begins and ends, by MoE layer."""
    run = SmallRun(run_config, size)
    run.step()
    seen: list[str] = []
    names = {id(layer.experts): str(i) for i, layer in enumerate(run.model.moe_layers())}
    for word in ("begin", "wait", "send_gradients", "advance", "settle"):
        _log(CopySet, word, names, seen)
    for place, layer in enumerate(run.model.moe_layers()):
        told = partial(seen.append, f"route {place}")
        layer.router.register_forward_pre_hook(lambda *_, told=told: told())
    run.step()
    return seen


def _log(owner: type, word: str, names: dict[int, str], seen: list[str]) -> None:
    method = getattr(owner, word)

    def logged(self: CopySet) -> object:
        gathers, has_reduces = len(self._gathers), bool(self._reduces)
        told = method(self)
        if len(self._gathers) > gathers or (word != "begin" and has_reduces):
            seen.append(f"{word} {names[id(self.experts)]}")
        elif word == "send_gradients" and self._reduces:
            seen.append(f"reduce {names[id(self.experts)]}")
        return told

    setattr(owner, word, logged)


@pytest.mark.parametrize("release", [False, True])
def test_copies_and_gradients_set_out_under_the_experts_of_the_layer_beside_theirs(
    release: bool,
) -> None:
    placed = PlacementConfig(policy="hecate", copies=1, release=release)
    config = spread(placed)
    config = replace(config, model=replace(config.model, num_layers=4, num_dense_layers=1))
    for seen in run_ranks(_order, 4, with_micro_steps(config, 4, 1)):
        forward = [event for event in seen if event.startswith(("begin", "route"))]
        assert forward[:6] == ["begin 0", "route 0", "begin 1", "route 1", "begin 2", "route 2"]
        home = [event for event in seen if event.startswith(("reduce", "advance", "settle"))]
        assert home[:3] == ["reduce 2", "advance 2", "reduce 1"]
        assert home[3:6] == ["settle 2", "advance 1", "reduce 0"]
