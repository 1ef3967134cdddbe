"""The checkpoints of one merge, opened and checked against one another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..experts.weights import refuse_quantized
from ..io.checkpoints import Checkpoint, Source, open_checkpoint
from ..io.dtypes import WEIGHTS
from .companions import companions
from .compatibility import Header, check_copied, check_headers
from .method import Stack


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoints, checked against one another from their headers."""

    base: tuple[Checkpoint, Source] | None
    experts: dict[str, tuple[Checkpoint, Source]]

    @property
    def reference(self) -> Checkpoint:
        """Gives names, dtypes, configuration and tokenizer: the base, else the first expert."""
        return (self.base or next(iter(self.experts.values())))[0]

    def all(self) -> list[tuple[Checkpoint, Source]]:
        """The base, if any, and the experts."""
        return [*([self.base] if self.base else []), *self.experts.values()]

    def stack(self, name: str, with_base: bool, device: torch.device) -> Stack:
        """One tensor of all models; the base's only ``with_base``."""
        return Stack(
            name,
            self.base[0].read(name) if self.base and with_base else None,
            {label: checkpoint.read(name) for label, (checkpoint, _) in self.experts.items()},
            self.stack_dtype(name),
            device,
        )

    def stack_dtype(self, name: str) -> torch.dtype:
        """The dtype of a merged tensor."""
        return WEIGHTS[self.reference.info(name).dtype]


def open_inputs(
    base: str | Path | None, experts: Mapping[str, str | Path], stack: ExitStack
) -> Inputs:
    """Open every checkpoint; ``stack`` closes them.

    Raises:
        EPMQInputError: one cannot be found or read.
    """

    def opened(spec: str | Path, what: str) -> tuple[Checkpoint, Source]:
        checkpoint, source = open_checkpoint(spec, what=what)
        stack.callback(checkpoint.close)
        return checkpoint, source

    return Inputs(
        None if base is None else opened(base, "base"),
        {name: opened(spec, f"expert `{name}`") for name, spec in experts.items()},
    )


def check_inputs(inputs: Inputs) -> list[str]:
    """Refuse what cannot be merged; the names of the tensors that are copied.

    Raises:
        EPMQInputError: tensors that do not match, a quantized model, a configuration that is not
            JSON, or a companion that is a link out of the checkpoint.
    """
    reference = inputs.reference
    what = "the base" if inputs.base else "the first expert"
    headers = {expert: _header(c) for expert, (c, _) in inputs.experts.items()}
    check_headers(_header(reference), what, headers)
    for checkpoint, _ in inputs.all():
        refuse_quantized(checkpoint, checkpoint.what)
    companions(reference)
    copied = [name for name in reference if reference.info(name).dtype not in WEIGHTS]
    for name in copied:
        for expert, (checkpoint, _) in inputs.experts.items():
            check_copied(name, reference.read(name), what, checkpoint.read(name), expert)
    return copied


def _header(checkpoint: Checkpoint) -> dict[str, Header]:
    return {i.name: Header(i.shape, i.dtype) for i in map(checkpoint.info, checkpoint)}
