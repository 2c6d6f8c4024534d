"""The command as a whole: how fast it starts, what it says to wrong words, its exit codes."""

import subprocess
import sys

import pytest

import moesys
from moesys.cli import main
from tests.cli.processor_time import children_s

COMMANDS = ("train", "prep", "config", "report", "ckpt", "bench", "doctor", "plan")
HEAVY = ("torch", "numpy", "hydra", "omegaconf", "rich", "matplotlib")


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom moesys.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout


def test_help_takes_less_than_300_ms() -> None:
    command = [sys.executable, "-m", "moesys", "--help"]
    before = children_s()
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert children_s() - before < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: moesys {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["traim"], "'traim' is not a command: did you mean train?"),
        (["--traceback", "docter"], "did you mean doctor?"),
        (["xyzzy"], "choose from train, prep, config"),
        ([], "required: COMMAND"),
        (["train", "--nprocs", "2"], "train does not take --nprocs"),
        (["doctor", "extra"], "doctor does not take extra"),
        (["config", "keys", "lr", "beta"], "config does not take beta"),
    ],
)
def test_wrong_words_end_with_2_and_a_hint(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"moesys {moesys.__version__}\n"


def test_an_error_of_the_user_is_one_message_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "show", "train.stepz=3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "moesys config: configuration: train.stepz=3 is not a configuration key: "
        "did you mean train.steps?\n"
    )
    assert main(["--traceback", "config", "show", "train.stepz=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "optim.lr=5", "--json", "train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert '"lr": 5.0' in out
    assert '"steps": 7' in out


def test_a_closed_pipe_is_no_traceback() -> None:
    line = f"{sys.executable} -m moesys config keys | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "run.name: text; required\n"
    assert done.stderr == ""
