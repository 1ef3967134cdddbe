"""Runs towards the experts' own passes, for the tests that judge them."""

from __future__ import annotations

import tiny
import torch
from judge import dequantized
from runs import run
from transformers import AutoModelForCausalLM

from epmq_gptq import EPMQConfig

BITS, GROUP = 4, 32
# Which layer is added to what, as Llama's code says.
STREAMS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


class Case:
    """Three experts that differ in every tensor, with unequal calibration."""

    def __init__(self, folder):
        self.folder = folder
        # Embeddings and norms differ as well: an expert's own pass is all its own.
        base = tiny.llama()
        states = []
        for index in range(3):
            state = tiny.perturbed(base, seed=100 + index)
            generator = torch.Generator().manual_seed(index)
            for name, tensor in state.items():
                if tensor.ndim == 1 or "embed" in name:
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            states.append(state)
        self.experts = {}
        for index, state in enumerate(states):
            base.load_state_dict(state)
            self.experts[f"expert{index}"] = tiny.save(base, folder / f"expert{index}")
        base.load_state_dict({name: sum(s[name] for s in states) / 3 for name in states[0]})
        self.merged = tiny.save(base, folder / "merged")
        self.rows = {
            name: tiny.rows(4 + 3 * index, 30 + 12 * index, seed=index)
            for index, name in enumerate(self.experts)
        }
        self.batches = {
            name: [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]
            for name, rows in self.rows.items()
        }

    def quantize(self, out, **options):
        config = EPMQConfig(bits=BITS, group_size=GROUP, experts=self.experts, **options)
        report = run(self.merged, config, self.rows, out)["epmq"]
        return dequantized(out), report
