"""What all commands share: help, exit codes, --json, --quiet, colours and pipes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

import epmq_gptq
from epmq_gptq import EPMQError, EPMQHostError, EPMQInputError, EPMQNumericalError, EPMQStopped, cli
from epmq_gptq.commands import run_recipe
from epmq_gptq.errors import ExitCode, Terminated

ROOT = Path(__file__).parents[2]
COMMANDS = {each.callback.__name__: each.callback for each in cli.app.registered_commands}
PARTS = dict(code="EPMQ-S01", subject="it", remedy="Do.")


def run(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def python(*arguments, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def fresh(*arguments, **variables):
    return python("-m", "epmq_gptq", *arguments, **variables)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, 2)
    (folder / "a.txt").write_text("\n".join(f"{i} plus {i} is {2 * i}" for i in range(8)))
    options = {
        "merged": "merged",
        "experts": {name: name for name in experts},
        "calibration": {name: "a.txt" for name in experts},
        "quantize": {"group_size": 32, "alpha": 0.1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(options))
    return folder / "recipe.yaml"


# ---- every command -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_shared_options_and_examples(name):
    options = inspect.signature(COMMANDS[name]).parameters
    assert {"json_report", "quiet", "verbose"} <= set(options)
    shown = COMMANDS[name].examples
    assert 2 <= len(shown) <= 4
    for about, line in shown:
        assert about and line.startswith(f"epmq-gptq {name}")
        assert max(len(part) for part in line.splitlines()) <= 76, "it would be broken in a help"
    help = run(name, "--help", env={"COLUMNS": "80"})
    assert help.exit_code == 0
    for about, line in shown:
        assert f"# {about}" in help.stdout
        for part in line.splitlines():
            assert part in help.stdout


def words(line: str) -> list[str]:
    """The command line of an example, as a shell splits it; what comes after a pipe is not ours."""
    import shlex

    return shlex.split(line.replace("\\\n", " ").partition(" | ")[0])[1:]


@pytest.mark.parametrize(
    "line", [line for function in COMMANDS.values() for _, line in function.examples]
)
def test_examples_are_command_lines_that_are_understood(line, monkeypatch):
    """Every option of an example exists and has a value of its kind."""
    import typer

    group = typer.main.get_command(cli.app)
    name, *rest = words(line)
    command = group.commands[name]
    context = command.make_context(name, rest)
    assert context.params


def test_exit_codes_are_in_the_help_and_are_those_of_errors():
    help = run("--help", env={"COLUMNS": "120"}).stdout
    for code in ExitCode:
        assert f"{code.value:>3}  {code.meaning}" in help
    errors = {
        EPMQInputError("no.", **PARTS): 2,
        EPMQNumericalError("no.", **PARTS): 3,
        EPMQHostError("no.", **PARTS): 1,
        EPMQStopped("no.", **PARTS): 75,
        EPMQError("no.", **PARTS): 1,
        KeyboardInterrupt(): 130,
        BrokenPipeError(): 141,
        Terminated(): 143,
        RuntimeError(): 1,
    }
    assert {ExitCode.of(error): code for error, code in errors.items()} == {
        code: code.value for code in ExitCode if code
    }


# ---- the command line itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["inspect"],
            "missing argument 'target'. `epmq-gptq inspect --help` shows what there is. [EPMQ-O01]",
        ),
        (
            ["inspekt"],
            "no such command 'inspekt'. Did you mean 'inspect'? `epmq-gptq --help` shows what "
            "there is. [EPMQ-O02]",
        ),
        (
            ["inspect", "--verfy", "full"],
            "no such option: --verfy Did you mean --verify? `epmq-gptq inspect --help` shows what "
            "there is. [EPMQ-O02]",
        ),
        (
            ["quantize", "m", "--seed", "x"],
            "invalid value for '--seed': 'x' is not a valid int. `epmq-gptq quantize --help` shows "
            "what there is. [EPMQ-O01]",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_like_everything_else(arguments, line, tmp_path):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    # typer's words differ between its versions; ours do not.
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert result.stderr.split()[1:3] == line.split()[:2]
    assert result.stderr.endswith(line[line.index("`epmq") :] + "\n")
    file = tmp_path / "error.json"
    for place in (["--json", "-"], ["--json=-"], ["--json", file]):
        result = run(*arguments, *place)
        assert result.exit_code == 2
        said = json.loads(file.read_text() if result.stdout == "" else result.stdout)
        assert said["error"]["code"] == line[-9:-1] and said["exit_code"] == 2


def test_without_arguments_there_is_help():
    result = run()
    assert "Exit codes" in result.output and "Traceback" not in result.output


# ---- --json --------------------------------------------------------------------------------------


def test_json_on_stdout_is_all_that_is_there(recipe, tmp_path):
    """In a process of its own, where the host would print as it is imported."""
    out = tmp_path / "out"
    done = fresh("quantize", recipe, "--out", out, "--json", "-")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["epmq_gptq"] == epmq_gptq.__version__
    assert len(said["report"]["modules"]) == 14 and said["checkpoint"] == "out"
    assert "quantize    14/14 modules" in done.stderr  # people read it there


def test_json_on_stdout_is_all_that_is_there_loud_or_quiet(recipe, capfd):
    def printed(how):
        """What comes out of the descriptors, whoever writes there."""
        with pytest.raises(SystemExit, match="0"):
            cli.app(["inspect", str(recipe), "--json", "-", how])
        return capfd.readouterr()

    loud = printed("--verbose")
    assert json.loads(loud.out)["models"] and "ready to run" not in loud.err
    quiet = printed("--quiet")
    assert json.loads(quiet.out)["models"] and quiet.err == ""


def test_errors_are_json_too(recipe, tmp_path):
    result = run("quantize", recipe, "--out", recipe.parent, "--json", "-")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"]["code"] == "EPMQ-F45" and said["exit_code"] == 2
    assert result.stderr.startswith("error: `--out`")


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (RuntimeError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (EPMQNumericalError("no.", **PARTS), 3, "no."),
    ],
)
@pytest.mark.parametrize("place", ["-", "file.json"])
def test_so_is_whatever_else_goes_wrong(recipe, tmp_path, monkeypatch, error, code, cause, place):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run_recipe, "run", fail)
    monkeypatch.chdir(tmp_path)
    result = run("quantize", recipe, "--out", tmp_path / "out", "--json", place)
    assert result.exit_code == code
    text = result.stdout if place == "-" else (tmp_path / place).read_text()
    said = json.loads(text)
    assert (said["error"]["cause"], said["exit_code"]) == (cause, code)
    assert said["error"]["code"] == getattr(error, "code", None)


def test_a_merge_and_a_written_recipe_as_json(recipe, tmp_path):
    experts = [
        part for i in (0, 1) for part in ("--expert", f"e{i}={recipe.parent / f'expert{i}'}")
    ]
    result = run("merge", "--method", "average", *experts, "--out", tmp_path / "m", "--json", "-")
    said = json.loads(result.stdout)
    assert said["method"] == "average" and list(said["record"]["experts"]) == ["e0", "e1"]
    assert str(tmp_path) not in result.stdout
    file = tmp_path / "written.yaml"
    result = run("quantize", tmp_path / "m", *experts, "--write-recipe", file, "--json", "-")
    assert json.loads(result.stdout) == {
        "epmq_gptq": epmq_gptq.__version__,
        "recipe": "written.yaml",
        "uncalibrated": ["e0", "e1"],
    }


# ---- --quiet -------------------------------------------------------------------------------------


def test_quiet_says_nothing_but_what_was_asked_for(recipe, tmp_path):
    result = run("quantize", recipe, "--out", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    # 64 tokens of `a.txt` are few: a warning is no chatter.
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
    assert (tmp_path / "out" / "config.json").is_file()
    asked = run("inspect", recipe, "-q")
    assert "ready to run" in asked.stdout
    again = run("quantize", recipe, "--out", tmp_path / "out", "--quiet")
    assert again.exit_code == 2 and again.stderr.startswith("error: `--out`")


# ---- terminals and pipes -------------------------------------------------------------------------


def test_no_color_is_respected():
    """By one process, since what is imported reads the variables once."""
    code = """
from epmq_gptq import cli
for argument in ("explain", "inspect", "--help"):
    try:
        cli.app([argument])
    except SystemExit:
        print("ENDED", argument)
"""
    variables = {"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = python("-c", code, **variables)
    assert done.stdout.count("ENDED") == 3, done.stderr
    colours = [part for part in (done.stdout + done.stderr).split("\x1b[")[1:] if is_colour(part)]
    assert colours == []


def is_colour(sequence: str) -> bool:
    """Whether an SGR sequence sets a colour; bold and dim are none."""
    numbers = sequence.partition("m")[0].split(";")
    return any(number.isdigit() and 30 <= int(number) <= 107 for number in numbers)


def test_colours_are_there_without_it():
    done = fresh("explain", "f99", FORCE_COLOR="1", NO_COLOR="")
    assert any(map(is_colour, done.stderr.split("\x1b[")[1:]))


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize(
    "arguments", ["methods", "explain", "--help", "explain --json -", "quantize --help"]
)
def test_a_reader_that_leaves_early_sees_no_traceback(arguments):
    """`| head -1`, but the reader is gone before anything is written."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "epmq_gptq", *arguments.split()],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == (1 if "--help" in arguments else ExitCode.BROKEN_PIPE)
