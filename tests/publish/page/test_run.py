"""A run's report is read whole or refused, with the file and the key named."""

import copy
import json
import math

import pytest
import regret_samples as samples

from epmq_gptq import EPMQInputError
from epmq_gptq.publish.page import check_baseline, read_report
from epmq_gptq.publish.page.retention import ExpertRetention, Retention
from epmq_gptq.run_report import ModuleReport


def kept(task, metric, better, expert, quantized, **others):
    return ExpertRetention(
        task=task, metric=metric, higher_is_better=better, expert=expert, quantized=quantized
    ).model_copy(update=others)


@pytest.fixture
def content():
    return samples.report(samples.llama(2), ["math", "code"])


def refusal(folder, content):
    samples.write(folder, content)
    with pytest.raises(EPMQInputError) as caught:
        read_report(folder)
    return caught.value


def test_everything_that_is_shown_is_read(tmp_path, content):
    report = read_report(samples.write(tmp_path / "run", content))
    assert report.checkpoint == "run" and report.version == "0.1.0"
    assert report.experts == ["math", "code"] and report.is_measured
    assert len(report.modules) == 14
    wanted = content["report"]["modules"][3]
    got = report.modules[3]
    assert (got.module, got.bits, got.group_size) == (wanted["module"], 4, 128)
    assert got.alpha == wanted["alpha"] and got.tokens == wanted["tokens"]
    figures = wanted["experts"]["code"]
    assert got.experts["code"].rounded == figures["rounded"]
    assert got.experts["code"].aim.solved == figures["aim"]["solved"]
    assert report.fact("merged", "source") == "merged-7b"
    assert report.fact("merged", "source", "deeper") is None and report.fact("nothing") is None
    assert report.about_expert("code")["source"] == "org/1"
    assert report.about_expert("nobody") == {}


def test_fields_that_a_report_may_lack(tmp_path, content):
    for module in content["report"]["modules"]:
        for key in ("weights", "held_out_gain", "reason", "eta", "rho", "experts"):
            del module[key]
    for key in ("left", "phases", "peak_memory", "provenance", "rows"):
        del content["report"][key]
    report = read_report(samples.write(tmp_path / "run", content))
    assert not report.is_measured and report.experts == ["math", "code"]
    assert report.modules[0].held_out_gain is None


def test_an_unknown_key_is_named(tmp_path, content):
    content["report"]["modules"][1]["news"] = 1
    assert "`report.modules[1]`: `news`" in refusal(tmp_path, content).cause


def test_numbers_that_a_file_may_not_hold_survive_in_memory(content):
    """A run that is resumed reads its own reports, whatever was computed."""
    values = content["report"]["modules"][0] | {"held_out": {"0.1": -math.inf}}
    values["held_out_gain"] = math.inf
    kept = json.loads(json.dumps(ModuleReport.model_validate(values).model_dump()))
    read = ModuleReport.model_validate(kept)
    assert read.held_out == {"0.1": -math.inf} and read.held_out_gain == math.inf
    assert read.model_dump() == ModuleReport.model_validate(values).model_dump()


