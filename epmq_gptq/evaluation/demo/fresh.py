"""The last check: a process that knows nothing of this package loads the checkpoint and speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ...errors import EPMQError
from .options import Served

# Runs in the fresh process: GPTQModel only. The answer goes to a file, as the host prints a lot.
_SCRIPT = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
path, request, answer = sys.argv[1:]
torch.set_num_threads(1)
model = GPTQModel.load(path, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
texts = {}
for name, (prompt, count) in json.load(open(request, encoding="utf-8")).items():
    tokenizer = model.tokenizer
    ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
        max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )
    texts[name] = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
linears = sum("Linear" in type(m).__name__ and hasattr(m, "qweight") for m in model.modules())
assert not any(m == "epmq_gptq" or m.startswith("epmq_gptq.") for m in sys.modules)
json.dump({"texts": texts, "packed": linears}, open(answer, "w", encoding="utf-8"))
"""


def generate_elsewhere(
    checkpoint: Path, prompts: Mapping[str, tuple[str, int]], scratch: Path
) -> Served:
    """Load ``checkpoint`` in a new Python that imports GPTQModel alone, and generate greedily.

    Args:
        checkpoint: the saved folder.
        prompts: name → (prompt, how many tokens may follow).
        scratch: where the two processes leave notes for each other.

    Raises:
        EPMQError: it could not, or it came to import ``epmq_gptq``.
    """
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps(dict(prompts)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(checkpoint), str(request), str(answer)],
        cwd=scratch,  # not the checkout, from where epmq_gptq could be imported by accident
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not answer.is_file():
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise EPMQError(
            f"a fresh process could not load `{checkpoint.name}`: {last.rstrip('.')}.",
            code="EPMQ-S01",
            subject=f"`{checkpoint.name}`",
            remedy="Load it with `GPTQModel.load` in a Python of your own to see more.",
        )
    return Served(**json.loads(answer.read_text(encoding="utf-8")))
