"""`moesys plan batch`: its table, JSON and drawings, saved plans, what it reads lengths from and what it refuses."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesys.cli import main
from moesys.config.compose import compose
from moesys.data.sequence_loader import SequenceLoader
from moesys.plan.activations import token_bytes
from moesys.plan.batch.cost import BatchCosts, block_token_bytes, costs_of
from moesys.plan.batch.figures import figures
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.policies import POLICIES, planned
from moesys.plan.batch.timeline import timeline
from moesys.train.batches import build_loader
from tests.data.files import write_tokens

LENGTHS = [900, 40, 300, 7, 7, 220, 2000, 64, 510, 33]
BATCH = ["--lengths", ",".join(map(str, LENGTHS)), "--ranks", "4", "--capacity-tokens", "1024"]
RATES = ["--flops-per-s", "1e9", "--gbytes-per-s", "0.1", "--hop-us", "3"]


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", "batch", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Reasons."""
    assert main(["plan", "batch", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said, *others = err.removeprefix("moesys plan: ").splitlines()
    if not others:
        return [said]
    assert said == f"{len(others)} problems"
    return [line.removeprefix("  - ") for line in others]


def expected_costs(tp: int = 1) -> BatchCosts:
    model = compose([]).model
    return costs_of(model, 1e9 * tp, bytes_per_s=1e8 * tp, hop_s=3e-6, key_bytes=4)


@pytest.mark.parametrize(
    ("pp", "tp", "ep", "etp"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 2), (1, 1, 4, 1), (2, 1, 4, 1), (1, 1, 1, 2)],
)
def test_figures_are_those_of_the_plans(
    capsys: pytest.CaptureFixture[str], pp: int, tp: int, ep: int, etp: int
) -> None:
    """Data ranks of experts, and of slices of them, meet in every layer."""
    layout = [f"parallel.tp={tp}", f"parallel.ep={ep}", f"parallel.etp={etp}"]
    told = facts(capsys, *BATCH, *RATES, "--pp", str(pp), *layout)
    meets = ep > 1 or etp > tp
    assert [row["policy"] for row in told["policies"]] == list(POLICIES)
    assert (told["ranks"], told["pp"], told["meets_in_every_layer"]) == (4, pp, meets)
    config, costs = compose(layout), expected_costs(tp)
    moved = block_token_bytes(config.model, 4)
    for row in told["policies"]:
        plan = planned(row["policy"], np.array(LENGTHS), 4, 1024, costs, meets=meets, stages=pp)
        found = timeline(plan, costs, stages=pp, meets=meets)
        wanted = figures(plan, costs, found.step_s, stages=pp, block_token_bytes=moved)
        assert {key: row[key] for key in vars(wanted)} == vars(wanted)
        assert row["activation_bytes"] == wanted.held_tokens * token_bytes(config) / pp
        assert row["planned_s"] > 0


def test_the_table_has_a_line_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "batch", *BATCH]) == 0
    caption, blank, head, *lines = capsys.readouterr().out.splitlines()
    assert caption == (
        "10 sequences, 4,081 tokens, longest 2,000; 4 ranks, 1,024 tokens each, meet in rings"
    )
    assert blank == ""
    assert [line.split()[0] for line in lines] == list(POLICIES)
    assert {len(line) for line in (head, *lines)} == {len(head)}
    assert main(["plan", "batch", *BATCH, "--policy", "hdp,naive"]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[0] for line in lines] == ["hdp", "naive"]


def test_a_policy_without_a_plan_is_told_beside_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(policy: str, *args: Any, **options: Any) -> BatchPlan:
        if policy != "hdp":
            raise ValueError("not today")
        return planned(policy, *args, **options)

    monkeypatch.setattr("moesys.plan.batch.policies.planned", picky)
    told = facts(capsys, *BATCH)
    assert [row["policy"] for row in told["policies"]] == ["hdp"]
    assert told["refused"] == {policy: "not today" for policy in POLICIES if policy != "hdp"}
    assert main(["plan", "batch", *BATCH]) == 0
    assert "\nnaive: not today\n" in capsys.readouterr().out
    assert refused(capsys, *BATCH, "--policy", "naive") == ["naive: not today"]


