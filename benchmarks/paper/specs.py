"""What the paper used, as data: models, datasets, settings, and the figures it printed.

Hub ids and dataset columns are those of FusionBench (arXiv 2406.03280), settings those of appendix
E and G of arXiv 2605.16882. ``published.json`` holds the paper's tables, and a few averages that
FusionBench reports of methods the paper lacks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TA8 = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
TALL14 = (*TA8, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100")
TALL20 = (
    *TALL14,
    "cifar10",
    "food101",
    "fashion_mnist",
    "emnist_letters",
    "kmnist",
    "rendered-sst2",
)
GLUE8 = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
# The paper merges four of MergeBench's five domains.
MERGEBENCH4 = ("instruction", "coding", "math", "multilingual")

SUITES = {
    "TA8": TA8,
    "TALL14": TALL14,
    "TALL20": TALL20,
    "GLUE8": GLUE8,
    "MergeBench4": MERGEBENCH4,
}


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset of the hub.

    Attributes:
        path: its id.
        config: of several, else None.
        train: the split that calibration rows are drawn from.
        test: the split that is scored.
        columns: column → the name that this code gives it ("image", "label").
    """

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    columns: dict[str, str] = field(default_factory=dict)


# cifar100: the label column must be the fine one, whatever the copy on the hub calls it.
_FINE = {"fine_label": "label", "img": "image"}

IMAGES: dict[str, DatasetSpec] = {
    "sun397": DatasetSpec("tanganke/sun397"),
    "stanford-cars": DatasetSpec("tanganke/stanford_cars"),
    "resisc45": DatasetSpec("tanganke/resisc45"),
    "eurosat": DatasetSpec("tanganke/eurosat"),
    "svhn": DatasetSpec("ufldl-stanford/svhn", "cropped_digits"),
    "gtsrb": DatasetSpec("tanganke/gtsrb"),
    "mnist": DatasetSpec("ylecun/mnist"),
    "dtd": DatasetSpec("tanganke/dtd"),
    "oxford_flowers102": DatasetSpec("dpdl-benchmark/oxford_flowers102"),
    "pcam": DatasetSpec("1aurent/PatchCamelyon"),
    "fer2013": DatasetSpec("clip-benchmark/wds_fer2013", columns={"jpg": "image", "cls": "label"}),
    "oxford-iiit-pet": DatasetSpec("timm/oxford-iiit-pet"),
    "stl10": DatasetSpec("tanganke/stl10"),
    "cifar100": DatasetSpec("tanganke/cifar100", columns=_FINE),
    "cifar10": DatasetSpec("tanganke/cifar10"),
    "food101": DatasetSpec("ethz/food101", test="validation"),
    "fashion_mnist": DatasetSpec("zalando-datasets/fashion_mnist"),
    "emnist_letters": DatasetSpec("tanganke/emnist_letters"),
    "kmnist": DatasetSpec("tanganke/kmnist"),
    "rendered-sst2": DatasetSpec("nateraw/rendered-sst2"),
}

GLUE: dict[str, DatasetSpec] = {
    task: DatasetSpec(
        "nyu-mll/glue", task, test="validation_matched" if task == "mnli" else "validation"
    )
    for task in GLUE8
}

# Of each domain of MergeBench: its calibration set and the columns of question and answer.
MERGEBENCH: dict[str, tuple[DatasetSpec, str, str]] = {
    "instruction": (DatasetSpec("MergeBench/instruction_val"), "instruction", "output"),
    "coding": (DatasetSpec("MergeBench/coding_val"), "instruction", "response"),
    "math": (DatasetSpec("MergeBench/math_val"), "query", "response"),
    "multilingual": (DatasetSpec("MergeBench/multilingual_val"), "inputs", "targets"),
}

# Column of Table 4 → task of lm-eval, and its metric. The paper names neither prompts nor versions;
# these are lm-eval's tasks for chat models.
LM_TASKS: dict[str, tuple[str, str]] = {
    "gsm8k": ("gsm8k_cot_llama", "exact_match,flexible-extract"),
    "math500": ("minerva_math500", "math_verify,none"),
    "arc_challenge": ("arc_challenge_chat", "exact_match,remove_whitespace"),
    "ifeval": ("ifeval", "prompt_level_strict_acc,none"),
    "humaneval": ("humaneval_instruct", "pass@1,create_test"),
    "mbpp_plus": ("mbpp_plus_instruct", "pass_at_1,extract_code"),
}
RUNS_CODE = ("humaneval", "mbpp_plus")


