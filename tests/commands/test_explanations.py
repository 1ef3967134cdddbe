"""Every code has a section in docs/troubleshooting.md, and its example is what is said today."""

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import epmq_gptq
from epmq_gptq import EPMQInputError, cli
from epmq_gptq.commands.explain import page, sections
from epmq_gptq.errors import CODES

PACKAGE = Path(epmq_gptq.__file__).parent


def run(*arguments):
    return CliRunner().invoke(cli.app, ["explain", *arguments])


SECTIONS = sections()


def test_every_code_has_a_section_and_every_section_a_code():
    heads = re.findall(r"^### (.+)$", page().read_text(encoding="utf-8"), re.MULTILINE)
    assert heads == list(SECTIONS), "a section is not of the form that `explain` reads"
    assert set(heads) == set(CODES) and len(heads) == len(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_section_is_complete(code):
    entry = SECTIONS[code]
    for part in (entry["cause"], entry["remedy"], *([entry["means"]] if entry["means"] else [])):
        assert part[0].isupper() or part.startswith(("`", "epmq_gptq", "float16")), part
        assert part.endswith((".", ")")), part
    assert code in entry["example"] or entry["example"].startswith("epmq_gptq.errors.")
    assert "/tmp" not in entry["example"]


def test_a_title_is_that_of_the_table():
    text = page().read_text(encoding="utf-8")
    for code, title in CODES.items():
        assert f"### {code}\n\n**{title[0].upper()}{title[1:]}.**" in text


def fragments() -> list[str]:
    """What the package can say: the constant parts of all of its strings, the longest first."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(part for part in node.value.split("`") if len(part.strip()) >= 3)
    return sorted(found, key=len, reverse=True)


@pytest.fixture(scope="module")
def said():
    return fragments()


# Words of Python, safetensors or transformers inside our own; they are not ours to hold.
FOREIGN = (
    "Error while deserializing header: incomplete metadata, file not fully covered",
    "Unrecognized configuration class <class 'transformers.models.perceiver."
    "configuration_perceiver.PerceiverConfig'> for this kind of AutoModel: AutoModelForCausalLM. "
    "[...]",
    "No such file or directory",
    "Connection refused",
    "resume='required' but no checkpoint is published",
)


@pytest.mark.parametrize("code", CODES)
def test_an_example_is_worded_as_the_source_says_it(code, said):
    """What is left of it, when all that the source says is taken away, is names and numbers."""
    text = SECTIONS[code]["example"]
    for foreign in FOREIGN:
        text = text.replace(foreign, "")
    text = re.sub(r"^(?:error|warning|note|epmq_gptq\.errors\.\w+):?\s+", "", text)
    text = text.replace(f"[{code}]", "").replace(code, "")
    text = re.sub(r"`[^`]*`", "`", text)  # names
    for fragment in said:
        text = text.replace(fragment, "\0")
    left = re.sub(r"[\W\d_]+", " ", text.replace("\0", " ")).split()
    own = {"math", "code", "merged", "taken", "weight", "silu", "list", "LOHA", "Errno"}
    assert [word for word in left if word not in own and len(word) > 3] == []


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["EPMQ-F30", "f30", "[EPMQ-F30]", "epmq-f30"])
def test_a_code_in_any_spelling(spelled):
    result = run(spelled)
    assert result.exit_code == 0
    entry = SECTIONS["EPMQ-F30"]
    shown = " ".join(result.stdout.split())
    for part in entry.values():
        assert part in shown


def test_all_codes_and_json():
    listed = run()
    assert listed.exit_code == 0
    assert all(code in listed.stdout and CODES[code] in listed.stdout for code in CODES)
    said = json.loads(run("--json", "-").stdout)
    assert [entry["code"] for entry in said["codes"]] == list(SECTIONS)
    one = json.loads(run("f30", "--json", "-").stdout)
    assert SECTIONS["EPMQ-F30"].items() <= one.items()


def test_an_unknown_code_is_refused():
    result = run("EPMQ-F03x")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: `EPMQ-F03x` is no error code. Did you mean `EPMQ-F03`? [EPMQ-O02]\n"
    )
    with pytest.raises(EPMQInputError):
        epmq_gptq.explain("")
