"""The `ssm-vlm` command: what it hands to which command, and how it ends."""

import importlib
import sys
import types

import pytest

from ssm_vlm import cli


@pytest.fixture
def command(monkeypatch):
    """A command of its own, `try`, that does what the test says and notes what it was given."""
    module = types.ModuleType("command_of_the_test")
    module.given = []
    module.outcome = 0

    def main(argv):
        module.given.append(argv)
        if isinstance(module.outcome, BaseException):
            raise module.outcome
        return module.outcome

    module.main = main
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "try", (module.__name__, "try it"))
    return module


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there_and_explains_itself(name, capsys):
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).main)
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out.lower()


def test_the_help_of_a_command_shows_how_to_call_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: ssm-vlm train [recipe.yaml] [--key value ...]") and "--vision_tap" in shown


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and all(f" {name} {text}" in shown for name, (_, text) in cli.COMMANDS.items())


@pytest.mark.parametrize("argv", [[], ["chatt"], ["--model", "x"]])
def test_without_a_known_command(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("usage: ssm-vlm") and "Traceback" not in message


@pytest.mark.parametrize(("outcome", "status"), [(0, 0), (3, 3), (None, 0), (object(), 0)])
def test_the_rest_of_the_line_goes_to_the_command_and_its_status_comes_back(command, outcome, status):
    command.outcome = outcome
    assert cli.main(["try", "a.yaml", "--help", "--x", "1"]) == status
    assert command.given == [["a.yaml", "--help", "--x", "1"]]


def test_the_command_line_of_the_process_is_the_default(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssm-vlm", "try", "--x"])
    assert cli.main() == 0 and command.given == [["--x"]]


@pytest.mark.parametrize(
    "error", [ValueError("It is wrong."), FileNotFoundError("It is wrong."), FloatingPointError("It is wrong.")]
)
def test_bad_input_is_one_line_without_a_traceback(command, capsys, error):
    command.outcome = error
    assert cli.main(["try"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: It is wrong.\n")


def test_a_bug_is_not_hidden(command):
    command.outcome = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["try"])


def test_interrupted(command, capsys):
    command.outcome = KeyboardInterrupt()
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err.startswith("interrupted")
