"""Shell completion: scripts for three shells, the right names, and quickly."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import epmq_gptq
from epmq_gptq.commands import forms
from epmq_gptq.commands.explain import _completed

ROOT = Path(__file__).parents[2]


def shell(arguments: list[str], code: str = "", **variables: str) -> subprocess.CompletedProcess:
    """The command under its own name, as the installed script runs it."""
    program = "import sys; sys.argv[0] = 'epmq-gptq'; from epmq_gptq.cli import main; main()" + code
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def asked(words: str, **variables: str) -> subprocess.CompletedProcess:
    """What bash asks for the last word."""
    return shell(
        [],
        _EPMQ_GPTQ_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
        **variables,
    )


def complete(words: str) -> list[str]:
    """What bash is offered for the last word."""
    done = asked(words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_every_shell(name):
    done = shell(["--show-completion", name], _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert f"_EPMQ_GPTQ_COMPLETE=complete_{name}" in done.stdout
    if name == "bash":
        checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes(tmp_path):
    """The script that was shown, sourced by a bash, which then asks for completions."""
    script = shell(
        ["--show-completion", "bash"], _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    ).stdout
    function = next(line for line in script.splitlines() if line.startswith("complete ")).split()
    name = function[function.index("-F") + 1]
    program = tmp_path / "epmq-gptq"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom epmq_gptq.cli import main\nmain()\n")
    program.chmod(0o755)
    ask = (
        f"{script}\nCOMP_WORDS=(epmq-gptq merge --method reg); COMP_CWORD=3; {name} epmq-gptq\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", ask],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
    )
    assert done.stdout.split() == ["regmean", "regmean_plusplus"], done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("epmq-gptq me", ["merge", "methods"]),
        ("epmq-gptq merge --method ties", ["ties", "ties_per_tensor"]),
        ("epmq-gptq evaluate m --dtype b", ["bfloat16"]),
        ("epmq-gptq inspect r.yaml --verify ", ["headers", "sample", "full"]),
        ("epmq-gptq quantize m --dtype fl", ["float32", "float16"]),
        ("epmq-gptq quantize m --device c", ["cpu", "cuda"]),
        ("epmq-gptq quantize m --set pro", ["profile="]),
        ("epmq-gptq explain EPMQ-S", ["EPMQ-S01", "EPMQ-S02"]),
        ("epmq-gptq demo --method wu", ["wudi"]),
    ],
)
def test_names_are_offered(words, offered):
    assert complete(words) == offered


def test_values_of_a_setting_are_offered():
    assert forms.settings("profile=") == ["profile=best", "profile=paper", "profile=gptq"]
    assert forms.settings("weighting=t") == ["weighting=token", "weighting=trace"]
    assert forms.settings("nothing=") == []
    assert _completed("f3")[0] == "EPMQ-F30" and _completed("zz") == []


def test_completion_is_light():
    done = asked("epmq-gptq merge --method a", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.split() == ["average"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "epmq_gptq.cli" in imported
    assert not imported & {"torch", "gptqmodel", "transformers", "numpy", "yaml"}


def offered(name: str, operation) -> tuple[str, ...]:
    """What the shell's type of an option allows."""
    return get_args(operation.parameters[name].form.shell)


def test_the_names_are_those_of_the_registries():
    from epmq_gptq.checks.check import VERIFY
    from epmq_gptq.config import PROFILES, EPMQConfig
    from epmq_gptq.merging import merge_methods
    from epmq_gptq.method.target import ANCHORS
    from epmq_gptq.method.weighting import WEIGHTINGS
    from epmq_gptq.recipe import DTYPES

    assert tuple(merge_methods()) == forms.MERGE_METHODS
    assert offered("dtype", epmq_gptq.quantize) == DTYPES
    assert offered("verify", epmq_gptq.inspect) == tuple(VERIFY)
    assert set(forms.SETTINGS) <= {each.name for each in dataclasses.fields(EPMQConfig)}
    assert forms.SETTINGS["profile"] == tuple(PROFILES)
    assert forms.SETTINGS["anchor"] == ANCHORS
    assert forms.SETTINGS["weighting"] == WEIGHTINGS
