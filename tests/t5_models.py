"""Small T5 models for the tests, and pairs of token ids."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from transformers import T5Config, T5ForConditionalGeneration

Pair = dict[str, list[int]]


def t5(gated: bool = True, layers: int = 2, **options) -> T5ForConditionalGeneration:
    """FLAN-T5's kind (gated, own head), or that of T5 (``relu``, the head is the embedding)."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tiny.VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=layers,
        num_decoder_layers=layers,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        **options,
    )
    model = T5ForConditionalGeneration(config).eval()
    if gated:  # transformers 5 makes every new T5 with a shared head; it reads the other kind too
        model.lm_head.weight = torch.nn.Parameter(torch.randn(tiny.VOCABULARY, 64))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:  # as learnt: large enough to matter
                weight.normal_(0, 1.0)
            elif "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def family(folder: Path, experts: int = 2, **options) -> tuple[Path, dict[str, Path]]:
    """Fine-tunes of one T5 and their average: the merge and the experts."""
    return tiny.family(folder, experts, model=t5(**options))


def pairs(count: int, source: int, target: int, seed: int, spread: int = 0) -> list[Pair]:
    """Random pairs; with ``spread`` the lengths vary by so much from row to row."""
    ids = [row["input_ids"] for row in tiny.rows(count, source + target + 2 * spread, seed)]
    rows = []
    for index, row in enumerate(ids):
        first = source + (index * 3) % (spread + 1)
        last = target + (index * 2) % (spread + 1)
        rows.append({"input_ids": row[:first], "labels": row[first : first + last]})
    return rows


def arguments(row: Pair) -> dict[str, torch.Tensor]:
    """The forward's arguments for one pair, unpadded."""
    return {
        "input_ids": torch.tensor([row["input_ids"]]),
        "decoder_input_ids": torch.tensor([[0, *row["labels"][:-1]]]),
    }


def dense(merged: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype):
    """The merged model as transformers reads it, with ``weights (out, in)`` of some layers."""
    model = T5ForConditionalGeneration.from_pretrained(merged, dtype=dtype).eval()
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert module.weight.shape == weight.shape, name
        module.weight.data = weight.to(dtype)
    return model


@torch.no_grad()
def linear_inputs(
    model: T5ForConditionalGeneration, names: list[str], rows: dict[str, list[Pair]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs ``(tokens, in)`` of the named layers per expert, pair by pair: nothing is padded."""
    inputs: dict[str, dict[str, list]] = {name: {} for name in names}
    current = ""

    def catch(name):
        def hook(module, arguments, output):
            inputs[name].setdefault(current, []).append(arguments[0].flatten(0, -2))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(catch(name)) for name in names]
    for current, pairs_of in rows.items():  # noqa: B007 (the hook reads it)
        for row in pairs_of:
            model(**arguments(row))
    for handle in handles:
        handle.remove()
    return {
        name: {expert: torch.cat(pieces) for expert, pieces in found.items()}
        for name, found in inputs.items()
    }
