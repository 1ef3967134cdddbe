"""The commands as functions: what they return, raise and print, and that they are the commands."""

import inspect as python_inspect
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

import epmq_gptq
from epmq_gptq import EPMQInputError, cli
from epmq_gptq.commands.explain import ExplainResult
from epmq_gptq.errors import EPMQWarning

SETTINGS = {"group_size": 32, "alpha": 0.1}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, 2)
    (folder / "a.txt").write_text("\n".join(f"{i} plus {i} is {2 * i}" for i in range(8)))
    return folder, merged, experts


@pytest.fixture
def rows(family):
    return {name: tiny.rows(6, 32, seed=i) for i, name in enumerate(family[2])}


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# ---- the names -----------------------------------------------------------------------------------


OPERATIONS = {name: getattr(epmq_gptq, name) for name in epmq_gptq._OPERATIONS}


def test_every_command_is_a_function():
    commands = {each.callback.__name__ for each in cli.app.registered_commands}
    assert commands == set(OPERATIONS)
    assert set(OPERATIONS) <= set(epmq_gptq.__all__) & set(dir(epmq_gptq))


def test_no_submodule_takes_the_name_of_a_function():
    modules = {module.name for module in pkgutil.iter_modules(epmq_gptq.__path__)}
    assert not modules & set(epmq_gptq.__all__)


@pytest.mark.parametrize("name", OPERATIONS)
def test_function_and_command_have_one_signature(name):
    function = OPERATIONS[name]
    asked = set(python_inspect.signature(function).parameters) - {"progress"}
    only_python = {n for n, each in function.parameters.items() if each.form.shell is None}
    shell = set(python_inspect.signature(function.command).parameters)
    assert shell == asked - only_python | {"json_report", "quiet", "verbose"}
    assert f"epmq-gptq {name}" in function.__doc__
    for each in function.parameters.values():
        assert f"    {each.name}: {each.help}" in function.__doc__


def test_an_unknown_keyword_is_refused_with_the_one_that_was_meant():
    with pytest.raises(EPMQInputError, match=r"`quantize`: `expert`.*Did you mean `experts`"):
        epmq_gptq.quantize("m", out="o", expert={"a": "b"})


def test_the_module_is_light():
    code = (
        "import sys, epmq_gptq; epmq_gptq.quantize; epmq_gptq.explain('F30'); "
        "print(sorted({'torch', 'gptqmodel', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ---- quantize ------------------------------------------------------------------------------------


def test_rows_in_memory_become_a_checkpoint(family, rows, tmp_path, capfd):
    _, merged, experts = family
    result = epmq_gptq.quantize(
        merged,
        out=tmp_path / "out",
        experts=experts,
        calibration=rows,
        settings=SETTINGS,
        batch_size=2,
    )
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "out" / "quantize_config.json").is_file()
    assert repr(result) == "<QuantizeResult out: 14 modules>"
    assert len(result.report.modules) == 14 and result.report.rows == {"expert0": 6, "expert1": 6}
    document = result.to_dict()
    text = json.dumps(document)
    assert document["checkpoint"] == "out"
    assert document["recipe"]["calibration"]["expert0"] == [{"rows": "given in Python"}]
    assert str(rows["expert0"][0]["input_ids"])[1:40] not in text  # nobody's rows in a result
    assert "model.layers.1.mlp.down_proj" in str(result)


