"""Small real models with experts, and RegMean in float64 on whole models with hooks.

The reference shares no code with the package: it loads whole experts, runs them with all hooks on,
keeps every input of every linear layer, and inverts.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from safetensors import safe_open
from tiny import llama, perturbed, save
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from epmq_gptq.calibration.batches import CalibrationPlan
from epmq_gptq.merging import MergeResult, merge

VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
TEXT = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=40,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
T5 = dict(
    vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
)
WORDS = 40
GPT2 = dict(
    vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
)
GEMMA2 = dict(
    vocab_size=WORDS,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sliding_window=4,
)
OPT = dict(
    vocab_size=WORDS,
    hidden_size=16,
    word_embed_proj_dim=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)


def model_of(kind: str) -> PreTrainedModel:
    """One of the architectures."""
    torch.manual_seed(1)
    make = {
        "llama": lambda: llama(hidden=16),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA2)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "clip_projection": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(**VISION, projection_dim=8)
        ),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
        ),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
        "flan_t5": lambda: T5ForConditionalGeneration(
            T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
    }
    return make[kind]().eval()


@torch.no_grad()
def experts_of(
    model: PreTrainedModel, folder: Path, count: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Path, dict[str, Path]]:
    """A base and its fine-tunes, embeddings, norms and biases moved too."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = save(model.to(dtype), folder / "base")
    model.float()
    paths = {}
    for index in range(count):
        model.load_state_dict(base)
        state = perturbed(model, seed=100 + index)
        generator = torch.Generator().manual_seed(index)
        for name, tensor in state.items():
            if tensor.is_floating_point() and (tensor.ndim == 1 or "embed" in name):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        model.load_state_dict(state)
        paths["abcdef"[index]] = save(model.to(dtype), folder / f"expert{index}")
        model.float()
    model.load_state_dict(base)
    return place, paths


# ---- calibration ---------------------------------------------------------------------------------


def _mask(lengths: list[int], left: bool = False) -> torch.Tensor:
    width = max(lengths)
    place = torch.arange(width)
    rows = [place >= width - n if left else place < n for n in lengths]
    return torch.stack(rows)


def plan_of(
    kind: str, experts: list[str], *, batch_size: int = 2, rows: int = 6, longest: int = 6
) -> CalibrationPlan:
    """Rows of different lengths for a kind of model.

    Source and target of the first pairs are padded to one length and masked differently, so that
    shapes do not tell them apart.
    """
    plan = CalibrationPlan()
    for number, expert in enumerate(experts):
        generator = torch.Generator().manual_seed(number)
        items = [_row(kind, index % longest, number, generator) for index in range(rows)]
        for start in range(0, rows, batch_size):
            plan.batches.append(_collate(items[start : start + batch_size]))
            plan.experts.append(expert)
        plan.rows[expert] = rows
        plan.tokens[expert] = sum(len(i.get("input_ids", range(5))) for i in items)
    return plan


def _row(kind: str, index: int, number: int, generator: torch.Generator) -> dict:
    def ids(length: int) -> torch.Tensor:
        # Every expert favours other tokens.
        weights = torch.rand(WORDS, generator=torch.Generator().manual_seed(number)) ** 4
        weights[:3] = 0
        return torch.multinomial(weights, length, replacement=True, generator=generator)

    image = torch.randn((3, 16, 16), generator=generator) * (1 + number)
    if kind in ("clip_vision", "clip_projection", "images"):
        return {"pixel_values": image}
    if kind == "clip":
        return {"pixel_values": image, "input_ids": torch.cat([ids(4 + index), torch.tensor([2])])}
    if "t5" in kind:
        return {"input_ids": ids(4 + index), "decoder_input_ids": ids(3 + 2 * (index % 2))}
    return {"input_ids": ids(5 + index)}


def _collate(items: list[dict]) -> dict[str, torch.Tensor]:
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key == "pixel_values":
            batch[key] = torch.stack(values)
            continue
        mask = _mask([len(value) for value in values])
        padded = torch.zeros(mask.shape, dtype=torch.long)
        padded[mask] = torch.cat(values)
        batch[key] = padded
        batch["attention_mask" if key == "input_ids" else "decoder_attention_mask"] = mask
    return batch


