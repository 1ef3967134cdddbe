"""Real tiny GPTQ checkpoints of every kind that the rules tell apart, and ways to damage one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from epmq_gptq import EPMQConfig
from epmq_gptq.checks.engines import ServingReport, check_checkpoint

LAYER = "model.layers.0"
Q, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"


def llama(**shape: Any) -> PreTrainedModel:
    """Shapes that Marlin takes: q, k, v together have 256 outputs."""
    return tiny.llama(layers=1, hidden=128, **shape)


def qwen3_moe() -> PreTrainedModel:
    """Four routed modules of one layer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **tiny.TOKENS,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[],
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config).eval()


# Name → options of the quantization, and under "model" what is quantized.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"host": True},
    "bits2": {"bits": 2},
    "bits3": {"bits": 3},
    "bits5": {"bits": 5},
    "bits8": {"bits": 8},
    "desc_act": {"desc_act": True, "act_group_aware": False},
    "asym": {"sym": False},
    "v2": {"sym": False, "format": "gptq_v2"},
    "sym_v2": {"format": "gptq_v2"},
    "channel": {"group_size": -1},
    "group16": {"group_size": 16},
    "uneven": {"dynamic": {r".*q_proj": {"bits": 8}}},
    "without_v": {"dynamic": {r"-:.*v_proj": {}}},
    "without_mlp": {"dynamic": {r"-:.*mlp": {}}},
    "down8": {"dynamic": {r".*down_proj": {"bits": 8}}},
    "unseen": {"dynamic": {r".*\.(q|k|v)_proj": {"bits": 8}}},
    "head": {"lm_head": True, "host": True},
    "tied": {"model": lambda: llama(tie_word_embeddings=True)},
    "bfloat16": {"model": lambda: llama().to(torch.bfloat16)},
    "narrow": {"model": lambda: tiny.llama(layers=1, hidden=96, num_key_value_heads=4)},
    "moe": {"model": qwen3_moe},
    "moe_mixed": {"model": qwen3_moe, "dynamic": {r".*experts": {"bits": 8}}},
}


def make(kind: str, folder: Path) -> Path:
    """Quantize and save: by E-PMQ, or with ``host`` by GPTQModel alone."""
    options = {"bits": 4, "group_size": 32, **KINDS[kind]}
    model = options.pop("model", llama)()
    by_host = options.pop("host", False)
    merged, experts = tiny.family(folder / "sources", experts=2, model=model)
    rows = {name: tiny.rows(4, 24, seed=index) for index, name in enumerate(experts)}
    if by_host:
        from gptqmodel import QuantizeConfig

        loaded = tiny.load(merged, QuantizeConfig(**options))
        loaded.quantize([row for part in rows.values() for row in part], batch_size=4)
    else:
        loaded = tiny.load(merged, EPMQConfig(**options, experts=experts, alpha=0.1))
        loaded.quantize(rows)
    loaded.save(str(folder / kind))
    return folder / kind


def damaged(
    checkpoint: Path,
    folder: Path,
    tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
    **files: Callable[[dict[str, Any]], None],
) -> Path:
    """A copy, in a new folder under ``folder``, of which something was changed.

    Args:
        tensors: changes the tensors by name.
        files: name of a JSON file without its suffix → what changes its content.
    """
    copy = Path(tempfile.mkdtemp(dir=folder)) / "damaged"
    shutil.copytree(checkpoint, copy)
    if tensors is not None:
        state = load_file(copy / "model.safetensors")
        tensors(state)
        save_file({n: t.contiguous() for n, t in state.items()}, copy / "model.safetensors")
    for name, change in files.items():
        content = json.loads((copy / f"{name}.json").read_text())
        change(content)
        (copy / f"{name}.json").write_text(json.dumps(content))
    return copy


def verdicts(report: ServingReport) -> str:
    """The verdicts in the order of the engines, as one string."""
    return " ".join(entry["verdict"] for entry in report.engines.values())


def checked(folder: Path, **options: Any) -> str:
    """The verdicts on a folder."""
    return verdicts(check_checkpoint(folder, **options))


def reasons(folder: Path, engine: str, **options: Any) -> str:
    """Why an engine cannot, or only with limits."""
    report = check_checkpoint(folder, engines=[engine], **options)
    return "; ".join(reason["reason"] for reason in report.engines[engine]["reasons"])