def test_it_is_the_command(family, tmp_path, monkeypatch):
    """The same recipe through both doors gives the same tensors and the same numbers."""
    folder, merged, experts = family
    monkeypatch.chdir(folder)
    recipe = {
        "merged": "merged",
        "experts": {name: name for name in experts},
        "calibration": {name: {"file": "a.txt", "samples": 4} for name in experts},
        "quantize": SETTINGS,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    made = command(
        "quantize", "recipe.yaml", "--out", tmp_path / "one", "--json", tmp_path / "one.json"
    )
    assert made.exit_code == 0, made.output
    results = [
        epmq_gptq.quantize(target, out=tmp_path / out)
        for target, out in [
            ("recipe.yaml", "two"),
            (recipe, "three"),
            (Path("recipe.yaml"), "four"),
        ]
    ]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    said = json.loads((tmp_path / "one.json").read_text())
    for result in results:
        got = load_file(result.out / "model.safetensors")
        assert got.keys() == expected.keys()
        assert all((got[name] == expected[name]).all() for name in got)
        document = result.to_dict()
        assert document["recipe"] == said["recipe"]
        assert [m["loss"] for m in document["report"]["modules"]] == [
            m["loss"] for m in said["report"]["modules"]
        ]


def test_settings_of_python_come_over_those_of_a_recipe(family, tmp_path):
    folder, merged, experts = family
    recipe = {
        "merged": str(merged),
        "experts": {name: str(path) for name, path in experts.items()},
        "calibration": {name: str(folder / "a.txt") for name in experts},
        "quantize": SETTINGS,
    }
    result = epmq_gptq.quantize(recipe, out=tmp_path / "out", settings={"bits": 8})
    assert {module.bits for module in result.report.modules} == {8}
    assert recipe["quantize"] == SETTINGS  # what was given stays as it is


def test_progress_is_said_when_asked_for(family, rows, tmp_path, capsys):
    _, merged, experts = family
    options = dict(experts=experts, calibration=rows, settings=SETTINGS, progress=True)
    epmq_gptq.quantize(merged, out=tmp_path / "out", **options)
    out = capsys.readouterr().out
    assert "rows        expert0: 6 of 6 (rows)" in out and "quantize    14/14 modules" in out


def test_mistakes_are_exceptions_and_nobody_is_asked(family, rows, tmp_path, monkeypatch):
    _, merged, experts = family
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    out = tmp_path / "out"
    with pytest.raises(EPMQInputError, match="calibration is missing for 1 of the 2") as caught:
        epmq_gptq.quantize(
            merged, out=out, experts=experts, calibration={"expert0": rows["expert0"]}
        )
    assert caught.value.code == "EPMQ-F21"
    with pytest.raises(EPMQInputError, match="goes with a merged model"):
        epmq_gptq.quantize({"merged": "m"}, out=out, calibration=rows)
    with pytest.raises(EPMQInputError, match="`merged`: `megred` is neither"):
        epmq_gptq.quantize(
            {
                "merged": "megred",
                "experts": {"a": str(experts["expert0"])},
                "calibration": {"a": "a.txt"},
            },
            out=out,
        )
    with pytest.raises(EPMQInputError, match="`beta` is not an option"):
        epmq_gptq.quantize(merged, out=out, experts=experts, calibration=rows, settings={"beta": 1})
    with pytest.raises(EPMQInputError, match=r"`evaluate`: `limmit`.*Did you mean `limit`"):
        epmq_gptq.evaluate(merged, "hellaswag", limmit=3)
    with pytest.raises(EPMQInputError, match="there is nothing to evaluate on"):
        epmq_gptq.evaluate(merged, [])
    assert not out.exists()


def test_our_warnings_are_pythons_and_point_at_the_caller(family, rows, tmp_path):
    _, merged, experts = family
    few = {**rows, "expert1": [{"input_ids": [5, 6, 7]}]}
    with pytest.warns(EPMQWarning, match="expert1.*3 calibration tokens") as caught:
        epmq_gptq.quantize(
            merged, out=tmp_path / "out", experts=experts, calibration=few, settings=SETTINGS
        )
    assert {Path(each.filename).name for each in caught} == {"test_operations.py"}
    assert {each.message.code for each in caught} == {"EPMQ-F23", "EPMQ-F26"}
    # Also where the run then fails.
    with warnings.catch_warnings(record=True) as caught, pytest.raises(EPMQInputError):
        warnings.simplefilter("always")
        epmq_gptq.quantize(
            merged,
            out=tmp_path / "no",
            experts=experts,
            calibration=few,
            settings={"group_size": 48},
        )
    assert not (tmp_path / "no").exists()


# ---- the others ----------------------------------------------------------------------------------


def test_merge(family, tmp_path, capsys):
    _, merged, experts = family
    result = epmq_gptq.merge(
        "task_arithmetic",
        experts=experts,
        base=merged,
        parameters={"lam": 0.5},
        out=tmp_path / "m",
    )
    assert capsys.readouterr().out == ""
    assert (result.out / "model.safetensors").is_file()
    assert result.to_dict()["parameters"] == {"lam": 0.5}
    assert str(tmp_path) not in json.dumps(result.to_dict())
    assert "task_arithmetic" in str(result) and "m: " in str(result)
    with pytest.raises(EPMQInputError, match="not empty"):
        epmq_gptq.merge("average", experts=experts, out=tmp_path / "m")


def test_inspect_tells_what_is_wrong_and_does_not_raise(family, rows):
    _, merged, experts = family
    fine = epmq_gptq.inspect(merged, experts=experts, calibration=rows, settings=SETTINGS)
    assert fine.ok and "ready to run" in str(fine) and fine.to_dict()["coverage"]
    wrong = epmq_gptq.inspect(merged, experts=experts, settings={"group_size": 48})
    assert not wrong.ok and "cannot run" in str(wrong) and "EPMQ-F33" in str(wrong)
    assert re.fullmatch(r"<InspectResult: \d+ errors, \d+ warnings>", repr(wrong))


def test_methods_and_explain():
    known = epmq_gptq.methods()
    assert known["ties"]["needs_base"] and known.to_dict() == {"methods": dict(known)}
    assert json.loads(command("methods", "--json", "-").stdout)["methods"] == json.loads(
        json.dumps(dict(known), default=str)
    )
    try:
        epmq_gptq.explain("F99")
    except EPMQInputError as error:
        assert epmq_gptq.explain(error).entry["code"] == "EPMQ-O02"
    else:
        pytest.fail("there is no F99")


def test_a_notebook_shows_a_table_and_runs_no_markup(family):
    html = epmq_gptq.explain("F30")._repr_html_()
    assert html.startswith("<pre") and html.endswith("</pre>") and "curvature" in html
    entry = {"code": "[red]x", "title": "<script>alert(1)</script> & [bold]b[/bold]"}
    entry |= dict.fromkeys(("means", "cause", "remedy", "example"), "<img src=x>")
    html = ExplainResult(entry)._repr_html_()
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html and "[bold]b[/bold]" in html
