"""The double filled for the tests of ``paper_tables.py``, and judges that share no code with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from fusion_hub import (
    ANSWERS,
    CLIP,
    T5,
    FusionHub,
    clip_expert,
    clip_folder,
    clip_tokenizer,
    dataset_folder,
    greedy,
    pictures,
    pixel_values,
    readme,
    t5_expert,
    t5_folder,
    word_tokenizer,
)
from transformers import CLIPModel

DIGITS = "0123456789"
IMAGE_TASKS = ("mnist", "svhn")
TEXT_TASKS = ("cola", "stsb")
ROWS = 24
TRAIN = 12


@dataclass
class World:
    """What was published, for the judges.

    Attributes:
        folders: hub id → folder.
        images: task → (pictures of the test split, labels).
        texts: task → (prompts of the validation split, answers as text).
    """

    hub: FusionHub
    folders: dict[str, Path] = field(default_factory=dict)
    images: dict[str, tuple[list, list[int]]] = field(default_factory=dict)
    texts: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def publish(self, name: str, folder: Path) -> None:
        """Add a model to the hub."""
        self.folders[name] = folder
        self.hub.add(name, folder)


def build(hub: FusionHub, root: Path) -> World:
    """Publish everything that Table 1 with two tasks and Table 3 with two tasks ask for."""
    world = World(hub)
    _vision(world, root)
    _language(world, root)
    return world


def _vision(world: World, root: Path) -> None:
    clip = clip_folder(root / "clip")
    world.publish(CLIP, root / "clip")
    head = digit_head(clip, clip_tokenizer())
    datasets = {
        "mnist": ("ylecun/mnist", "mnist"),
        "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    }
    for seed, task in enumerate(IMAGE_TASKS):
        folder = root / f"clip-{task}"
        expert = clip_expert(clip, folder, seed)
        world.publish(f"tanganke/clip-vit-base-patch32_{task}", folder)
        images = pictures(ROWS, 10 + seed)
        pooled = pooled_outputs(expert, pixel_values(images, root / "clip"))
        labels = answers(clip, head, pooled).tolist()
        world.images[task] = (images, labels)
        name, config = datasets[task]
        place = root / f"data-{task}"
        splits = {
            "train": {"image": pictures(TRAIN, 20 + seed), "label": [0] * TRAIN},
            "test": {"image": images, "label": labels},
        }
        dataset_folder(place, splits, config)
        readme(place, [config])
        world.hub.add_dataset(name, place)


def _language(world: World, root: Path) -> None:
    words = "one two red blue cat dog runs sleeps very not".split()
    generator = np.random.default_rng(5)

    def sentences(count: int) -> list[str]:
        return [" ".join(generator.choice(words, 5 + i % 4)) for i in range(count)]

    scores = [f"{value / 10:.1f}" for value in range(0, 51, 5)]
    cola = (
        'Indicate if the following sentence is grammatically correct or not: "{0}". Answere '
        "'acceptable' or 'unacceptable'."
    )
    stsb = (
        "Consider the sentences '{0}' and '{1}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity."
    )
    first, second = sentences(ROWS), sentences(ROWS)
    prompts = {
        "cola": [cola.format(one) for one in first],
        "stsb": [stsb.format(one, two) for one, two in zip(first, second, strict=True)],
    }
    tokenizer = word_tokenizer([*prompts["cola"], *prompts["stsb"], *ANSWERS, *scores])
    groups = [(ANSWERS, prompts["cola"]), (scores, prompts["stsb"])]
    base = t5_folder(root / "t5", tokenizer, groups)
    world.publish(T5, root / "t5")
    place = root / "glue"
    for seed, task in enumerate(TEXT_TASKS):
        expert = t5_expert(base, tokenizer, root / f"t5-{task}", 30 + seed)
        world.publish(f"tanganke/flan-t5-base_glue-{task}", root / f"t5-{task}")
        said = [greedy(expert, tokenizer, prompt) for prompt in prompts[task]]
        if task == "cola":
            labels = [int(text == "acceptable") for text in said]
            train = {"sentence": sentences(TRAIN), "label": [i % 2 for i in range(TRAIN)]}
            test = {"sentence": first, "label": labels}
            targets = [ANSWERS[label] for label in labels]
        else:
            labels = [number(text) for text in said]
            train = {"sentence1": sentences(TRAIN), "sentence2": sentences(TRAIN)}
            train["label"] = [float(i % 5) for i in range(TRAIN)]
            test = {"sentence1": first, "sentence2": second, "label": labels}
            targets = [f"{label:.1f}" for label in labels]
        world.texts[task] = (prompts[task], targets)
        splits = {"train": train, "validation": test}
        splits = {k: v | {"idx": list(range(len(v["label"])))} for k, v in splits.items()}
        dataset_folder(place, splits, task)
    readme(place, TEXT_TASKS)
    world.hub.add_dataset("nyu-mll/glue", place)


# ---- judges ------------------------------------------------------------------------------------


@torch.no_grad()
def digit_head(clip: CLIPModel, tokenizer) -> torch.Tensor:
    """The zero-shot head of MNIST and SVHN ``(10, d)`` float64, written from its definition."""
    clip = clip.double()
    rows = []
    for digit in DIGITS:
        ids = torch.tensor([tokenizer(f'a photo of the number: "{digit}".')["input_ids"]])
        pooled = clip.text_model(input_ids=ids)[1]
        row = pooled @ clip.text_projection.weight.T
        rows.append((row / row.norm())[0])
    head = torch.stack(rows)
    clip.float()
    return head / head.norm(dim=1, keepdim=True)


@torch.no_grad()
def pooled_outputs(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """``(B, hidden)`` float64."""
    return torch.cat([model(pixel_values=one[None])[1] for one in pixels]).double()


def answers(clip: CLIPModel, head: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """The class of every image."""
    return (pooled @ clip.visual_projection.weight.detach().double().T @ head.T).argmax(1)


def number(text: str) -> float:
    """What STS-B makes of an answer."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def spearman(first: list[float], second: list[float]) -> float:
    """Spearman's rho with mean ranks for ties, from its definition."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.array(values)
        return np.array([(array < v).sum() + ((array == v).sum() + 1) / 2 for v in array])

    one, two = ranks(first), ranks(second)
    one, two = one - one.mean(), two - two.mean()
    return float((one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum()))