def test_the_layout_says_how_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "5,6", "parallel.cp=2", "parallel.ep=4", "parallel.tp=2"]
    told = facts(capsys, *words, "data.seq_len=256", "train.micro_batch_tokens=512")
    assert told["ranks"] == 2
    assert told["capacity_tokens"] == 256, "of 512 that two ranks share"


def test_a_saved_plan_is_looked_at_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    (row,) = facts(capsys, *BATCH, *RATES, "--policy", "hdp", "--save", str(path))["policies"]
    plan = BatchPlan.from_json(json.loads(path.read_text()))
    assert plan.lengths_S.tolist() == LENGTHS
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    (again,) = facts(capsys, "--load", str(path), *RATES)["policies"]
    assert again == row | {"policy": "saved", "planned_s": None}
    assert main(["plan", "batch", "--load", str(path)]) == 0
    assert "saved" in capsys.readouterr().out


def test_drawings_are_files_that_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, page = tmp_path / "plans.svg", tmp_path / "plans.html"
    assert main(["plan", "batch", *BATCH, "--svg", str(svg), "--html", str(page)]) == 0
    capsys.readouterr()
    words = [element.text for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert set(POLICIES) <= set(words)
    text = page.read_text()
    inline = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert inline is not None
    ET.fromstring(inline[0])
    assert inline[0].count("<title>") == svg.read_text().count("<title>") >= 20
    for policy in POLICIES:
        assert f"<tr><td>{policy}</td>" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plans.html", "plans.svg"]


def test_of_many_ranks_some_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = tmp_path / "plans.svg"
    words = ["--lengths", "uniform", "--ranks", "100", "--batch-tokens", "300000"]
    assert main(["plan", "batch", *words, "--policy", "naive", "--svg", str(svg)]) == 0
    text = svg.read_text()
    assert "; 64 ranks drawn<" in text
    assert text.count('class="idle"') == 64 + 1, "and the legend's"


def test_made_up_lengths_fill_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "heavy_tail", "--ranks", "16", "--policy", "naive"]
    told = facts(capsys, *words, "--batch-tokens", "100000", "--capacity-tokens", "1000")
    assert 92_000 < told["tokens"] <= 100_000
    assert 1000 < told["longest_tokens"] <= 8000
    equal = [
        "--lengths",
        "equal",
        "--ranks",
        "16",
        "--policy",
        "naive",
        "--capacity-tokens",
        "1000",
    ]
    assert facts(capsys, *equal, "--batch-tokens", "40000")["longest_tokens"] == 8000
    shorter = facts(capsys, *words, "--batch-tokens", "100000", "--longest-tokens", "500")
    assert shorter["longest_tokens"] <= 500
    assert facts(capsys, *words, "run.seed=1")["longest_tokens"] != told["longest_tokens"]


def test_given_lengths_may_be_a_file_cut_and_counted_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("900 40\n300, 7\n")
    words = ["--lengths", str(path), "--ranks", "2", "--policy", "naive"]
    assert facts(capsys, *words)["tokens"] == 1247
    assert facts(capsys, *words, "--batch-tokens", "941")["sequences"] == 2
    told = facts(capsys, *words, "--longest-tokens", "400")
    assert (told["sequences"], told["tokens"], told["longest_tokens"]) == (6, 1247, 400)


def test_documents_of_the_data_folder_without_torch(tmp_path: Path) -> None:
    """A document of n tokens is a sequence of n - 1."""
    write_tokens(tmp_path / "train", [[0] * length for length in (9, 1, 101, 31)])
    code = (
        "import sys\nfrom moesys.cli import main\n"
        f"assert main(['plan', 'batch', '--json', '--ranks', '2', '--batch-tokens', '138', 'data.path={tmp_path}', "
        f"'--html', '{tmp_path}/plans.html']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=120
    )
    told = json.loads(done.stdout)
    assert (told["sequences"], told["tokens"], told["longest_tokens"]) == (3, 138, 100)


