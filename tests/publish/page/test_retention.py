"""What is kept of each expert: its own task, its own metric, and figures that may be compared."""

import json

import pytest
from typer.testing import CliRunner

from epmq_gptq import EPMQInputError, cli
from epmq_gptq.publish.page.retention import (
    ExpertRetention,
    Retention,
    read_retention,
    write_retention,
)

INT4 = {"method": "gptq", "bits": 4, "group_size": 128, "kernel": "torch"}


def kept(task, metric, better, expert, quantized, **others):
    return ExpertRetention(
        task=task, metric=metric, higher_is_better=better, expert=expert, quantized=quantized
    ).model_copy(update=others)


def measure(task, metric, value, better=True, items=100):
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": None,
        "items": items,
        "higher_is_better": better,
        "details": {},
    }


def suite(scores, quantization=None, name="a-model", **settings):
    """As `evaluate --suite --json` writes it; scores: task -> (accuracy, loss)."""
    measures = []
    for task, (accuracy, loss) in scores.items():
        measures += [measure(task, "accuracy", accuracy), measure(task, "loss", loss, False)]
    evaluation = {
        "harness": "text4",
        "model": {"name": name, "quantization": quantization},
        "settings": {"split": "evaluation", "seed": 0, "quick": False} | settings,
        "measures": measures,
        "averages": {},
        "seconds": 1.0,
    }
    return {"versions": {}, "hardware": {}, "evaluations": [evaluation]}


def harness(*measures, quantization=None, **settings):
    evaluation = {
        "harness": "lm-eval",
        "model": {"name": "m", "quantization": quantization},
        "settings": {"lm_eval": "0.4.13", "limit": None, "seed": 1234} | settings,
        "measures": list(measures),
    }
    return {"evaluations": [evaluation]}


@pytest.fixture
def folder(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    record = {"bits": 4, "meta": {"epmq": {"experts": [{"name": "math"}, {"name": "code"}]}}}
    (checkpoint / "quantize_config.json").write_text(json.dumps(record))
    return checkpoint


@pytest.fixture
def files(tmp_path):
    """The five evaluations of a text suite; a test may write others over them."""

    def write(**contents):
        contents = {
            "math": suite({"math": (80.0, 0.5), "code": (10.0, 4.0)}),
            "code": suite({"math": (20.0, 3.0), "code": (60.0, 1.0)}),
            "quantized": suite({"math": (60.0, 0.8), "code": (54.0, 1.25)}, INT4),
            "merged": suite({"math": (64.0, 0.7), "code": (57.0, 1.1)}),
            "base": suite({"math": (8.0, 2.5), "code": (6.0, 2.0)}),
            "gptq": suite({"math": (48.0, 1.0), "code": (45.0, 1.6)}, INT4),
        } | contents
        for name, content in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))

    write()
    return write


def run(folder, *more, experts=("math", "code")):
    here = folder.parent
    arguments = ["retention", folder, "--quantized", here / "quantized.json"]
    for name in experts:
        arguments += ["--expert", f"{name}={here / f'{name}.json'}"]
    return CliRunner().invoke(cli.app, [str(argument) for argument in (*arguments, *more)])


def all_stages(folder):
    return [
        part
        for stage in ("merged", "base", "gptq")
        for part in (f"--{stage}", folder.parent / f"{stage}.json")
    ]


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr, result.stderr


def test_per_cent_of_accuracy_and_of_a_loss():
    better = kept("t", "accuracy", True, 80.0, 60.0, base=8.0, merged=64.0)
    assert better.percent() == 75.0
    assert better.percent("merged") == 80.0 and better.percent("base") == 10.0
    assert better.percent("expert") == 100.0 and better.percent("gptq") is None
    loss = kept("t", "loss", False, 0.5, 0.8)
    assert loss.percent() == 62.5
    # Without anything to be a share of, and where a share would have a strange sign.
    assert kept("t", "mcc", True, 0.0, 0.1).percent() is None
    assert kept("t", "mcc", True, 0.5, -0.1).percent() is None
    assert kept("t", "loss", False, 0.5, 0.0).percent() is None
    assert kept("t", "acc", True, 0.5, 0.0).percent() == 0.0

    both = Retention(experts={"a": better, "b": loss})
    assert both.average() == pytest.approx((75.0 + 62.5) / 2)
    assert both.average("merged") is None
    assert Retention(experts={}).average() is None


