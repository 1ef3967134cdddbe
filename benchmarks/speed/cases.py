"""What is timed: models with random weights, their experts, rows, and the quantizers."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

ALPHA = 0.05  # also GPTQ's damping, so that all solve equally conditioned systems

# Name → what it is. The first is what ratios are of.
QUANTIZERS = {
    "gptq": "stock GPTQModel",
    "fast": "our Gram and factor, no experts (GPTQ's result: the merge is its one expert)",
    "paper": "the paper's targets",
    "best": "the default targets",
}


@dataclass(frozen=True)
class Case:
    """One model, so many experts, so many calibration tokens.

    Attributes:
        name: of the model's shape.
        experts: K.
        tokens: of all experts together.
        cold: whether the experts' files are put out of the system's cache before each run.
    """

    name: str
    experts: int
    tokens: int
    cold: bool = False

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return SHAPES[self.name]

    @property
    def key(self) -> str:
        """One word for files and JSON."""
        return f"{self.name}-K{self.experts}-{self.tokens}{'-cold' if self.cold else ''}"


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        kind: "llama" or "clip".
        width, hidden, layers: of it.
        length: tokens of a row.
        heads, kv_heads: of its attention.
        device, dtype: where and how it runs.
        batch: rows of a forward pass.
    """

    kind: str
    width: int
    hidden: int
    layers: int
    length: int
    heads: int = 8
    kv_heads: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 8


SHAPES = {
    "llama-256": Shape("llama", 256, 512, 2, 64),
    "llama-512": Shape("llama", 512, 2048, 2, 256),
    "llama-1024": Shape("llama", 1024, 2816, 1, 256),
    # 17 tokens of an image of 32 pixels in patches of 8, the class token with them.
    "clip-384": Shape("clip", 384, 1536, 4, 17, batch=64),
    "llama-8b": Shape("llama", 4096, 14336, 2, 512, 32, 8, "cuda", "bfloat16"),
}


def build(case: Case, folder: Path) -> None:
    """Save the merge and its experts."""
    import tiny

    shape = case.shape
    if shape.kind == "clip":
        import clip_models

        clip_models.family(
            folder,
            case.experts,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
        )
        return
    model = tiny.llama(
        shape.layers,
        shape.width,
        intermediate_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.length,
    )
    if shape.dtype != "float32":
        model = model.to(getattr(__import__("torch"), shape.dtype))
    tiny.family(folder, case.experts, model=model)


def rows_of(case: Case) -> dict[str, list]:
    """Expert → its rows."""
    import tiny

    shape, count = case.shape, case.tokens // case.shape.length // case.experts
    if shape.kind == "clip":
        import clip_models

        return {f"expert{i}": clip_models.images(count, seed=i) for i in range(case.experts)}
    return {f"expert{i}": tiny.rows(count, shape.length, seed=i) for i in range(case.experts)}


def config_of(quantizer: str, folder: Path, names: list[str]) -> Any:
    """The configuration of one of :data:`QUANTIZERS`."""
    from gptqmodel.quantization.config import GPTQConfig

    from epmq_gptq import EPMQConfig

    grid = dict(bits=4, group_size=128)
    if quantizer == "gptq":
        return GPTQConfig(**grid, damp_percent=ALPHA)
    if quantizer == "fast":
        experts = {"merge": str(folder / "merged")}
        return EPMQConfig(**grid, profile="paper", experts=experts, alpha=ALPHA)
    experts = {name: str(folder / name) for name in names}
    if quantizer == "paper":
        return EPMQConfig(**grid, profile="paper", experts=experts, alpha=ALPHA)
    return EPMQConfig(**grid, experts=experts)


def to_json(case: Case) -> str:
    """For a worker."""
    return json.dumps(dataclasses.asdict(case))


def from_json(text: str) -> Case:
    """Of :func:`to_json`."""
    return Case(**json.loads(text))
