"""Checkpoints of ours, served by an unmodified vLLM, say what GPTQModel says.

`epmq-gptq check` is held to what vLLM really does. `make test-serving` runs these; see README.md.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving_reference import MIN_PROMPTS, NEW_TOKENS, Reference
from vllm_server import ServerError, log_tail, serve

from epmq_gptq.checks.engines.table import ARCHITECTURES

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

# Float16 keeps three bits more than bfloat16, with which one of 16 prompts went another way.
DTYPE = "float16"
MAX_LOGPROB_ERROR = 0.03  # nats; measured 0.009
# The stand-in sums in float32 and rounds once; the compiled operator also rounds the dequantized
# weight. Relative to the largest output; measured 0.0007 and 0.0045.
MAX_OPERATOR_ERROR = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2}

STAND_IN_FORCED = {"EPMQ_TEST_FORCE_REFERENCE_OP": "1"}
STAND_IN_REGISTERED = "reference cpu_gemm_wna16 registered"


@dataclass
class Case:
    """A family, and whether the stand-in shall be used where this CPU does not need it."""

    family: str
    forced: bool = False


CASES = {
    "llama": Case("llama"),
    "llama-avx2-library": Case("llama", forced=True),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_server_generates_what_gptqmodel_generates(
    case: Case,
    serving_python: Path,
    environment_report: dict,
    build_dir: Path,
    reference: Callable[[str], Reference],
    verdict: Callable[[Path], dict],
    tmp_path: Path,
) -> None:
    has_operator = environment_report["real_operator"]
    if case.forced and not has_operator:
        pytest.skip("this CPU takes vLLM's AVX2 library anyway: the other case ran the stand-in")
    checkpoint, expected = build_dir / case.family / "quantized", reference(case.family)
    assert verdict(checkpoint)["verdict"] == "yes"

    extra_env = STAND_IN_FORCED if case.forced else {}
    with serve(serving_python, checkpoint, DTYPE, tmp_path, extra_env) as server:
        completions = server.complete(expected.prompts, NEW_TOKENS)

    log = server.log.read_text(errors="replace")
    # vLLM took its int4 path, with the operator that this case is about.
    assert "CPUWNA16LinearKernel" in log, log_tail(server.log)
    assert (STAND_IN_REGISTERED in log) == (case.forced or not has_operator), log_tail(server.log)

    assert len(completions) == len(expected.prompts) >= MIN_PROMPTS
    assert [c.tokens for c in completions] == expected.tokens
    assert all(len(c.tokens) == NEW_TOKENS for c in completions)
    # Stricter than tokens alone: a weight read in a slightly wrong way shows here first.
    error = max(
        abs(got - right)
        for completion, row in zip(completions, expected.logprobs, strict=True)
        for got, right in zip(completion.logprobs, row, strict=True)
    )
    assert error <= MAX_LOGPROB_ERROR


def test_the_families_are_what_they_stand_for(build_dir: Path) -> None:
    """Biases on q, k and v that are not zero; norms per head and a tied head."""
    with safe_open(build_dir / "qwen2" / "quantized" / "model.safetensors", "pt") as qwen2:
        for part in "qkv":
            name = f"model.layers.0.self_attn.{part}_proj.bias"
            assert qwen2.get_tensor(name).float().abs().mean() > 0.05
    with safe_open(build_dir / "qwen3" / "quantized" / "model.safetensors", "pt") as qwen3:
        names = set(qwen3.keys())
    assert "model.layers.0.self_attn.q_norm.weight" in names and "lm_head.weight" not in names


def test_a_lost_bias_would_be_noticed(
    serving_python: Path, build_dir: Path, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    """The control: the same checkpoint with one of its six biases lost says something else."""
    damaged = tmp_path / "damaged"
    shutil.copytree(build_dir / "qwen2" / "quantized", damaged)
    state = load_file(damaged / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.bias"].zero_()
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    expected = reference("qwen2")
    with serve(serving_python, damaged, DTYPE, tmp_path, {}) as server:
        completions = server.complete(expected.prompts, NEW_TOKENS)
    same = [c.tokens == right for c, right in zip(completions, expected.tokens, strict=True)]
    assert not any(same), same


def three_bits(config: dict) -> None:
    config["bits"] = 3


def reordered(config: dict) -> None:
    config["desc_act"] = True


# What is changed in the configuration → a word of vLLM's refusal. Each is refused while vLLM reads
# the configuration, before any weight.
REFUSED = {
    "3-bits": (three_bits, "Unsupported quantization config: bits=3"),
    "desc-act": (reordered, "desc_act=True) is no longer supported"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_check_says_no_to_is_refused(
    change: tuple, serving_python: Path, build_dir: Path, verdict, tmp_path: Path
) -> None:
    edit, told = change
    refused = tmp_path / "refused"
    shutil.copytree(build_dir / "qwen3" / "quantized", refused)
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((refused / name).read_text())
        edit(config.get("quantization_config", config))
        (refused / name).write_text(json.dumps(config))
    assert verdict(refused)["verdict"] == "no"
    with pytest.raises(ServerError) as caught:
        with serve(serving_python, refused, DTYPE, tmp_path, {}):
            pass
    assert told in (tmp_path / "vllm.log").read_text(errors="replace"), str(caught.value)


def test_fused_parts_must_be_alike(
    serving_python: Path, build_dir: Path, verdict, tmp_path: Path
) -> None:
    """v_proj left unpacked, as `dynamic` allows: GPTQModel loads it, vLLM fuses q, k and v."""
    uneven = tmp_path / "uneven"
    shutil.copytree(build_dir / "qwen3" / "quantized", uneven)
    state = load_file(uneven / "model.safetensors")
    dense = load_file(build_dir / "qwen3" / "merged" / "model.safetensors")
    for name in [name for name in state if ".v_proj." in name]:
        del state[name]
    state |= {n: t.clone().half() for n, t in dense.items() if n.endswith("v_proj.weight")}
    save_file(state, uneven / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((uneven / name).read_text())
        config.get("quantization_config", config)["dynamic"] = {r"-:.*\.v_proj": {}}
        (uneven / name).write_text(json.dumps(config))
    told = verdict(uneven)
    assert told["verdict"] == "no" and "qkv_proj" in told["reasons"][0]["reason"]
    with pytest.raises(ServerError):
        with serve(serving_python, uneven, DTYPE, tmp_path, {}):
            pass
    log = (tmp_path / "vllm.log").read_text(errors="replace")
    assert "Detected some but not all shards of model.layers.0.self_attn.qkv_proj" in log


def test_the_list_of_models_is_vllms(environment_report: dict) -> None:
    known = set(environment_report["architectures"])
    assert ARCHITECTURES["vLLM"] <= known, ARCHITECTURES["vLLM"] - known


def test_server_needs_nothing_of_ours(environment_report: dict) -> None:
    assert environment_report["importable"] == []


def test_stand_in_agrees_with_the_compiled_operator(environment_report: dict) -> None:
    if not environment_report["real_operator"]:
        pytest.skip("vLLM has no compiled cpu_gemm_wna16 for this CPU")
    errors = environment_report["errors"]
    assert errors.keys() == MAX_OPERATOR_ERROR.keys()
    for dtype, limit in MAX_OPERATOR_ERROR.items():
        assert errors[dtype] <= limit, dtype