def merged(
    method: str,
    base: Path,
    experts: dict[str, Path],
    out: Path,
    plan: CalibrationPlan,
    gamma: float = 0.9,
    **options,
) -> MergeResult:
    """Merge with a plan."""
    parameters = {"reduce_non_diagonal_ratio": gamma}
    return merge(
        method,
        base=base,
        experts=experts,
        out=out,
        calibration=plan,
        parameters=parameters,
        **options,
    )


# ---- the reference -------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def average(experts: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The mean of every tensor, float64."""
    states = [stored(path) for path in experts.values()]
    return {n: sum(state[n].double() for state in states) / len(states) for n in states[0]}


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the blocks in forward order, spelled out for each architecture."""
    lists = {
        "LlamaForCausalLM": ["model.layers"],
        "GPT2LMHeadModel": ["transformer.h"],
        "CLIPVisionModel": ["encoder.layers"],
        "CLIPVisionModelWithProjection": ["vision_model.encoder.layers"],
        "CLIPModel": ["text_model.encoder.layers", "vision_model.encoder.layers"],
        "T5ForConditionalGeneration": ["encoder.block", "decoder.block"],
    }[type(model).__name__]
    return [f"{p}.{i}" for p in lists for i in range(len(model.get_submodule(p)))]


def _open(folder: Path, kind: type) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


def _forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    model(**arguments)


def _matrix(module: nn.Module) -> torch.Tensor:
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def _linears(model: nn.Module, block: str) -> dict[str, nn.Module]:
    named = model.get_submodule(block).named_modules(prefix=block)
    return {n: m for n, m in named if isinstance(m, (nn.Linear, Conv1D))}


def _inputs(
    model: PreTrainedModel, names: list[str], batches: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """X: (tokens, in) of each linear layer, from rows that run one by one without padding."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            for row in range(len(next(iter(batch.values())))):
                _forward(model, _alone(batch, row))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row without its padding."""
    alone = {}
    for key, value in batch.items():
        mask = {
            "input_ids": "attention_mask",
            "decoder_input_ids": "decoder_attention_mask",
        }.get(key)
        if mask is not None:
            alone[key] = value[row][batch[mask][row]][None]
        elif key == "pixel_values":
            alone[key] = value[row][None]
    return alone


def _solve(weights: list[torch.Tensor], inputs: list[torch.Tensor], gamma: float) -> torch.Tensor:
    top, bottom = 0, 0
    for W, X in zip(weights, inputs, strict=True):
        H = X.T @ X / len(X)
        G = gamma * H + (1 - gamma) * torch.diag(H.diagonal())
        top, bottom = top + W @ G, bottom + G
    return top @ torch.linalg.inv(bottom)


def reference(
    model: PreTrainedModel,
    experts: dict[str, Path],
    plan: CalibrationPlan,
    gamma: float,
    *,
    merged_prefix: bool,
) -> dict[str, torch.Tensor]:
    """Weight name → merged weight as stored, float64, of every linear layer within a block."""
    whole = {name: _open(folder, type(model)) for name, folder in experts.items()}
    batches = {
        name: [b for b, owner in zip(plan.batches, plan.experts, strict=True) if owner == name]
        for name in experts
    }
    whole_merge = _open(next(iter(experts.values())), type(model))
    mean = {
        key: sum(expert.state_dict()[key] for expert in whole.values()) / len(whole)
        for key, value in whole_merge.state_dict().items()
        if value.is_floating_point()
    }
    whole_merge.load_state_dict(mean, strict=False)
    result = {}
    for block in blocks_of(model):
        names = list(_linears(model, block))
        inputs = {}
        for name, expert in whole.items():
            runs = expert
            if merged_prefix:
                # The merged model with this expert's block in place of its own.
                runs = _open(experts[name], type(model))
                state = whole_merge.state_dict() | {
                    key: value
                    for key, value in expert.state_dict().items()
                    if key.startswith(f"{block}.")
                }
                runs.load_state_dict(state)
            inputs[name] = _inputs(runs, names, batches[name])
        for name in names:
            weights = [_matrix(expert.get_submodule(name)) for expert in whole.values()]
            W = _solve(weights, [inputs[e][name] for e in whole], gamma)
            module = whole_merge.get_submodule(name)
            module.weight.data = W.T.contiguous() if isinstance(module, Conv1D) else W
            result[f"{name}.weight"] = module.weight.data.clone()
    return result
