"""Fixtures of the serving tests; README.md says what they prove."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_checkpoint import FAMILIES
from serving_reference import NEW_TOKENS, Reference, candidate_prompts, keep_clear_cut
from vllm_server import server_env

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SERVING_ENV = ROOT / ".venv-serving"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keeps these slow tests out of `pytest tests`: name this folder or `-m serving`."""
    paths = [Path(arg.split("::")[0]).absolute() for arg in config.args]
    asked = any(path == HERE or HERE in path.parents for path in paths)
    return None if asked or config.option.markexpr == "serving" else True


def run_script(command: list[object], timeout_s: float, **options: object) -> str:
    """Runs a child to its end and returns its output; a failure shows the last of it."""
    result = subprocess.run(
        [str(part) for part in command],
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        **options,
    )
    if result.returncode != 0:
        pytest.fail(f"{command[1]} ended with {result.returncode}:\n{result.stdout[-6000:]}")
    return result.stdout


def project_env() -> dict[str, str]:
    """For the children that use GPTQModel and this checkout."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # More threads slow GPTQ's column loop on small matrices down, and GPTQModel's own worker
        # count cannot be derived on few cores.
        "OMP_NUM_THREADS": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
        # The torch kernel compiles its dequantization: a minute for the same bits.
        "TORCHDYNAMO_DISABLE": "1",
    }


@pytest.fixture(scope="session")
def serving_python() -> Path:
    """The interpreter of the serving environment, which only `setup_env.sh` makes."""
    python = SERVING_ENV / "bin" / "python"
    if python.exists() and (SERVING_ENV / ".stamp").exists():
        return python
    message = f"no serving environment in {SERVING_ENV.name}: run tests/serving/setup_env.sh"
    if os.environ.get("EPMQ_SERVING") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def environment_report(serving_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """See inspect_environment.py. Same environment and kind of folder as the server's."""
    output = run_script(
        [serving_python, HERE / "inspect_environment.py"],
        timeout_s=180,
        cwd=tmp_path_factory.mktemp("inspect"),
        env=server_env(),
    )
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="session")
def build_dir(serving_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Family → what build_checkpoint.py made of it; `EPMQ_SERVING_BUILD` may name such a folder.

    All families at once: on two cores this takes half the time.
    """
    if given := os.environ.get("EPMQ_SERVING_BUILD"):
        return Path(given).absolute()
    out = tmp_path_factory.mktemp("build")
    script = HERE / "build_checkpoint.py"

    def build(family: str) -> None:
        command = [sys.executable, script, family, out / family]
        (out / family).mkdir()
        run_script(command, timeout_s=900, cwd=out / family, env=project_env())

    with ThreadPoolExecutor(len(FAMILIES)) as pool:
        list(pool.map(build, FAMILIES))
    return out


@pytest.fixture(scope="session")
def reference(build_dir: Path, tmp_path_factory) -> Callable[..., Reference]:
    """GPTQModel's greedy continuations of a family's checkpoint, each made once.

    Only prompts are kept where greedy decoding is not a coin toss.
    """
    made: dict[str, Reference] = {}

    def of(family: str) -> Reference:
        if family not in made:
            folder = tmp_path_factory.mktemp("reference")
            corpora = json.loads((build_dir / family / "corpora.json").read_text())
            prompts = candidate_prompts(corpora)
            rows = gptqmodel_rows(build_dir / family / "quantized", prompts, folder)
            made[family] = keep_clear_cut(prompts, rows)
        return made[family]

    return of


def gptqmodel_rows(checkpoint: Path, prompts: list[list[int]], folder: Path) -> list[dict]:
    """What gptqmodel_tokens.py says of a checkpoint."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    command = [sys.executable, HERE / "gptqmodel_tokens.py", checkpoint]
    command += [folder / "prompts.json", folder / "out.json", "--new-tokens", NEW_TOKENS]
    run_script(command, timeout_s=300, cwd=folder, env=project_env())
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="session")
def verdict(tmp_path_factory) -> Callable[..., dict]:
    """What `epmq-gptq check` says of a folder about vLLM; the exit code must agree with it."""

    def of(checkpoint: Path) -> dict:
        file = tmp_path_factory.mktemp("check") / "report.json"
        command = [sys.executable, "-m", "epmq_gptq", "check", checkpoint, "--engine", "vLLM"]
        done = subprocess.run(
            [str(part) for part in [*command, "--json", file]],
            env=project_env(),
            cwd=file.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        report = json.loads(file.read_text())
        assert done.returncode == (0 if report["is_served"] else 2), done.stderr
        return report["engines"]["vLLM"]

    return of
