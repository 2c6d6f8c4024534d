"""A small data folder, made by the real prep from this repository's own sources."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Silent:
    """Takes a prep's progress and says nothing."""

    def __getattr__(self, _):
        return lambda *args, **kwargs: None


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    # Here, because a machine that runs only the GPU tests may lack what prep needs.
    from moesys.data.prepare import prepare
    from moesys.data.recipe import PrepArguments

    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare(
        PrepArguments(
            inputs=(str(ROOT / "moesys"),),
            output=folder,
            include=("*.py",),
            vocab_size=512,
            val_fraction=0.1,
            workers=1,
        ),
        Silent(),
    )
    return folder