def test_the_file_follows_the_contract_and_comes_back(folder, files):
    result = run(folder, *all_stages(folder))
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "epmq_evaluation.json").read_text())
    assert written == {
        "schema": 1,
        "experts": {
            "math": {
                "task": "math",
                "metric": "accuracy",
                "higher_is_better": True,
                "base": 8.0,
                "expert": 80.0,
                "merged": 64.0,
                "gptq": 48.0,
                "quantized": 60.0,
            },
            "code": {
                "task": "code",
                "metric": "accuracy",
                "higher_is_better": True,
                "base": 6.0,
                "expert": 60.0,
                "merged": 57.0,
                "gptq": 45.0,
                "quantized": 54.0,
            },
        },
    }
    read = read_retention(folder)
    assert read.experts["math"].percent() == 75.0 and read.experts["code"].percent("gptq") == 75.0
    assert read.to_dict() == written
    assert {entry.name for entry in folder.iterdir()} == {
        "epmq_evaluation.json",
        "quantize_config.json",
    }
    for part in ("math", "accuracy", "75.0 %", "90.0 %", "average", "82.5 %"):
        assert part in result.stdout


def test_a_metric_of_which_less_is_better(folder, files):
    result = run(folder, "--metric", "math=loss", "--metric", "code=loss")
    assert result.exit_code == 0, result.output
    assert "less is better" in result.stdout and "62.5 %" in result.stdout
    read = read_retention(folder).experts["code"]
    assert (read.metric, read.higher_is_better, read.merged) == ("loss", False, None)
    assert read.percent() == 80.0


def test_some_experts_are_enough_and_the_others_are_named(folder, files):
    result = run(folder, experts=["code"])
    assert result.exit_code == 0, result.output
    assert "not evaluated: math" in result.stderr
    assert list(read_retention(folder).experts) == ["code"]


def test_tasks_of_lm_eval(folder, files):
    scores = {"math": 0.5, "code": 0.25, "quantized": 0.2}
    contents = {
        name: harness(
            measure("gsm8k", "exact_match", value),
            measure("humaneval", "pass@1", value),
            quantization=INT4 if name == "quantized" else None,
            tasks=[name],  # which were asked together does not matter
            batch_size=len(name),
        )
        for name, value in scores.items()
    }
    files(**contents)
    refused(run(folder), "--task", "`math`", "gsm8k, humaneval", "--task math=TASK")
    tasks = ["--task", "math=gsm8k", "--task", "code=humaneval"]
    result = run(folder, *tasks)
    assert result.exit_code == 0, result.output
    read = read_retention(folder)
    assert read.experts["code"].metric == "pass@1"
    assert read.experts["math"].percent() == pytest.approx(40) and read.experts[
        "code"
    ].percent() == pytest.approx(80)

    # The only task that both have needs no option.
    files(**contents | {"math": harness(measure("gsm8k", "exact_match", 0.4))})
    assert run(folder, experts=["math"]).exit_code == 0
    assert read_retention(folder).experts["math"].percent() == pytest.approx(50)

    several = [measure("gsm8k", "acc", 0.5), measure("gsm8k", "acc_norm", 0.6)]
    files(math=harness(*several), quantized=harness(*several, quantization=INT4))
    refused(run(folder, experts=["math"]), "--metric", "acc, acc_norm", "math=METRIC")
    assert run(folder, "--metric", "math=acc_norm", experts=["math"]).exit_code == 0


def test_figures_that_may_not_be_compared_are_refused(folder, files):
    (folder / "epmq_evaluation.json").write_text("before")
    other = {"math": (60.0, 0.8), "code": (54.0, 1.25)}
    files(quantized=suite(other, INT4, seed=1))
    refused(run(folder), "--quantized", "another `seed` than for `--expert math`")
    files(quantized=suite(other, INT4, quick=True))
    refused(run(folder), "another `quick`")
    files(quantized=suite(other, None))
    refused(run(folder), "--quantized", "of a full-precision model", "EPMQ-F54")
    files(merged=suite(other, INT4))
    refused(run(folder, *all_stages(folder)), "--merged", "of a quantized model")
    fewer = suite(other, INT4)
    for one in fewer["evaluations"][0]["measures"]:
        one["items"] = 99
    files(quantized=fewer)
    refused(run(folder), "another `items`")
    files(base=suite({"math": (1.0, 9.0)}))
    refused(run(folder, *all_stages(folder)), "--base", "no figure for `code` (accuracy)")
    unknown = suite({"math": (None, 0.5), "code": (1.0, 1.0)})
    files(math=unknown)
    refused(run(folder), "--expert math", "no figure for `math`")
    files(math=harness(measure("math", "acc", 0.5, None)), quantized=suite(other, INT4))
    refused(run(folder), "does not say whether more is better")
    files()
    refused(run(folder, "--task", "nobody=math"), "--task", "no expert `nobody`")
    refused(run(folder, "--metric", "math=speed"), "no figure for `math` (speed)")
    double = suite(other, INT4)
    double["evaluations"] *= 2
    files(quantized=double)
    refused(run(folder), "`math` is in its file twice")
    # Whatever was refused, the file of before is as it was.
    assert (folder / "epmq_evaluation.json").read_text() == "before"