def test_all_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "uniforms", "--policy", "hpd,naive,naive", "--save", "no/plan.json"]
    told = refused(capsys, *words, "--ranks", "4", "model.num_layers=0", "parallel.ep=3")
    assert [line.split(":")[0] for line in told[:4]] == [
        "--policy 'hpd' is no planner of batches",
        "--policy hpd,naive,naive has one twice",
        "--save no/plan.json has room for one plan",
        "--save no/plan.json",
    ]
    assert "did you mean hdp?" in told[0]
    assert any(line.startswith("model.num_layers=0 must be at least 1") for line in told)
    assert any(line.startswith("parallel.ep=3 must divide") for line in told)
    told = refused(capsys, *words, "--ranks", "4")
    assert "did you mean uniform?" in told[-1]
    numbers = ["--ranks", "0", "--capacity-tokens", "-3", "--flops-per-s", "nan", "--hop-us", "-1"]
    assert [line.split(" must")[0] for line in refused(capsys, *numbers)] == [
        "--ranks 0",
        "--capacity-tokens -3",
        "--flops-per-s nan",
        "--hop-us -1.0",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lengths", "5,9000", "--ranks", "4"], "sequence 1 has 9000 tokens, and 4 ranks of 1024"),
        (["--lengths", "5,0"], "must be whole numbers of tokens, from 1 on: '0' is none"),
        (["--lengths", ","], "must be whole numbers of tokens, from 1 on: there is none"),
        (["data.path=no/where"], "no/where/train.idx: byte 0: there is no such file"),
        (["data.path=null"], "data.path is required, or data.sources"),
        (["--load", "no.json"], "--load no.json is no batch plan: FileNotFoundError"),
        (["--lengths", "5", "--pp", "2", "parallel.pp_schedule=gpipe"], "use 1f1b"),
        (["--lengths", "5", "--svg", "."], "--svg . is a folder"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = refused(capsys, *words)
    assert said in told


def test_a_saved_plan_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(batch_plan(np.array([8, 4]), 2, [[Piece(0, (0,))]]).to_json()))
    (told,) = refused(capsys, "--load", str(path))
    assert told == f"--load {path}: sequence 1 of 4 tokens is in 0 pieces"
    path.write_text(json.dumps(batch_plan(np.array([8]), 2, [[Piece(0, (0,))]]).to_json()))
    (told,) = refused(capsys, "--load", str(path), "--capacity-tokens", "7")
    assert "rank 0 has 8 tokens in micro-step 0, and memory for 7" in told
    told = refused(capsys, "--load", str(path), "--ranks", "2", "--policy", "hdp")
    assert [line.split()[0] for line in told] == ["--ranks", "--policy"]
    path.write_text(json.dumps(batch_plan(np.array([8]), 2, [[Piece(3, (5,))]]).to_json()))
    (told,) = refused(capsys, "--load", str(path))
    assert "micro-step 0 has sequence 3 of 1" in told
    path.write_text("{}")
    (told,) = refused(capsys, "--load", str(path))
    assert "is no batch plan: ValueError: a batch plan of version None" in told


def test_documents_are_those_of_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    write_tokens(tmp_path / "train", [[0] * int(n) for n in rng.integers(1, 90, 60)])
    words = [f"data.path={tmp_path}", "data.seq_len=64", "train.global_batch_tokens=512"]
    path = tmp_path / "plan.json"
    assert main(["plan", "batch", "--ranks", "2", "--batch-tokens", "512", "--policy", "naive", "--capacity-tokens", "64",
                 "--save", str(path), "batch=naive", *words]) == 0  # fmt: skip
    capsys.readouterr()
    config = compose(["batch=naive", "train.micro_batch_tokens=64", *words])
    loader = build_loader(config, 0, 2)
    assert isinstance(loader, SequenceLoader)
    with closing(loader):
        trained_S = loader.next_step().lengths_L
    assert json.loads(path.read_text())["lengths"] == trained_S.tolist()
