"""One long run and its page, for the tests that only look at them."""

from pathlib import Path

import pytest

from tests.report.page_reader import Page, page_of
from tests.report.synthetic_run import write_run


@pytest.fixture(scope="package")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("full") / "tiny", steps=600)


@pytest.fixture(scope="package")
def full_page(full_run: Path) -> Page:
    return page_of(full_run)
