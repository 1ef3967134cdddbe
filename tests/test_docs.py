"""The site builds without a warning, holds all that the code has, and shows what commands print."""

import dataclasses
import html
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import epmq_gptq
from epmq_gptq import cli
from epmq_gptq.errors import CODES, ExitCode
from epmq_gptq.recipe import recipe_help

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "docs" / "mkdocs"
sys.path.insert(0, str(TOOLS))
links = importlib.import_module("links")
generated = importlib.import_module("generated")


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"]
        + ["--config-file", str(config), "--site-dir", str(site)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(TOOLS / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    """What a reader sees of a page."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", body))


def ids_of(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))


# ---- the site ------------------------------------------------------------------------------------


def test_no_marker_and_no_markup_of_another_kind_is_left(site):
    for page in site.glob("*.html"):
        raw = page.read_text(encoding="utf-8")
        assert "epmq:" not in raw, page.name
        text = text_of(page)
        assert not re.search(r":(?:class|func|meth|data|attr):", text), page.name
        assert "@@" not in text, page.name


def test_it_opens_without_a_network(site):
    """Nothing that a browser would fetch comes from elsewhere."""
    for page in site.glob("*.html"):
        raw = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', raw)
        fetched += re.findall(
            r'<link[^>]+rel="(?:stylesheet|icon|preconnect)"[^>]+href="([^"]+)"', raw
        )
        assert [place for place in fetched if "//" in place] == [], page.name
    assert not (site / "mkdocs").exists()


def test_every_page_is_in_the_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert f'href="{page.stem}.html"' in start, page.name


def test_every_key_of_a_recipe_and_every_option(site):
    text = text_of(site / "recipes.html")
    for key, doc in recipe_help():
        assert key.strip() in text and doc.replace("`", "") in text, key
    from epmq_gptq.config import EPMQConfig

    options = text_of(site / "options.html")
    own = [name for name in inspect.get_annotations(EPMQConfig)]
    assert len(own) > 10
    for option in dataclasses.fields(EPMQConfig):
        if option.name in own:
            assert option.name in options and len(option.metadata["description"]) > 20
            assert repr(generated.default_of(option)).replace("'", "") in options.replace("'", "")


def test_every_command_with_every_option(site):
    text = text_of(site / "cli.html")
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        assert name in ids_of(site / "cli.html")
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else []
            for option in [*names, *([] if names else [parameter.name.upper()])]:
                assert option in text, (name, option)
    for code in ExitCode:
        assert str(code.value) in text and code.meaning.replace("`", "") in text


def test_every_merge_method(site):
    from epmq_gptq.merging import merge_methods

    text = text_of(site / "recipes.html")
    for name, about in merge_methods().items():
        assert name in text and about["title"] in text
        assert all(parameter in text for parameter in about["parameters"])


def test_every_error_code_has_its_place(site):
    ids = ids_of(site / "troubleshooting.html")
    assert {code.lower() for code in CODES} <= ids
    assert not [place for place in ids if re.fullmatch(r"epmq-\w\d+", place) and
                place.upper() not in CODES]  # fmt: skip
    from epmq_gptq.commands.explain import sections

    text = text_of(site / "troubleshooting.html")
    for code, section in sections().items():
        assert section["example"] in text, code


def test_every_public_name_of_python(site):
    text, ids = text_of(site / "api.html"), ids_of(site / "api.html")
    for name in epmq_gptq.__all__:
        assert name in text or name.startswith("__"), name
    for name, function in generated.operations().items():
        assert name in ids, name
        assert all(keyword in text for keyword in inspect.signature(function).parameters), name


# ---- links ---------------------------------------------------------------------------------------


def test_no_link_is_broken():
    assert links.faults() == []
    counted = {file: len(list(links.links(file.read_text()))) for file in links.files()}
    assert counted[ROOT / "README.md"] > 5 and sum(counted.values()) > 20


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        ("docs/method.md", None),
        ("docs/nowhere.md", "no such file"),
        ("#two-commands", None),
        ("#three-commands", "no such heading"),
        ("../../elsewhere.md", "leads out of the repository"),
        ("/etc/passwd", "neither"),
        ("https://arxiv.org/abs/2605.16882", None),
        ("https:///abs", "no web address"),
        ("https://arxiv", "no web address"),
        ("ftp://arxiv.org", "neither"),
    ],
)
def test_links_are_told_apart(target, wrong):
    found = links.fault(ROOT / "README.md", target)
    assert found is None if wrong is None else wrong in found


def test_headings_have_the_anchors_of_code_hosts():
    text = "# A `b-c` d!\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n"
    assert links.anchors(text) == {"a-b-c-d", "same", "same-1"}


@pytest.mark.parametrize(
    "broken", ["[gone](gone.md)", "[gone](method.md#gone)", "<!-- epmq:gone -->"]
)
def test_a_broken_page_fails_the_build(tmp_path, broken):
    """The checks are on: a copy of two pages, one of them with a fault."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "method.md").write_text("# Method\n\n## There\n")
    (docs / "index.md").write_text(f"# Start\n\n[there](method.md#there)\n\n{broken}\n")
    settings = (TOOLS / "mkdocs.yml").read_text()
    validation = settings[settings.index("validation:") :]
    config = docs / ".." / "mkdocs.yml"
    config.write_text(
        "site_name: x\ndocs_dir: docs\nplugins: []\nnav: [index.md, method.md]\n"
        f"hooks: [{TOOLS / 'hooks.py'}]\n{validation}"
    )
    done = build(config, tmp_path / "site")
    assert done.returncode != 0 and "gone" in done.stdout + done.stderr
    (docs / "index.md").write_text("# Start\n\n[there](method.md#there)\n")
    assert build(config, tmp_path / "site").returncode == 0


# ---- what is shown as output ---------------------------------------------------------------------


def shown() -> list[tuple[str, str, str]]:
    """(page, command, output) of every block of a console that is quick to run."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.M | re.S):
            first, _, output = block.partition("\n")
            if first.startswith("$ epmq-gptq explain") or "2> /dev/null" in first:
                found.append((page.name, first.removeprefix("$ "), output))
    return found


@pytest.mark.parametrize(("page", "command", "output"), shown())
def test_what_a_page_shows_is_what_is_printed(page, command, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.partition(" 2>")[0].split()[1:]
    result = CliRunner().invoke(cli.app, arguments)
    said = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    assert said.strip() == output.strip()


def test_such_blocks_are_there():
    assert {page for page, _, _ in shown()} == {"cli.md", "troubleshooting.md"}
    (error,) = [output for page, _, output in shown() if page == "cli.md"]
    assert json.loads(error)["exit_code"] == 2


def test_the_table_of_faults_is_that_of_the_tests():
    import importlib.util

    spec = importlib.util.spec_from_file_location("table", ROOT / "tests" / "faults" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = table.PAGE.read_text(encoding="utf-8")
    assert len(table.faults()) > 0 and table.filled(page) == page, (
        "run `python tests/faults/table.py`"
    )
