"""Tests marked `gpu` are skipped where torch sees no GPU; fixtures that several rooms share."""

import hypothesis
import pytest

hypothesis.settings.register_profile("moesys", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("moesys")
pytest_plugins = ["tests.tiny_data", "tests.launch.slurm"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
