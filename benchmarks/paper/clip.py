"""CLIP's zero-shot classification, as FusionBench does it: heads, images, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from epmq_gptq.errors import EPMQInputError

from .data import Score, commit_of, draw, load_split
from .specs import IMAGES


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
    from transformers import AutoTokenizer, CLIPModel

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


@dataclass
class ClipBench:
    """The image tasks of one CLIP.

    Attributes:
        whole: folder of the base CLIP, with its text tower and processor.
        tasks: names of FusionBench.
        limit: images per task, None for all.
        workers: processes that prepare images.
    """

    whole: Path
    tasks: tuple[str, ...]
    device: str
    batch_size: int = 128
    limit: int | None = None
    workers: int = 0
    seqlen: int | None = None
    _heads: Heads | None = field(default=None, repr=False)
    _processor: Any = field(default=None, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is scored."""
        return self.tasks

    @property
    def heads(self) -> Heads:
        """Made once."""
        if self._heads is None:
            self._heads = build_heads(self.whole, self.tasks, self.device)
        return self._heads

    @property
    def processor(self) -> Any:
        """The base's image processor."""
        if self._processor is None:
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(self.whole)
        return self._processor

    def datasets(self) -> dict[str, str | None]:
        """Dataset → commit."""
        return {IMAGES[task].path: commit_of(IMAGES[task]) for task in self.tasks}

    def calibration(self, samples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
        """Task → rows of the training split."""
        rows = {}
        for task in self.tasks:
            data = load_split(IMAGES[task], IMAGES[task].train)
            picked = draw(len(data), samples, seed, task)
            rows[task] = [{"image": data[index]["image"].convert("RGB")} for index in picked]
        return rows

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, tasks: Iterable[str]) -> dict[str, Score]:
        """Top-1 accuracy in per cent.

        Args:
            model: a vision tower, on ``device``.
            tasks: some of ``tasks``.
        """
        return {task: self._accuracy(model, task) for task in tasks}

    def _accuracy(self, model: torch.nn.Module, task: str) -> Score:
        data = load_split(IMAGES[task], IMAGES[task].test)
        if self.limit is not None and self.limit < len(data):
            # Splits are often sorted by class: the first rows would be one class.
            data = data.select(sorted(draw(len(data), self.limit, 0, task)))
        images = _Images(data, self.processor, len(class_names(task)[0]), task)
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
