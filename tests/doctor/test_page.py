"""docs/doctor.md says what the code says."""

from moesys.doctor import conclusion, gemm, links
from tests.doctor.page import PAGE, filled


def test_the_tables_are_those_of_the_code() -> None:
    assert PAGE.read_text() == filled(PAGE.read_text()), "run python -m tests.doctor.page"


def test_the_figures_are_those_of_the_code() -> None:
    page = " ".join(PAGE.read_text().split())
    for said in (
        f"fails if that takes {conclusion.LINK_FACTOR:g} times the median's",
        f"quickest round trip takes {conclusion.LATENCY_FACTOR:g} times the median's",
        f"in {gemm.NUM_TRIES} tries",
        f"takes {conclusion.PRODUCT_FACTOR:g} times the median in *each* try",
        f"The best of {links.NUM_EXCHANGES} counts",
        f"(at most {links.MAX_ROUNDS}; {links.QUICK_MAX_ROUNDS} with `--quick`",
    ):
        assert said in page, said
