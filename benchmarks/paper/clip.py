"""CLIP's zero-shot classification, as FusionBench does it: heads, images, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from epmq_gptq.errors import EPMQInputError

from .data import Bench, Score
from .specs import IMAGES, DatasetSpec


@dataclass
class Heads:
    """What turns the vision tower's pooled outputs into logits; always the base CLIP's.

    Attributes:
        text: task → ``(classes, d)`` fp32, rows of length 1.
        projection: ``(d, hidden)`` fp32.
        scale: factor of the cosines.
    """

    text: dict[str, torch.Tensor]
    projection: torch.Tensor
    scale: float

    def logits(self, pooled: torch.Tensor, task: str) -> torch.Tensor:
        """``scale · cosine`` of every image and class, ``(B, classes)``.

        Args:
            pooled: ``(B, hidden)`` of the vision tower.
            task: whose classes.
        """
        embedded = pooled.float() @ self.projection.to(pooled.device).T
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        return self.scale * embedded @ self.text[task].to(pooled.device).T


def class_names(task: str) -> tuple[Sequence[str], Sequence[Any]]:
    """Class names in the order of the labels, and templates, of FusionBench."""
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    return get_classnames_and_templates(task)


@torch.no_grad()
def build_heads(whole: Path, tasks: Iterable[str], device: str) -> Heads:
    """Zero-shot heads of the base CLIP in ``whole``.

    Per class: every template rendered and tokenized; the text tower's pooled output, projected; of
    length 1; mean over the templates; of length 1.
    """
    clip = CLIPModel.from_pretrained(whole, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    text = {}
    for task in tasks:
        names, templates = class_names(task)
        rows = []
        for name in names:
            tokens = tokenizer(
                [template(name) for template in templates], return_tensors="pt", padding=True
            )
            pooled = clip.text_model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
            ).pooler_output
            embedded = clip.text_projection(pooled)
            mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
        text[task] = torch.stack(rows).cpu()
    return Heads(text, clip.visual_projection.weight.detach().cpu(), clip.logit_scale.exp().item())


class _Images(torch.utils.data.Dataset):
    """Images as the processor makes them, and labels as class numbers."""

    def __init__(self, rows: Any, processor: Any, classes: int, task: str):
        self.rows, self.processor, self.classes, self.task = rows, processor, classes, task

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        image = row["image"].convert("RGB")
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels, class_number(row["label"], self.classes, self.task)


def class_number(label: Any, classes: int, task: str) -> int:
    """A label as the number of a class; bool counts as 0 and 1.

    Raises:
        EPMQInputError: it is no number, or beyond the classes that FusionBench names.
    """
    if isinstance(label, (bool, int)) and 0 <= int(label) < classes:
        return int(label)
    raise EPMQInputError(
        f"dataset of `{task}`: `label` should be a class number below {classes}, got {label!r}.",
        code="EPMQ-F32",
        subject=f"dataset of `{task}`",
        remedy="Compare the dataset's columns with `paper/specs.py`; it may have changed.",
    )


class ClipBench(Bench):
    """The image tasks of one CLIP; ``whole`` has its text tower and its processor, too."""

    def spec(self, task: str) -> DatasetSpec:
        return IMAGES[task]

    def row(self, task: str, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": item["image"].convert("RGB")}

    @cached_property
    def heads(self) -> Heads:
        """The zero-shot heads of all tasks."""
        return build_heads(self.whole, self.tasks, self.device)

    @cached_property
    def processor(self) -> Any:
        """The base's image processor."""
        return AutoImageProcessor.from_pretrained(self.whole)

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, columns: Iterable[str]) -> dict[str, Score]:
        """Top-1 accuracy of a vision tower in per cent."""
        return {task: self._accuracy(model, task) for task in columns}

    def _accuracy(self, model: torch.nn.Module, task: str) -> Score:
        rows = self.scored_rows(task)
        images = _Images(rows, self.processor, len(class_names(task)[0]), task)
        loader = torch.utils.data.DataLoader(
            images, batch_size=self.batch_size, num_workers=self.workers
        )
        parameter = next(model.parameters())
        right = 0
        for pixels, labels in loader:
            outputs = model(pixel_values=pixels.to(parameter.device, parameter.dtype))
            guesses = self.heads.logits(outputs.pooler_output, task).argmax(-1)
            right += int((guesses.cpu() == labels).sum())
        return Score(100 * right / len(images), len(images))
