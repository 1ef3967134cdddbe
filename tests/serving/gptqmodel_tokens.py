"""Greedy continuations by GPTQModel's torch kernel in float32, the reference of the serving tests.

Usage: gptqmodel_tokens.py CHECKPOINT PROMPTS_JSON OUT_JSON. PROMPTS_JSON holds equally long lists
of token ids. OUT_JSON gets, for each prompt, the new `tokens`, the `logprobs` of each, and the
`margins`: by how much (logit) each token beat the runner-up.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompts: torch.Tensor, new_tokens: int) -> list[dict]:
    """Continues `prompts` (B, T). No cache: the plainest loop is the most trustworthy one."""
    tokens, logprobs, margins = prompts, [], []
    for _ in range(new_tokens):
        logits = model(input_ids=tokens, use_cache=False).logits[:, -1].float()
        best = logits.topk(2, dim=-1)
        chosen = best.indices[:, :1]
        margins.append(best.values[:, 0] - best.values[:, 1])
        logprobs.append(logits.log_softmax(-1).gather(1, chosen)[:, 0])
        tokens = torch.cat([tokens, chosen], dim=1)
    new = tokens[:, prompts.shape[1] :]
    return [
        {"tokens": t, "logprobs": p, "margins": m}
        for t, p, m in zip(
            new.tolist(),
            torch.stack(logprobs, 1).tolist(),
            torch.stack(margins, 1).tolist(),
            strict=True,
        )
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--new-tokens", type=int, required=True)
    args = parser.parse_args()

    # GPTQModel loads this kernel in float16 or bfloat16 only. Float16 is what vLLM holds in memory
    # too; computing in float32 on those very weights makes this side the exact one.
    quantized = GPTQModel.load(
        str(args.checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    quantized.model.float().eval()
    if not any(isinstance(module, TorchLinear) for module in quantized.model.modules()):
        raise RuntimeError(f"`{args.checkpoint}` was not loaded with GPTQModel's torch kernel.")
    prompts = torch.tensor(json.loads(args.prompts.read_text()))
    args.out.write_text(json.dumps(greedy(quantized.model, prompts, args.new_tokens)))


if __name__ == "__main__":
    main()
