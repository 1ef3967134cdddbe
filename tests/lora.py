"""LoRA adapters of small models."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def peft_model(base, *, seed=0, **options):
    """A PEFT model whose factors were "trained" to something."""
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "down_proj"]} | options)
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.3 * parameter.std().nan_to_num(0.1).clamp(min=0.05) * noise
    return model.eval()
