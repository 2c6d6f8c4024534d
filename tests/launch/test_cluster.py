"""configs/cluster: every file is read, changes on the command line hold, and all that is wrong comes at once."""

from pathlib import Path

import pytest

from moesys.config.build import leaf_types
from moesys.config.compose import compose, group_options, search_path
from moesys.config.errors import ConfigError
from moesys.launch.cluster import ClusterConfig, read_cluster

FOLDERS = search_path(None)
NAMES = sorted(path.stem for path in (FOLDERS[0] / "cluster").glob("*.yaml"))


def problems(*changes: str, name: str = "local") -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_cluster(name, changes, FOLDERS)
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_a_cluster_and_says_every_key(name: str) -> None:
    cluster = read_cluster(name, [], FOLDERS)
    assert cluster.ranks_per_node >= 1
    text = (FOLDERS[0] / "cluster" / f"{name}.yaml").read_text()
    for key in leaf_types(ClusterConfig):
        assert f"{key.rpartition('.')[2]}: " in text, key


def test_changes_are_read_as_yaml() -> None:
    changes = [
        "cluster.partition=debug",
        "cluster.grace_s=90",
        "cluster.setup=[a b, 'c: d']",
        'cluster.env={A: "1"}',
        "cluster.container.mounts=[/a:/b]",
        "cluster.account=null",
    ]
    cluster = read_cluster("local", changes, FOLDERS)
    assert (cluster.partition, cluster.grace_s, cluster.account) == ("debug", 90, None)
    assert cluster.setup == ("a b", "c: d")
    assert dict(cluster.env) == {"A": "1"}
    assert cluster.container.mounts == ("/a:/b",)


def test_a_folder_of_the_users_comes_first(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("name: mine\nranks_per_node: 3\n")
    cluster = read_cluster("mine", [], [*FOLDERS, tmp_path])
    assert (cluster.name, cluster.ranks_per_node) == ("mine", 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.partitio=p", "did you mean cluster.partition?"),
        ("cluster", "must be cluster.KEY=VALUE"),
        ("cluster.restarts=-1", "cluster.restarts=-1 must be at least 0"),
        ("cluster.grace_s=5", "cluster.grace_s=5 must be at least 10 and below 65536"),
        ("cluster.ranks_per_node=0", "must be at least 1"),
        ("cluster.ranks_per_node=two", "must be an integer"),
        ("cluster.gpus_per_node=1", "ranks_per_node=2 must be at most cluster.gpus_per_node=1"),
        ("cluster.gpu_memory_gib=80", "has no effect with cluster.gpus_per_node=0"),
        ("cluster.memory_gib_per_node=-1", "must be at least 0"),
        ("cluster.time_limit=soon", "must be a time of sbatch"),
        ("cluster.partition='a b'", "must be a word"),
        ("cluster.rails=[mlx5_0, '; rm']", "cluster.rails='; rm' must be a word"),
        ("cluster.modules=gcc", "must be a list of texts"),
        ("cluster.env={A: 1}", "must be texts by name"),
        ('cluster.env={"A B": "1"}', "cluster.env='A B' must be a word"),
        ('cluster.setup=["a\\nb"]', "must be lines"),
        ("cluster.sbatch=[-p]", "must be a long option"),
        ("cluster.sbatch=[--signal=USR1]", "cluster.grace_s decides it"),
        ("cluster.container.runtime=docker", "must be one of none, pyxis, apptainer"),
        ("cluster.container.runtime=pyxis", "image is required"),
        ("cluster.container.image=a.sif", "has no effect"),
        ("cluster.container.mounts=[here]", "must be a word"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(change: str, message: str) -> None:
    (problem,) = problems(change)
    assert message in problem


def test_all_problems_come_at_once() -> None:
    assert len(problems("cluster.gpu_memory_gib=0", name="h100_pyxis")) == 1
    assert len(problems("cluster.x=1", "cluster.grace_s=a", "cluster.modules=3")) == 3
    assert "must be one of apptainer_ib, h100_pyxis, local: did you mean local?" in "".join(
        problems(name="locl")
    )


def test_a_cluster_is_no_part_of_a_run() -> None:
    assert "cluster" not in group_options()
    with pytest.raises(ConfigError, match="cluster"):
        compose(["cluster=local"])
