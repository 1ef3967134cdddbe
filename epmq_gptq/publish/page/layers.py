"""Where in a network a module stands, from its name alone.

``encoder.block.3.layer.1.DenseReluDense.wi`` stands in layer 3 of the stack ``encoder.block``; a
name without a number, such as ``lm_head``, is a layer of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

# Not more digits: a name is a stranger's, and Python refuses to read very long numbers.
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes:
        stack: the part of its modules' names before its number; without one, the module's name.
        index: its number in the stack, None for a module that stands alone.
    """

    stack: str
    index: int | None


def layer_of(module: str) -> Layer:
    """The layer of a module: the first number in its name.

    Later numbers are within the layer: a routed expert, a sub-layer of T5.
    """
    parts = module.split(".")
    for place, part in enumerate(parts):
        if _NUMBER.fullmatch(part):
            return Layer(".".join(parts[:place]), int(part))
    return Layer(module, None)


def kind_of(module: str) -> str:
    """What a module is within its layer, numbers as ``*``: alike for all layers and routed experts.

    >>> kind_of("model.layers.3.mlp.experts.17.down_proj")
    'mlp.experts.*.down_proj'
    """
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if _NUMBER.fullmatch(part)]
    inside = parts[numbers[0] + 1 :] if numbers else parts
    if not inside:  # the layer is the module itself: `heads.3`
        inside = parts[:-1]
    return ".".join("*" if _NUMBER.fullmatch(part) else part for part in inside) or "*"


def layers_in_order(modules: Iterable[str]) -> list[Layer]:
    """Every layer once, in the order in which its first module comes."""
    return list(dict.fromkeys(map(layer_of, modules)))


def layer_labels(layers: Sequence[Layer]) -> list[str]:
    """A short label for each layer: its number, with its stack where there are several."""
    stacks = list(dict.fromkeys(layer.stack for layer in layers if layer.index is not None))
    short = dict(zip(stacks, _short_names(stacks), strict=True))
    labels = []
    for layer in layers:
        if layer.index is None:
            labels.append(layer.stack)
        else:
            labels.append(f"{short[layer.stack]} {layer.index}".strip())
    return labels


def _short_names(stacks: Sequence[str]) -> list[str]:
    """What tells the stacks apart, without the parts of the name that all of them share."""
    if len(stacks) < 2:
        return [""] * len(stacks)
    names = [stack.split(".") for stack in stacks]
    start = len(commonprefix(names))
    end = len(commonprefix([name[start:][::-1] for name in names]))
    short = [".".join(name[start : len(name) - end]) for name in names]
    return [one or stack for one, stack in zip(short, stacks, strict=True)]
