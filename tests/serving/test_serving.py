"""A checkpoint of ours, served by an unmodified vLLM, says what GPTQModel says.

`make test-serving` runs these; see README.md.
"""

from pathlib import Path

import pytest
from serving_reference import MIN_PROMPTS, NEW_TOKENS, Reference
from vllm_server import log_tail, serve

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

# Float16 keeps three bits more than bfloat16, with which one of 16 prompts went another way.
DTYPE = "float16"
MAX_LOGPROB_ERROR = 0.03  # nats; measured 0.009
# The stand-in sums in float32 and rounds once; the compiled operator also rounds the dequantized
# weight. Relative to the largest output; measured 0.0007 and 0.0045.
MAX_OPERATOR_ERROR = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2}

STAND_IN_FORCED = {"EPMQ_TEST_FORCE_REFERENCE_OP": "1"}
STAND_IN_REGISTERED = "reference cpu_gemm_wna16 registered"


@pytest.mark.parametrize("stand_in", [False, True], ids=["this-cpu", "avx2-library"])
def test_server_generates_what_gptqmodel_generates(
    stand_in: bool,
    serving_python: Path,
    environment_report: dict,
    served_checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    has_operator = environment_report["real_operator"]
    if stand_in and not has_operator:
        pytest.skip("this CPU takes vLLM's AVX2 library anyway: the other case ran the stand-in")

    extra_env = STAND_IN_FORCED if stand_in else {}
    with serve(serving_python, served_checkpoint, DTYPE, tmp_path, extra_env) as server:
        completions = server.complete(reference.prompts, NEW_TOKENS)

    log = server.log.read_text(errors="replace")
    # vLLM took its int4 path, with the operator that this case is about.
    assert "CPUWNA16LinearKernel" in log, log_tail(server.log)
    assert (STAND_IN_REGISTERED in log) == (stand_in or not has_operator), log_tail(server.log)

    assert len(completions) == len(reference.prompts) >= MIN_PROMPTS
    assert [c.tokens for c in completions] == reference.tokens
    assert all(len(c.tokens) == NEW_TOKENS for c in completions)
    # Stricter than tokens alone: a weight read in a slightly wrong way shows here first.
    error = max(
        abs(got - expected)
        for completion, row in zip(completions, reference.logprobs, strict=True)
        for got, expected in zip(completion.logprobs, row, strict=True)
    )
    assert error <= MAX_LOGPROB_ERROR


def test_server_needs_nothing_of_ours(environment_report: dict) -> None:
    assert environment_report["importable"] == []


def test_stand_in_agrees_with_the_compiled_operator(environment_report: dict) -> None:
    if not environment_report["real_operator"]:
        pytest.skip("vLLM has no compiled cpu_gemm_wna16 for this CPU")
    errors = environment_report["errors"]
    assert errors.keys() == MAX_OPERATOR_ERROR.keys()
    for dtype, limit in MAX_OPERATOR_ERROR.items():
        assert errors[dtype] <= limit, dtype
