"""lm-eval on our loader: figures equal ones computed here, full precision and quantized."""

import json
import math
import sys

import pytest
import torch
from eval_tasks import TASKS, rows
from typer.testing import CliRunner

from epmq_gptq import EPMQInputError, cli
from epmq_gptq.evaluation import evaluate_tasks, load_model
from epmq_gptq.evaluation.harness import TaskOptions, prepare_tasks
from epmq_gptq.evaluation.loading import Loaded


def by_metric(evaluation):
    return {(m.task, m.metric): m for m in evaluation.measures}


@torch.no_grad()
def log_likelihood(loaded, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of ``continuation``, token by token, in float64."""
    before = loaded.tokenizer(context, add_special_tokens=False)["input_ids"]
    if not before:
        before = [loaded.tokenizer.bos_token_id]
    after = loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + after])
    scores = loaded.module(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(scores[len(before) + index - 1, token].item() for index, token in enumerate(after))


@pytest.mark.parametrize("which", ["merged", "rtn", "epmq"])
def test_figures_equal_an_independent_computation(which, merged, checkpoints, tasks_folder):
    loaded = load_model(merged if which == "merged" else checkpoints[which], device="cpu")
    result = evaluate_tasks(loaded, TASKS, TaskOptions(batch_size=4), include_path=tasks_folder)
    found = by_metric(result)
    right = 0
    for row in rows():
        scores = [log_likelihood(loaded, row["question"], text) for text in row["choices"]]
        right += scores.index(max(scores)) == row["gold"]
    accuracy = found["tiny_choice", "acc"]
    assert accuracy.value == pytest.approx(right / 6)
    assert accuracy.items == 6 and accuracy.higher_is_better
    expected = math.sqrt((right / 6) * (1 - right / 6) / 5)
    assert accuracy.stderr == pytest.approx(expected, rel=0.05, abs=1e-6)
    texts = [row["text"] for row in rows()]
    total = sum(log_likelihood(loaded, "", text) for text in texts)
    bytes_ = sum(len(text.encode()) for text in texts)
    perplexity = found["tiny_perplexity", "byte_perplexity"].value
    assert perplexity == pytest.approx(math.exp(-total / bytes_), rel=1e-3)
    answers = 0
    for row in rows():
        ids = loaded.tokenizer(row["question"], return_tensors="pt", add_special_tokens=False)
        out = loaded.module.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=4,
            do_sample=False,
        )
        text = loaded.tokenizer.decode(
            out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers += text.split("\n")[0] == row["answer"]
    assert found["tiny_answer", "exact_match"].value == pytest.approx(answers / 6)
    assert result.model["quantization"] is None or result.model["quantization"]["bits"] == 4


def test_limit_and_shots_reach_the_harness(merged, tasks_folder):
    loaded = load_model(merged, device="cpu")
    options = TaskOptions(limit=2, batch_size=2)
    result = evaluate_tasks(loaded, ["tiny_choice"], options, include_path=tasks_folder)
    (accuracy,) = result.measures
    assert accuracy.items == 2
    assert result.settings["limit"] == 2 and accuracy.details["num_fewshot"] == 0


def test_refusals(tasks_folder, tmp_path, monkeypatch):
    with pytest.raises(EPMQInputError, match="not a folder"):
        prepare_tasks(["tiny_choice"], tmp_path / "nowhere")
    images = Loaded(torch.nn.Linear(1, 1), tmp_path, "clip", None, "images", None, "float32")
    with pytest.raises(EPMQInputError, match="reads images"):
        evaluate_tasks(images, ["tiny_choice"], include_path=tasks_folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    text = (tasks_folder / "tiny_choice.yaml").read_text().replace("rows.jsonl", "gone.jsonl")
    (broken / "tiny_choice.yaml").write_text(text)
    with pytest.raises(EPMQInputError, match="tiny_choice cannot be prepared"):
        prepare_tasks(["tiny_choice"], broken)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EPMQInputError, match="lm-eval") as error:
        prepare_tasks(["tiny_choice"], tasks_folder)
    assert 'pip install "epmq-gptq[eval]"' in error.value.remedy


def run(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


def test_command_writes_table_and_json(checkpoints, tasks_folder, tmp_path):
    file = tmp_path / "result.json"
    result = run(
        checkpoints["epmq"], "--tasks", "tiny_choice,tiny_perplexity", "--include-path",
        tasks_folder, "--limit", 4, "--device", "cpu", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "tiny_choice" in result.output and "byte_perplexity" in result.output
    report = json.loads(file.read_text())
    assert report["versions"]["lm_eval"] and report["versions"]["gptqmodel"]
    assert report["hardware"]["cores"] >= 1
    (evaluation,) = report["evaluations"]
    assert evaluation["harness"] == "lm-eval" and evaluation["model"]["name"] == "epmq"
    assert evaluation["model"]["quantization"]["linears"] == 14
    measure = {m["task"]: m for m in evaluation["measures"]}["tiny_choice"]
    assert measure["items"] == 4 and 0 <= measure["value"] <= 1 and measure["stderr"] is not None
    assert str(tmp_path) not in file.read_text()


def test_command_pipes_json(merged, tasks_folder):
    result = run(
        merged, "--tasks", "tiny_choice", "--include-path", tasks_folder, "--json", "-",
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["evaluations"][0]["measures"][0]["task"] == "tiny_choice"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "nothing to evaluate on"),
        (["--tasks", "x", "--limit", "0"], "should be positive"),
        (["--tasks", "x", "--batch-size", "many"], "positive integer"),
    ],
)
def test_command_refuses(merged, arguments, part):
    result = run(merged, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and part in result.stderr
