"""`epmq-gptq report`: what it writes and says, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import regret_samples as samples
from typer.testing import CliRunner

from epmq_gptq import cli

ROOT = Path(__file__).parents[2].parent
EXPERTS = ["math", "code"]


@pytest.fixture
def folder(tmp_path):
    return samples.write(tmp_path / "run", samples.report(samples.llama(2), EXPERTS))


@pytest.fixture
def plain(tmp_path):
    content = samples.report(samples.llama(2), EXPERTS, profile="gptq", rounding=2.0)
    return samples.write(tmp_path / "plain", content)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr, result.stderr


def test_the_page_and_the_table(folder, plain, tmp_path):
    (folder / "epmq_evaluation.json").write_text(json.dumps(samples.retention(EXPERTS)))
    result = run(folder, "--baseline", plain)
    assert result.exit_code == 0, result.output
    page = folder / "epmq_report.html"
    assert f"page        {page}" in result.stdout
    assert "<h1>run</h1>" in page.read_text()
    for part in ("math", "plain GPTQ", "worst module", "down_proj", "retention", "before"):
        assert part in result.stdout
    assert {file.name for file in folder.iterdir()} == {
        "epmq_report.json",
        "epmq_evaluation.json",
        "epmq_report.html",
    }


def test_json_alone_and_beside_the_page(folder, tmp_path):
    result = run(folder, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert not (folder / "epmq_report.html").exists()
    document = json.loads((tmp_path / "figures.json").read_text())
    assert [one["name"] for one in document["experts"]] == EXPERTS

    piped = run(folder, "--json", "-")
    assert json.loads(piped.stdout) == document
    assert piped.stderr == ""

    result = run(folder, "--json", tmp_path / "b.json", "--out", tmp_path / "b.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.json").exists() and (tmp_path / "b.html").exists()


def test_in_a_process_of_its_own_without_torch(folder, tmp_path):
    """Reading a report should not wait for seconds of imports."""
    code = (
        "import sys; from epmq_gptq.cli import app; "
        f"app(['report', {str(folder)!r}, '--out', 'page.html'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'gptqmodel', 'transformers')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "page.html").exists()


def test_taken_and_wrong_places(folder, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    refused(run(folder, "--out", page), "`page.html` exists", "--overwrite")
    assert page.read_text() == "mine"
    assert run(folder, "--out", page, "--overwrite").exit_code == 0
    assert page.read_text() != "mine"

    refused(run(folder, "--out", tmp_path / "page.txt"), "ends in .html")
    refused(run(folder, "--out", tmp_path / "no" / "page.html"), "in a folder that exists")
    before = (folder / "epmq_report.json").read_text()
    refused(run(folder, "--json", folder / "epmq_report.json", "--overwrite"), "are read from")
    assert (folder / "epmq_report.json").read_text() == before
    refused(run(folder, "--json", folder / "epmq_report.json"), "are read from")
    link = tmp_path / "link.html"
    link.symlink_to(folder / "epmq_report.json")
    refused(run(folder, "--out", link, "--overwrite"), "are read from")
    assert (folder / "epmq_report.json").read_text() == before
    refused(run(folder, "--json", tmp_path / "x.json", "--open"), "--open", "--out")


def test_runs_that_cannot_be_shown(folder, plain, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty"), "has no `epmq_report.json`")
    other = samples.write(tmp_path / "other", samples.report(samples.llama(3), EXPERTS))
    refused(run(folder, "--baseline", other), "--baseline", "has other modules than `run`")
    refused(run(folder, "--evaluation", tmp_path / "none.json"), "no file `none.json`")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(samples.retention(["law"])))
    refused(run(folder, "--evaluation", wrong), "no expert `law`")
    assert not (folder / "epmq_report.html").exists()


def test_notes(folder, plain, tmp_path):
    content = json.loads((plain / "epmq_report.json").read_text())
    for module in content["report"]["modules"]:
        module["bits"] = 3
    samples.write(plain, content)
    result = run(folder, "--baseline", plain)
    assert "other bits or groups" in result.stderr
    unmeasured = samples.report(samples.llama(1), EXPERTS, measured=False)
    result = run(samples.write(tmp_path / "unmeasured", unmeasured))
    assert result.exit_code == 0 and "no figures per expert" in result.stderr


def test_opening_it(folder, monkeypatch):
    import typer

    opened = []
    monkeypatch.setattr(typer, "launch", opened.append)
    assert run(folder, "--open").exit_code == 0
    assert opened == [(folder / "epmq_report.html").as_uri()]


def test_a_full_disk_leaves_the_page_of_before(folder, monkeypatch):
    import errno

    page = folder / "epmq_report.html"
    page.write_text("before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run(folder, "--overwrite")
    assert result.exit_code == 1 and "ran full" in result.stderr
    assert page.read_text() == "before"
    assert {file.name for file in folder.iterdir()} == {"epmq_report.json", page.name}


def test_names_are_no_markup(tmp_path):
    content = samples.report(["model.layers.0.[red]q"], ["[bold]math"])
    result = run(samples.write(tmp_path / "run", content))
    assert result.exit_code == 0
    assert "[bold]math" in result.stdout and "[red]q" in result.stdout


# ---- from Python ---------------------------------------------------------------------------------


def test_the_functions_of_the_same_names(folder, plain, tmp_path):
    import epmq_gptq

    result = epmq_gptq.report(folder, baseline=plain, out="page.html")
    assert repr(result) == "<ReportResult run: 2 experts>"
    assert result.out.resolve() == tmp_path / "page.html" and result.out.read_text() == result.page
    assert "down_proj" in str(result) and "<pre" in result._repr_html_()
    piped = run(folder, "--baseline", plain, "--json", "-")
    assert json.loads(piped.stdout) == json.loads(json.dumps(result.to_dict()))
    with pytest.raises(epmq_gptq.EPMQInputError, match="exists"):
        epmq_gptq.report(folder, out="page.html")
    assert epmq_gptq.report(folder).out is None
