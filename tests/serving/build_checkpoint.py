"""Makes a checkpoint that the serving tests serve. Run in the project's own environment.

Two small models of one family are fine-tuned from one base, averaged, and the average is quantized.
All text is Python's own standard library, so that nothing is downloaded. Usage: build_checkpoint.py
FAMILY OUT_DIR writes OUT_DIR/{base,code,prose,merged,quantized} and OUT_DIR/corpora.json (token ids
per expert).
"""

import json
import pydoc_data.topics
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 512
GROUP_SIZE = 128
SEQUENCE_TOKENS = 128
CALIBRATION_ROWS = 16
# Enough to learn the small corpora nearly by heart: greedy choices are then clear-cut, and a
# rounding difference between two correct kernels does not flip them.
BASE_STEPS, EXPERT_STEPS = {"llama": 160, "qwen2": 220, "qwen3": 160}, 40
CORPUS_CHARS = 12_000
FAMILIES = tuple(BASE_STEPS)
# Large enough that a checkpoint without its biases says something else.
BIAS_SIZE = 0.3

Rows = list[dict[str, list[int]]]


def read_corpora() -> dict[str, str]:
    """One text per expert: source code, and the prose of Python's help topics."""
    import argparse  # noqa: PLC0415

    topics = pydoc_data.topics.topics
    return {
        "code": Path(argparse.__file__).read_text()[:CORPUS_CHARS],
        "prose": "\n".join(topics[name] for name in sorted(topics))[:CORPUS_CHARS],
    }


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>"
    )


def new_config(family: str) -> PreTrainedConfig:
    # head_dim 64 and sizes divisible by 128: what vLLM's CPU attention and int4 kernels take.
    # Grouped-query attention makes vLLM fuse q, k and v of different widths.
    shape = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    # The small models of both families have no head of their own.
    tied = shape | {"tie_word_embeddings": True}
    if family == "qwen2":
        return Qwen2Config(**tied)
    if family == "qwen3":
        return Qwen3Config(**tied, head_dim=64)
    return LlamaConfig(**shape)


def new_model(family: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(new_config(family))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Qwen2 has biases on q, k and v, which start at zero and would hardly leave it here.
            if name.endswith("_proj.bias"):
                tensor.normal_(0, BIAS_SIZE)
    return model


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, peak_lr: float) -> float:
    """Trains in place on random windows of `tokens` (T,); returns the last loss in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - SEQUENCE_TOKENS, (16,))
        batch = torch.stack([tokens[s : s + SEQUENCE_TOKENS] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def average(models: list[PreTrainedModel], family: str) -> PreTrainedModel:
    states = [model.state_dict() for model in models]
    merged = new_model(family)
    merged.load_state_dict(
        {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
    )
    return merged


def calibration_rows(tokens: list[int]) -> Rows:
    span = (len(tokens) - SEQUENCE_TOKENS) // CALIBRATION_ROWS
    windows = [tokens[i * span : i * span + SEQUENCE_TOKENS] for i in range(CALIBRATION_ROWS)]
    return [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]


def quantize(merged: Path, experts: dict[str, Path], rows: dict[str, Rows], out: Path) -> None:
    """Quantizes the folder `merged` into `out` with E-PMQ."""
    from gptqmodel import GPTQModel

    from epmq_gptq import EPMQConfig

    paths = {name: str(path) for name, path in experts.items()}
    config = EPMQConfig(bits=4, group_size=GROUP_SIZE, experts=paths, alpha=1.0)
    model = GPTQModel.load(str(merged), config, dtype=torch.float32, device="cpu")
    model.quantize(rows, batch_size=4)
    model.save(str(out))


def build(family: str, out: Path) -> None:
    torch.manual_seed(0)
    corpora = read_corpora()
    tokenizer = train_tokenizer(list(corpora.values()))
    token_ids = {name: tokenizer(text)["input_ids"] for name, text in corpora.items()}
    tensors = {name: torch.tensor(ids) for name, ids in token_ids.items()}

    def save(model: PreTrainedModel, name: str) -> Path:
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        return out / name

    base = new_model(family)
    losses = {"base": train(base, torch.cat(list(tensors.values())), BASE_STEPS[family], 3e-3)}
    save(base, "base")
    experts, paths = [], {}
    for name, tokens in tensors.items():
        expert = new_model(family)
        expert.load_state_dict(base.state_dict())
        losses[name] = train(expert, tokens, EXPERT_STEPS, 1e-3)
        experts.append(expert)
        paths[name] = save(expert, name)
    merged = save(average(experts, family), "merged")

    rows = {name: calibration_rows(ids) for name, ids in token_ids.items()}
    quantize(merged, paths, rows, out / "quantized")
    (out / "corpora.json").write_text(json.dumps(token_ids))
    sys.stdout.write(f"last training losses (nats): {losses}\n")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    build(args.family, args.out)
