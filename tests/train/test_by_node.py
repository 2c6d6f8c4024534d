"""Training whose rows travel by way of nodes: in two steps the flat exchange's numbers bit for bit, once for a node nearly so."""

from dataclasses import replace

import pytest

from moesys.config.dispatch_schema import DispatchConfig, Exchange
from moesys.config.schema import ComponentConfig, RunConfig
from moesys.parallel.exchange import Traffic
from moesys.testing.parity import Numbers, compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from tests.train.coded import INT8, LSH, assert_equal, config

HIERARCHICAL = DispatchConfig(exchange="hierarchical", ranks_per_node=2)
ONCE = DispatchConfig(exchange="deduplicated", ranks_per_node=2)


def spread(dispatch: DispatchConfig, recompute="none", **degrees: int) -> RunConfig:
    return config(dispatch, recompute, **{"ep": 4} | degrees)


@pytest.fixture(scope="module")
def flat() -> list[Numbers]:
    return parity(spread(DispatchConfig(ranks_per_node=2)), 4, micro_steps=2)


def bytes_of(numbers: list[Numbers]) -> tuple[int, int]:
    """Of all ranks, in the first step: sent, and between nodes."""
    first = numbers[0].results[0]
    return first.sent_bytes, first.between_nodes_bytes


@pytest.mark.parametrize("recompute", ["none", pytest.param("layer", marks=pytest.mark.parity)])
def test_two_steps_are_the_flat_exchange_bit_for_bit(recompute, flat) -> None:
    expected = flat
    if recompute != "none":
        expected = parity(spread(DispatchConfig(), recompute), 4, micro_steps=2)
    found = parity(spread(HIERARCHICAL, recompute), 4, micro_steps=2)
    assert_equal(found, expected)
    if recompute == "none":
        (ours, ours_between), (theirs, theirs_between) = bytes_of(found), bytes_of(flat)
        assert ours_between == theirs_between
        assert ours > theirs, "what is for other nodes travels inside too"


def _sent(rank: int, size: int, run_config: RunConfig) -> tuple[list[int], int]:
    """Between nodes in a step: as all ranks are told, and by this rank's own meters."""
    run = SmallRun(with_micro_steps(run_config, size, 2), size)
    read, own = run.train_step.read_exchange_meters, []

    def watched() -> Traffic:
        own.append(read())
        return own[-1]

    run.train_step.read_exchange_meters = watched  # type: ignore[method-assign]
    told = run.step().between_nodes_bytes_N
    return told, sum(traffic.between_nodes_bytes for traffic in own)


@pytest.mark.parametrize("exchange", ["flat", "hierarchical", "deduplicated"])
def test_each_node_is_told_what_its_ranks_sent(exchange: Exchange) -> None:
    ranks = run_ranks(_sent, 4, spread(DispatchConfig(exchange=exchange, ranks_per_node=2)))
    own = [sent for _, sent in ranks]
    expected = [own[0] + own[1], own[2] + own[3]]
    if exchange == "flat":
        assert expected != [own[0] + own[2], own[1] + own[3]], "else any order would do"
    assert [told for told, _ in ranks] == [expected] * 4


@pytest.mark.parametrize(
    "codec",
    [pytest.param(None, id="int8"), pytest.param(LSH, marks=pytest.mark.parity, id="lsh+int8")],
)
def test_two_steps_write_rows_once(codec: ComponentConfig | None) -> None:
    """In few bits, and read once: bit for bit again, also where fewer travel, and the same bytes between nodes."""
    how = DispatchConfig(codec=codec, wire=INT8, ranks_per_node=2)
    expected = parity(spread(how), 4, micro_steps=2)
    found = parity(spread(replace(how, exchange="hierarchical")), 4, micro_steps=2)
    assert_equal(found, expected)
    assert bytes_of(found)[1] == bytes_of(expected)[1]


def test_once_for_a_node_takes_rows_of_a_codec() -> None:
    expected = parity(spread(DispatchConfig(codec=LSH)), 4, micro_steps=2)[0]
    difference = compare(parity(spread(replace(ONCE, codec=LSH)), 4, micro_steps=2), expected)
    assert not difference.missing
    assert difference.worst < 1e-5


@pytest.mark.parametrize(
    "recompute", ["none", *(pytest.param(r, marks=pytest.mark.parity) for r in ("moe", "layer"))]
)
def test_once_for_a_node_trains_with_the_flat_numbers(recompute, flat) -> None:
    found = parity(spread(ONCE, recompute), 4, micro_steps=2)
    difference = compare(found, flat[0])
    assert not difference.missing
    assert difference.figures < 1e-5
    assert difference.gradients < 1e-5
    if recompute == "none":
        assert bytes_of(found)[1] < bytes_of(flat)[1]


@pytest.mark.parity
@pytest.mark.parametrize("dispatch", [HIERARCHICAL, ONCE], ids=["two steps", "once"])
@pytest.mark.parametrize(
    ("size", "degrees"),
    [(8, {"pp": 2}), (8, {"etp": 2}), (4, {"tp": 2}), (4, {"cp": 2}), (4, {"zero": 3})],
    ids=str,
)
def test_other_axes_find_the_same(dispatch, size, degrees) -> None:
    per_node = 4 if "etp" in degrees else 2
    found = parity(
        spread(replace(dispatch, ranks_per_node=per_node), **degrees), size, micro_steps=2
    )
    if dispatch is HIERARCHICAL:
        assert_equal(found, parity(spread(DispatchConfig(), **degrees), size, micro_steps=2))
        return
    one_process = parity(spread(DispatchConfig(), ep=1), 1, micro_steps=2)[0]
    difference = compare(found, one_process)
    assert not difference.missing
    assert difference.worst < 1e-5
