"""Small CLIP models of the three classes for the tests, and images."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE = 32  # of an image in pixels
TOWER = "vision_model."  # what a checkpoint of the hub has before the names of the vision tower
_SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)

VisionModel = CLIPVisionModel | CLIPVisionModelWithProjection | CLIPModel
CLASSES = (CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel)


def clip(kind: type[VisionModel] = CLIPVisionModelWithProjection, **vision) -> VisionModel:
    """A model with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    tower = dict(image_size=SIZE, patch_size=8, projection_dim=32) | _SHAPE | vision
    if kind is CLIPModel:
        text = dict(max_position_embeddings=24, projection_dim=32) | tiny.TOKENS | _SHAPE
        config = CLIPConfig(
            vision_config=CLIPVisionConfig(**tower),
            text_config=CLIPTextConfig(**text),
            projection_dim=32,
        )
    else:
        config = CLIPVisionConfig(**tower)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_(0, 0.1)
            elif "norm" in name:  # as learnt: channels differ
                weight.uniform_(0.5, 1.5)
            elif weight.ndim >= 2:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model


def save(model: PreTrainedModel, folder: Path, tokenizer: bool = True) -> Path:
    """With its image processor, and a tokenizer if asked."""
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    processor.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer().save_pretrained(folder)
    return folder


def family(
    folder: Path, experts: int = 2, *, tokenizer: bool = True, **options
) -> tuple[Path, dict[str, Path]]:
    """Fine-tunes of one CLIP and their average: the merge and the experts."""
    model = clip(**options)
    states = [tiny.perturbed(model, seed=100 + index) for index in range(experts)]
    paths = {}
    for index, state in enumerate(states):
        model.load_state_dict(state)
        paths[f"expert{index}"] = save(model, folder / f"expert{index}", tokenizer)
    merged = {name: sum(state[name] for state in states) / experts for name in states[0]}
    model.load_state_dict(merged)
    return save(model, folder / "merged", tokenizer), paths


def renamed(folder: Path, target: Path, *, prefixed: bool) -> Path:
    """A copy of a vision model whose tensors are named with, or without, ``vision_model.``."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        bare = name.removeprefix(TOWER)
        tensors[TOWER + bare if prefixed else bare] = tensor
    save_file(tensors, file, {"format": "pt"})
    return target


def images(count: int, seed: int) -> list[torch.Tensor]:
    """Pixel values ``(3, SIZE, SIZE)``; every seed has a ground of its own."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.randn(3, SIZE, SIZE, generator=generator)
    return [ground + 0.7 * torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(count)]


@torch.no_grad()
def embeddings(model: VisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the image side of a model says of pixels ``(B, 3, SIZE, SIZE)``: ``(B, width)``."""
    pixels = pixels.to(model.dtype)
    if isinstance(model, CLIPModel):
        return model.get_image_features(pixel_values=pixels).pooler_output
    out = model(pixel_values=pixels)
    return out.pooler_output if isinstance(model, CLIPVisionModel) else out.image_embeds


def linear_inputs(
    model: VisionModel, weights: dict[str, torch.Tensor], batches: dict[str, list[dict]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs ``(tokens, in)`` float64 of the layers in ``weights``, per expert, when ``model`` runs
    with these weights in place of its own; see ``judge.linear_inputs``.
    """
    model = copy.deepcopy(model).double().eval()
    inputs: dict[str, dict[str, list]] = {name: {} for name in weights}
    expert = ""

    def catch(name):
        def hook(module, arguments, output):
            inputs[name].setdefault(expert, []).append(arguments[0].flatten(0, -2))

        return hook

    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.weight.data = weight.clone()
        module.register_forward_hook(catch(name))
    with torch.no_grad():
        for expert, each in batches.items():  # noqa: B007 (the hook reads it)
            for batch in each:
                model(**batch)
    return {
        name: {expert: torch.cat(pieces) for expert, pieces in found.items()}
        for name, found in inputs.items()
    }


def quadratics(
    module: str,
    merged: Path,
    experts: dict[str, Path],
    inputs: dict[str, torch.Tensor],
    alpha: float,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], float, torch.Tensor]:
    """W_m, [(W_i, H_i)], λ and H_E of eq. 12 for one layer, float64 and from scratch."""
    stored = f"{module}.weight"
    W_m = load_file(merged / "model.safetensors")[stored].double()
    pairs = []
    for name, folder in experts.items():
        X = inputs[name]
        pairs.append((load_file(folder / "model.safetensors")[stored].double(), X.T @ X))
    H = sum(H_i for _, H_i in pairs)
    lam = alpha * float(H.trace()) / H.shape[0]
    return W_m, pairs, lam, H + lam * torch.eye(H.shape[0], dtype=torch.float64)


TEXT_TOO = {r"+:text_model\..*": {}}
WORDS = "a photo of the cats and dogs in a field"


def images_with_texts(count, seed):
    """Images with texts of 4 to 16 tokens, one a byte."""
    return [
        {"pixel_values": pixels, "text": WORDS[seed : seed + 4 + 3 * (index % 5)]}
        for index, pixels in enumerate(images(count, seed))
    ]
