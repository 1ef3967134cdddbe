"""``epmq-gptq check``: what it prints, writes and exits with."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from epmq_gptq.cli import app


def run(*arguments):
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_one_line_per_engine(checkpoint):
    code, out, _ = run(checkpoint("bfloat16"))
    assert code == 0
    assert "LlamaForCausalLM" in out and "7 of 4 bits, group_size 32, sym=True" in out
    for engine in ("vLLM", "SGLang", "transformers", "GPTQModel"):
        assert engine in out
    assert "TGI" not in out and out.rstrip().endswith(
        "served by vLLM, SGLang, transformers, GPTQModel"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 0),  # GPTQModel can
        (["--engine", "vllm"], 2),
        (["--engine", "gptqmodel"], 0),
        (["--engine", "gptqmodel", "--engine", "vllm"], 2),
    ],
)
def test_exit_codes(checkpoint, arguments, expected):
    code, out, _ = run(checkpoint("uneven"), *arguments)
    assert code == expected
    if "vllm" in arguments:
        assert "qkv_proj" in out and "is_layer_gptq_quantized" in out


def test_json_goes_to_a_file_or_to_stdout(checkpoint, tmp_path):
    code, out, _ = run(checkpoint("bfloat16"), "--json", "-", "--tensor-parallel", 2)
    data = json.loads(out)
    assert code == 0 and data["is_served"] and data["tensor_parallel"] == 2
    assert data["engines"]["vLLM"]["verdict"] == "yes"
    assert data["engines"]["GPTQModel"]["verdict"] == "no"
    file = tmp_path / "report.json"
    code, out, _ = run(checkpoint("bits3"), "--json", file, "--engine", "vLLM")
    assert code == 2 and json.loads(file.read_text())["is_served"] is False and "3 bits" in out


def test_errors_are_one_line_and_in_the_json(checkpoint, tmp_path):
    file = tmp_path / "report.json"
    code, _, err = run(tmp_path / "nothing", "--json", file)
    assert code == 2 and "EPMQ-F15" in err and str(tmp_path) not in err
    assert json.loads(file.read_text())["error"]["code"] == "EPMQ-F15"
    code, _, err = run(checkpoint("plain"), "--engine", "ollama")
    assert code == 2 and "`engine` should be one of" in err