CASES = {
    "schema": (("schema",), 2, "`schema` should be 1, got 2"),
    "old": (("schema",), None, "`schema` should be 1, got None"),
    "flag": (("schema",), True, "`schema` should be 1, got True"),
    "report": (("report",), [], "`report` should be a mapping, got []"),
    "modules": (("report", "modules"), {}, "`report.modules` should be a list, got {}"),
    "empty": (("report", "modules"), [], "`report.modules` should name at least one"),
    "entry": (("report", "modules", 1), 7, "`report.modules[1]` should be a mapping, got 7"),
    "name": (
        ("report", "modules", 1, "module"),
        None,
        "`report.modules[1].module` should be a text, got None",
    ),
    "bits": (("report", "modules", 0, "bits"), 4.5, "`report.modules[0].bits` should be a whole"),
    "alpha": (
        ("report", "modules", 0, "alpha"),
        "auto",
        "`report.modules[0].alpha` should be a number, got 'auto'",
    ),
    "ratio": (
        ("report", "modules", 0, "experts", "math", "rounded"),
        float("nan"),
        "`report.modules[0].experts.math.rounded` should be a finite number, 0 or more, got nan",
    ),
    "negative": (
        ("report", "modules", 0, "experts", "math", "merged"),
        -0.5,
        "experts.math.merged` should be a finite number, 0 or more, got -0.5",
    ),
    "energy": (
        ("report", "modules", 0, "experts", "math", "energy"),
        None,
        "experts.math.energy` should be a number, got None",
    ),
    "aim": (
        ("report", "modules", 0, "experts", "math", "aim"),
        3,
        "experts.math.aim` should be a mapping, got 3",
    ),
    "rows": (("report", "rows", "math"), "64", "`report.rows.math` should be a whole number"),
    "tokens": (("report", "tokens"), 5, "`report.tokens` should be a mapping, got 5"),
    "seconds": (("report", "seconds"), -1, "`report.seconds` should be a finite number, 0 or more"),
    "left": (("report", "left"), {"math": 1}, "`report.left.math` should be a text, got 1"),
    "phases": (("report", "phases"), {"solve": "x" * 99}, "got 'xxx"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_as_it_should_be_is_named(tmp_path, content, case):
    path, value, part = CASES[case]
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    error = refusal(tmp_path, content)
    assert error.code == "EPMQ-F53" and part in error.cause, error.cause
    assert error.cause.startswith("`epmq_report.json`: ") and len(error.cause) < 250
    assert error.remedy


def test_a_module_that_is_there_twice(tmp_path, content):
    content["report"]["modules"][5]["module"] = content["report"]["modules"][2]["module"]
    error = refusal(tmp_path, content)
    assert "name each module once" in error.cause and "v_proj" in error.cause


def test_folders_without_a_report(tmp_path):
    with pytest.raises(EPMQInputError, match="has no `epmq_report.json`"):
        read_report(tmp_path)
    with pytest.raises(EPMQInputError, match="is not a folder"):
        read_report(tmp_path / "nowhere")
    (tmp_path / "epmq_report.json").write_text("{")
    with pytest.raises(EPMQInputError, match="not readable as JSON"):
        read_report(tmp_path)
    # A link must not make us read another file of this disk.
    (tmp_path / "epmq_report.json").unlink()
    (tmp_path.parent / "secret.json").write_text("{}")
    (tmp_path / "epmq_report.json").symlink_to(tmp_path.parent / "secret.json")
    with pytest.raises(EPMQInputError, match="escapes"):
        read_report(tmp_path)


def test_a_baseline_is_of_the_same_merge(tmp_path, content):
    report = read_report(samples.write(tmp_path / "run", content))
    content["report"]["provenance"]["profile"] = "gptq"
    check_baseline(report, read_report(samples.write(tmp_path / "plain", content)))

    def other(change):
        changed = copy.deepcopy(content)
        change(changed["report"])
        baseline = read_report(samples.write(tmp_path / "plain", changed))
        with pytest.raises(EPMQInputError) as caught:
            check_baseline(report, baseline)
        assert caught.value.code == "EPMQ-F54" and caught.value.subject == "`--baseline`"
        return caught.value.cause

    def rename(plain):
        for module in plain["modules"]:
            module["tokens"]["law"] = module["tokens"].pop("code")
            module["experts"]["law"] = module["experts"].pop("code")
        plain["tokens"]["law"] = plain["tokens"].pop("code")

    last = content["report"]["modules"][-1]["module"]
    assert f"`{last}` is in `run` alone" in other(lambda plain: plain["modules"].pop())
    assert "has the experts math, law" in other(rename)
    digest = "from another merged model"
    assert digest in other(lambda plain: plain["provenance"]["merged"].update(sha256="00"))
    assert "no figures per expert" in other(
        lambda plain: [module.update(experts={}) for module in plain["modules"]]
    )
    assert "`profile: paper`" in other(lambda plain: plain["provenance"].update(profile="paper"))
    # Without digests the names have to do.
    content["report"]["provenance"] = {}
    check_baseline(report, read_report(samples.write(tmp_path / "plain", content)))


def test_an_evaluation_is_of_the_same_experts(tmp_path, content):
    from epmq_gptq.publish.page import report_figures

    report = read_report(samples.write(tmp_path, content))
    known = kept("t", "acc", True, 1.0, 0.5)
    report_figures(report, retention=Retention(experts={"math": known}))
    with pytest.raises(EPMQInputError, match="no expert `law`; it has math, code"):
        report_figures(report, retention=Retention(experts={"law": known}))


def test_the_sample_is_what_the_contract_says():
    """So that the other tests are about real reports."""
    content = samples.report(samples.moe(2, 4), ["a", "b"])
    assert json.loads(json.dumps(content)) == content
    for module in content["report"]["modules"]:
        for figures in module["experts"].values():
            assert set(figures) == {
                "rows", "energy", "merged", "quantization", "solved", "rounded", "aim",
            }  # fmt: skip
