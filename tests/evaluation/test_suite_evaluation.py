"""A model on a suite: figures are the suite's own, for full precision and quantized alike."""

import json
import math

import pytest
import tiny
import torch
from typer.testing import CliRunner

from epmq_gptq import EPMQInputError, cli
from epmq_gptq.evaluation import evaluate_suite, load_model
from epmq_gptq.evaluation.quantizers import QuantizeSettings, quantize
from epmq_gptq.suites import build_suite


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, build_suite("vision8", quick=True, cache=cache, device="cpu")


def figures(evaluation):
    return {(m.task, m.metric): m.value for m in evaluation.measures}


def test_an_expert_is_scored_as_the_suite_scores_it(vision):
    _, suite = vision
    task = suite.tasks[0]
    loaded = load_model(suite.experts[task], device="cpu")
    assert loaded.form == "images" and type(loaded.module).__name__.startswith("CLIPVision")
    result = evaluate_suite(loaded, suite, [task])
    score = suite.evaluate(loaded.module, [task])[task]
    assert figures(result) == {(task, "accuracy"): score.accuracy, (task, "loss"): score.loss}
    share = score.accuracy / 100
    stderr = 100 * math.sqrt(share * (1 - share) / score.items)
    assert result.measures[0].stderr == pytest.approx(stderr)
    assert result.measures[0].items == score.items and not result.averages()


def test_a_quantized_clip_is_its_saved_checkpoint(vision, tmp_path):
    """8 bits stay near the base, and what is not quantized is bit for bit the base's own."""
    _, suite = vision
    out = tmp_path / "rtn"
    settings = QuantizeSettings(bits=8, group_size=32)
    quantize("RTN", suite.base, suite.experts, {t: [] for t in suite.tasks}, settings, out)
    base, loaded = load_model(suite.base, device="cpu"), load_model(out, device="cpu")
    assert loaded.quantization["bits"] == 8 and loaded.quantization["kernel"] == "dense"
    original, packed = base.module.state_dict(), loaded.module.state_dict()
    assert original.keys() == packed.keys()
    changed = {name for name in original if not torch.equal(original[name], packed[name])}
    weights = {name for name in changed if name.endswith("_proj.weight") or ".mlp." in name}
    biases = {name for name in changed if name.endswith(".bias")}
    assert len(weights - biases) == loaded.quantization["linears"] > 0
    # The host packs a quantized layer's bias in float16.
    assert changed == weights | biases
    for name in biases:
        assert torch.equal(original[name].half().float(), packed[name]), name
    before, after = (figures(evaluate_suite(one, suite)) for one in (base, loaded))
    for task in suite.tasks:
        assert after[task, "loss"] == pytest.approx(before[task, "loss"], abs=0.02)


def test_refuses_a_model_of_another_kind_and_unknown_tasks(vision, tmp_path):
    _, suite = vision
    text = load_model(tiny.save(tiny.llama(1, 64), tmp_path / "text"), device="cpu")
    with pytest.raises(EPMQInputError, match="reads images.*reads text"):
        evaluate_suite(text, suite)
    with pytest.raises(EPMQInputError, match="no task `chess`"):
        evaluate_suite(text, suite, ["chess"])


def test_command_takes_some_tasks_of_a_suite(vision, tmp_path, monkeypatch):
    cache, suite = vision
    monkeypatch.setenv("EPMQ_GPTQ_CACHE", str(cache))
    first, second = suite.tasks[:2]
    file = tmp_path / "result.json"
    arguments = [
        "evaluate", str(suite.base), "--suite", "vision8", "--quick", "--device", "cpu",
        "--tasks", f"{first},{second}", "--split", "held_out", "--json", str(file),
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    (evaluation,) = json.loads(file.read_text())["evaluations"]
    expected = suite.evaluate(
        load_model(suite.base, device="cpu").module, [first, second], split="held_out"
    )
    found = {(m["task"], m["metric"]): m["value"] for m in evaluation["measures"]}
    assert found[first, "accuracy"] == expected[first].accuracy
    assert found[second, "loss"] == pytest.approx(expected[second].loss, rel=1e-6)
    mean = (expected[first].accuracy + expected[second].accuracy) / 2
    assert evaluation["averages"]["accuracy"] == pytest.approx(mean)
    assert evaluation["settings"]["split"] == "held_out"