def test_a_folder_that_is_no_checkpoint_of_ours(folder, files, tmp_path):
    refused(run(folder, "--expert", "law=x.json"), "has no expert `law`; it has math, code")
    (folder / "quantize_config.json").write_text('{"bits": 4, "meta": null}')
    refused(run(folder), "is not a checkpoint of epmq_gptq", "EPMQ-F53")
    (folder / "quantize_config.json").unlink()
    refused(run(folder), "quantize_config.json")
    assert not (folder / "epmq_evaluation.json").exists()


def test_files_that_are_no_evaluation(folder, files):
    for content, part in (
        ({}, "`evaluations` is missing"),
        ({"evaluations": [3]}, "`evaluations[0]` should be a mapping, got 3"),
        ({"evaluations": [{"harness": 1}]}, "`evaluations[0]`: `model` is missing"),
        ([], "should be a JSON object"),
    ):
        files(quantized=content)
        refused(run(folder), "quantized.json", part)
    bad = suite({"math": (60.0, 0.8), "code": (54.0, 1.25)}, INT4)
    bad["evaluations"][0]["measures"][0]["value"] = float("nan")
    files(quantized=bad)
    refused(run(folder), "`evaluations[0].measures[0].value` should be a finite number, got nan")
    (folder.parent / "math.json").unlink()
    refused(run(folder), "math.json")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"schema": 2}, "`schema` should be 1, got 2"),
        ({"experts": None}, "`experts` should be a mapping, got None"),
        ({"quantized": None}, "`experts.math.quantized` should be a number, got None"),
        ({"quantized": True}, "`experts.math.quantized` should be a number, got True"),
        ({"merged": "1"}, "`experts.math.merged` should be a number, got '1'"),
        ({"expert": 10**400}, "`experts.math.expert` should be a number"),
        ({"higher_is_better": 1}, "`experts.math.higher_is_better` should be true or false"),
        ({"task": 5}, "`experts.math.task` should be a text, got 5"),
    ],
)
def test_a_damaged_file_is_refused_by_key(folder, change, part):
    written = Retention(experts={"math": kept("math", "acc", True, 1.0, 0.5)})
    content = json.loads(write_retention(folder, written).read_text())
    where = content if set(change) <= {"schema", "experts"} else content["experts"]["math"]
    where.update(change)
    (folder / "epmq_evaluation.json").write_text(json.dumps(content))
    with pytest.raises(EPMQInputError) as caught:
        read_retention(folder)
    assert part in caught.value.cause and "epmq_evaluation.json" in caught.value.cause
    assert "epmq-gptq retention" in caught.value.remedy


def test_no_file_is_no_retention(folder):
    assert read_retention(folder) is None


def test_names_are_shown_as_they_are(folder, files):
    record = {"meta": {"epmq": {"experts": [{"name": "[bold]x"}]}}}
    (folder / "quantize_config.json").write_text(json.dumps(record))
    files(x=suite({"math": (80.0, 0.5)}))
    result = run(folder, "--expert", f"[bold]x={folder.parent / 'x.json'}", experts=[])
    assert result.exit_code == 0, result.output
    assert "[bold]x" in result.stdout


def test_from_python(folder, files):
    import epmq_gptq

    here = folder.parent
    result = epmq_gptq.retention(
        folder,
        quantized=here / "quantized.json",
        experts={name: here / f"{name}.json" for name in ("math", "code")},
        merged=here / "merged.json",
        metric={"math": "loss"},
    )
    assert repr(result) == "<RetentionResult: 2 experts>"
    assert result.retention.experts["math"].percent() == 62.5 and result.out.parent == folder
    assert json.loads(result.out.read_text()) == result.to_dict()
    assert "62.5 %" in str(result)
    assert read_retention(folder) == result.retention