@dataclass(frozen=True)
class Family:
    """Models of one architecture, and the paper's settings for them.

    Attributes:
        kind: "images", "pairs" or "text".
        base: hub id of the model that all experts were fine-tuned from.
        expert: hub id of the expert of a ``{task}``.
        group_size: weights per scale.
        batch_size: calibration rows per forward pass.
        evaluation_batch: items per forward pass of the evaluation.
        samples: calibration rows per task.
        seqlen: tokens per calibration row at most; None for the model's own limit.
        alpha: anchor strength by merger; the key "" holds for all others.
        dtype: of the evaluation's arithmetic.
    """

    kind: str
    base: str
    expert: str
    group_size: int = 128
    batch_size: int = 32
    evaluation_batch: int = 128
    samples: int = 256
    seqlen: int | None = None
    alpha: dict[str, float] = field(default_factory=lambda: {"": 0.01, "wudi": 10.0})
    dtype: str = "float32"

    def alpha_of(self, merger: str) -> float:
        """The paper's alpha for a merger."""
        return self.alpha.get(merger, self.alpha[""])


def _llama(name: str) -> Family:
    # "Llama-3.1-3B" of the paper does not exist. Which checkpoints it took is not said; MergeBench
    # has exactly these four domains, and the full-precision GSM8K points to its instruct models.
    return Family(
        kind="text",
        base=f"meta-llama/{name}",
        expert=f"MergeBench/{name}_{{task}}",
        group_size=32,
        batch_size=4,
        evaluation_batch=16,
        # 256 in all (appendix E: "each method uses 256 calibration samples").
        samples=64,
        seqlen=512,
        alpha={"": 1.0},
        dtype="bfloat16",
    )


FAMILIES: dict[str, Family] = {
    "clip-b32": Family(
        "images", "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{task}"
    ),
    "clip-l14": Family(
        "images", "openai/clip-vit-large-patch14", "tanganke/clip-vit-large-patch14_{task}"
    ),
    # T5 overflows in float16; its rows are scored in float32.
    "flan-t5-base": Family(
        "pairs", "google/flan-t5-base", "tanganke/flan-t5-base_glue-{task}", evaluation_batch=32
    ),
    "llama-3.2-3b": _llama("Llama-3.2-3B-Instruct"),
    "llama-3.1-8b": _llama("Llama-3.1-8B-Instruct"),
}

# FusionBench's parameters, which are also our defaults; written down so that a change of a default
# does not change a table.
MERGERS: dict[str, dict[str, object]] = {
    "average": {},
    "task_arithmetic": {"lam": 0.3},
    "ties": {"lam": 0.3, "threshold": 20.0, "merge_func": "sum"},
    "wudi": {"iterations": 400, "lr": 1e-5},
    "regmean": {"reduce_non_diagonal_ratio": 0.95},
    "regmean_plusplus": {"reduce_non_diagonal_ratio": 0.95},
}
# Off-diagonal shrink by family kind: FusionBench's for CLIP; RegMean's own for T5 (arXiv
# 2212.09849) and MergeBench's for language models.
REGMEAN_RATIO = {"images": 0.95, "pairs": 0.1, "text": 0.1}
CALIBRATED = ("regmean", "regmean_plusplus")

# "E-PMQ" is the paper's, the last one the package's default.
METHODS = ("FP", "RTN", "GPTQ", "AWQ", "E-PMQ", "E-PMQ-best")

TITLES = {
    "base": "Pre-trained",
    "experts": "Fine-tuned (each on its own task)",
    "average": "Simple Averaging",
    "task_arithmetic": "Task Arithmetic (λ = 0.3)",
    "ties": "TIES-Merging (λ = 0.3)",
    "wudi": "WUDI-Merging",
    "regmean": "RegMean",
    "regmean_plusplus": "RegMean++",
}

# How far a full-precision row may lie from the published one, in points.
ANCHOR_TOLERANCE = 1.0


@cache
def published() -> dict[str, dict]:
    """The paper's tables: "family/suite" → columns, rows and averages."""
    text = (Path(__file__).parent / "published.json").read_text(encoding="utf-8")
    return json.loads(text)


def published_row(family: str, suite: str, key: str) -> dict[str, float]:
    """What is published of one row: column → per cent; empty where nothing is."""
    table = published().get(f"{family}/{suite}", {})
    row = table.get("rows", {}).get(key)
    if row is not None:
        return dict(zip(table["columns"], row, strict=True))
    average = table.get("averages", {}).get(key)
    return {} if average is None else {"average": average}
