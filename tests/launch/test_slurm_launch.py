"""`moesys launch` on a real Slurm: a run that is stopped, saved, requeued and goes on to its end."""

import json
import sys
import time
from pathlib import Path

import pytest

from moesys.launch.status import read_status
from tests.launch.slurm import SlurmCluster
from tests.launch.slurm_runs import WAIT_S, Moesys, state, steps, wait_for, words
from tests.train.launched import ROOT, overrides, records


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_is_stopped_requeued_and_done(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "it's a run"
    said = moesys(*words(run, tiny_data, "train.steps=60"))
    job_id = int(said.split("job ")[1].split()[0])
    wait_for(run, lambda: len(steps(run)) > 2)
    # What the time limit sends to the batch script.
    slurm.run("scancel", "--signal=USR2", "--batch", str(job_id))
    status = wait_for(run, lambda: state(run) == "requeued")
    assert status is not None
    assert status.job_id == str(job_id)
    assert list((run / "checkpoints").glob("step_*"))
    stopped = steps(run)[-1]
    assert stopped < 60

    assert f"as job {job_id}: wait for it" in moesys(*words(run, tiny_data), code=2)
    (row,) = json.loads(moesys("runs", "list", tmp_path, "--json"))
    assert (row["name"], row["job_id"], row["steps"]) == (run.name, str(job_id), 60)
    assert row["state"] in ("requeued", "running", "done")
    assert moesys("runs", "tail", run).endswith(": done\n")
    done = read_status(run)
    assert done is not None
    assert (done.attempt, done.job_id) == (2, str(job_id))
    assert steps(run) == list(range(1, 61))
    job = slurm.wait(job_id, "COMPLETED")
    assert (job["Restarts"], job["NumNodes"], job["NumTasks"]) == ("1", "2", "4")
    first, second = records(run, "start")
    for start in (first, second):
        assert 0 <= start["created_unix_s"] - start["submitted_unix_s"] < WAIT_S
    assert second["submitted_unix_s"] > first["created_unix_s"]
    # From the snapshot, not from the tree.
    assert (run / "code" / "moesys" / "train" / "job.py").is_file()


def test_what_slurm_would_refuse_is_refused_first(
    moesys: Moesys, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = moesys(*words(run, tiny_data), "cluster.partition=q", code=2)
    assert "cluster.partition='q' must be one of p: choose from p" in said
    said = moesys(*words(run, tiny_data), "nodes=8", "train.global_batch_tokens=2048", code=2)
    assert "nodes=8 must be at most the 4 nodes of partition p" in said
    said = moesys(*words(run, tiny_data), "cluster.sbatch=[--constraint=gold]", code=2)
    assert "sbatch: " in said
    assert "nvalid feature" in said
    assert read_status(run) is None


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_cancelled_run_saves_and_stays_away_until_it_is_submitted_again(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    moesys(*words(run, tiny_data, "train.steps=60"))
    wait_for(run, lambda: len(steps(run)) > 2)
    assert "saves and ends" in moesys("runs", "cancel", run)
    status = wait_for(run, lambda: state(run) == "failed")
    assert status is not None
    assert status.reason == "cancelled, saved: moesys runs resubmit goes on"
    assert status.job_id is not None
    slurm.wait(int(status.job_id), "FAILED")
    stopped = steps(run)[-1]
    moesys("runs", "resubmit", run)
    assert moesys("runs", "tail", run).endswith(": done\n")
    assert stopped < 60
    assert steps(run) == list(range(1, 61))


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_what_a_run_could_not_say_slurm_does(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    """A hard scancel, before it ran and while it ran; the batch script is killed with the ranks."""
    waiting, running = tmp_path / "waiting", tmp_path / "running"
    whole = ["nodes=4", "cluster.sbatch=[--exclusive]", "train.global_batch_tokens=1024"]
    moesys(*words(running, tiny_data, "train.steps=1000"), *whole)
    wait_for(running, lambda: len(steps(running)) > 2)
    moesys(*words(waiting, tiny_data))
    assert state(waiting) == "queued"
    slurm.run("scancel", str(read_status(waiting).job_id))  # type: ignore[union-attr]
    slurm.run("scancel", "--signal=KILL", "--full", str(read_status(running).job_id))  # type: ignore[union-attr]
    deadline = time.monotonic() + WAIT_S
    while True:
        rows = json.loads(moesys("runs", "list", tmp_path, "--json"))
        if {row["state"] for row in rows} == {"failed"}:
            break
        assert time.monotonic() < deadline, rows
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["waiting"] == "cancelled"
    # A rank may live long enough to see another one die.
    assert reasons["running"] == "cancelled" or reasons["running"].startswith("rank ")


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_sweep_is_one_array_and_each_task_can_be_submitted_again(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    mine = words(tmp_path, tiny_data, "train.steps=6")
    mine[-1] = f"run.dir={tmp_path}/${{run.name}}"
    said = moesys(*mine, "nodes=1", "--sweep", "optim.lr=1e-3,3e-3")
    assert said.count("follow it") == 2
    for number, lr in enumerate((1e-3, 3e-3)):
        run = tmp_path / f"quickstart-{number}"
        assert moesys("runs", "tail", run).endswith(": done\n")
        assert f"lr: {lr}" in (run / "config.yaml").read_text()
        status = read_status(run)
        assert status is not None
        assert str(status.job_id).endswith(f"_{number}")
        assert steps(run) == list(range(1, 7))
    moesys("runs", "resubmit", tmp_path / "quickstart-1")
    assert moesys("runs", "tail", tmp_path / "quickstart-1").endswith(": done\n")


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_two_kinds_of_nodes_are_one_world(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mine = [word.replace("cluster=local", "cluster=local+local") for word in words(run, tiny_data)]
    moesys(*mine, "nodes=1+1", "train.steps=6")
    assert moesys("runs", "tail", run).endswith(": done\n")
    assert steps(run) == list(range(1, 7))


@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["train", "array", "hetero"])
def test_the_scripts_that_are_submitted_by_hand(
    name: str, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Stopped by the signal of the time limit, requeued by the script itself, and done."""
    run = tmp_path / "run"
    mine = overrides(run, tiny_data, "train.steps=60")
    python = f"--export=ALL,PYTHON={sys.executable}"
    options = ["--signal=B:USR2@60", f"--output={tmp_path / 'log'}", python]
    if name == "array":
        (tmp_path / "sweep.txt").write_text("run.name='not this'\nrun.name='a b'\n")
        script = [str(ROOT / "launch" / "array.sbatch"), str(tmp_path / "sweep.txt")]
        options += ["--array=1", "--nodes=2"]
    else:
        script = [str(ROOT / "launch" / f"{name}.sbatch")]
        options += ["--nodes=2"] if name == "train" else []
    job_id = slurm.submit(*options, *script, *mine, cwd=ROOT)
    wait_for(run, lambda: len(steps(run)) > 2)
    slurm.run(
        "scancel", "--signal=USR2", "--batch", f"{job_id}_1" if name == "array" else str(job_id)
    )
    wait_for(run, lambda: state(run) == "requeued")
    status = wait_for(run, lambda: state(run) == "done")
    assert status is not None
    assert (status.attempt, steps(run)) == (2, list(range(1, 61)))
    if name == "array":
        assert 'name: "a b"' in (run / "config.yaml").read_text()


def test_bad_nodes_of_a_preflight_are_left_out(slurm: SlurmCluster, tmp_path: Path) -> None:
    """With a doctor that condemns the first node it sees, once, and then one that condemns nobody."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "doctor").write_text(
        "#!/bin/bash\n"
        "if [[ -e $1/exclude ]]; then [[ -e $1/well ]]; exit; fi\n"
        'echo "$SLURMD_NODENAME" > "$1/exclude"; touch "$1/well"; exit 1\n'
    )
    (tmp_path / "doctor").chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=1 --output={tmp_path}/log\nset -eo pipefail\n"
        f"python={sys.executable}\n. {ROOT}/launch/job.sh\n"
        f"preflight {script} {run} srun {tmp_path}/doctor {run}\n"
        f"run_job {run} srun bash -c 'echo $SLURMD_NODENAME > {run}/node; rm {run}/well'\n"
    )
    first = slurm.submit(script, cwd=ROOT)
    wait_for(run, lambda: (run / "node").exists())
    assert slurm.wait(first, "COMPLETED")["NodeList"] == "n1"
    assert ((run / "exclude").read_text(), (run / "node").read_text()) == ("n1\n", "n2\n")
    status = read_status(run)
    assert status is not None
    assert status.job_id == str(first + 1)
    # Without the mark the doctor fails and names nobody new: an end, not a loop.
    again = slurm.submit(script, cwd=ROOT)
    slurm.wait(again, "FAILED")
    status = read_status(run)
    assert status is not None
    assert status.reason == "preflight: exit code 1, its findings are in the log"
