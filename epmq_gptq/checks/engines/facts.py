"""What the rules look at: the same of an export that is planned and of a finished checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ...experts.linears import Linear
from .fused import fused


class Settings(NamedTuple):
    """How one layer is quantized."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True)
class Export:
    """How a model is or shall be quantized, in GPTQModel's options of these names.

    ``format`` is ``"gptq"`` (version 1: zero points are stored less one), ``"gptq_v2"`` (as they
    are) or ``"gptq_p"`` (bits in planes).
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    dynamic: Mapping[str, Any] | None = None
    lm_head: bool = False
    format: str = "gptq"

    @property
    def base(self) -> Settings:
        """The settings of a layer that ``dynamic`` says nothing of."""
        return Settings(self.bits, self.group_size, self.sym, self.desc_act)

    def of(self, module: str) -> Settings | None:
        """The settings of one layer by GPTQModel's rule; None where `dynamic` leaves it out."""
        for pattern, override in (self.dynamic or {}).items():
            # The first pattern that matches the beginning of the name decides.
            if pattern.startswith("-:"):
                if re.match(pattern[2:], module):
                    return None
            elif re.match(pattern.removeprefix("+:"), module):
                known = {k: v for k, v in dict(override).items() if k in Settings._fields}
                return self.base._replace(**known)
        return self.base


class Layer(NamedTuple):
    """One quantized layer ``W: (outputs, inputs)``."""

    name: str
    outputs: int
    inputs: int
    settings: Settings


@dataclass(frozen=True)
class Stored:
    """What only a finished checkpoint can say. A "first layer" is the first of which it is true.

    Attributes:
        faults: what no engine can load, one sentence without a full stop each.
        unlike: name of a configuration file → where it says other than the tensors.
        config_file: whether config.json itself says how the model is quantized.
        silent: what config.json does not say and engines ask for.
        zeros: kind of zero points → first layer. Kinds: ``"v1"`` (all are 2^(bits-1) - 1),
            ``"v2"`` (all are 2^(bits-1)), ``"free"`` (others). Layers that were not read are in
            none.
        reordered: first layer whose ``g_idx`` is not the plain order, or "".
        no_order: first layer without ``g_idx``, or "".
        words: first layer that is packed in other words than int32, or "".
        restricted: what ``modules_in_block_to_quantize`` names; () where it says nothing.
        dense_linears: linear layers that are not quantized.
        dtype: of config.json.
        remote_code: whether config.json names code of the checkpoint's own.
    """

    faults: tuple[str, ...] = ()
    unlike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    config_file: bool = True
    silent: tuple[str, ...] = ()
    zeros: Mapping[str, str] = field(default_factory=dict)
    reordered: str = ""
    no_order: str = ""
    words: str = ""
    restricted: tuple[str, ...] = ()
    dense_linears: tuple[str, ...] = ()
    dtype: str | None = None
    remote_code: bool = False


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        export: what was asked for, or what the configuration says.
        layers: the layers that are quantized, as they will be or are.
        uneven: fused or routed layers whose parts are quantized differently.
        unseen: fused layers for whose own name `dynamic` gives other settings than the parts have.
        config: of the model.
        is_finished: whether it is a checkpoint, and no planned export.
        stored: what only a checkpoint can say; of a planned export nothing.
        tensor_parallel: GPUs that shall share each layer.
    """

    export: Export
    layers: tuple[Layer, ...]
    uneven: tuple[str, ...]
    unseen: tuple[str, ...]
    config: Mapping[str, Any]
    stored: Stored = Stored()
    is_finished: bool = False
    tensor_parallel: int = 1

    @property
    def settings(self) -> dict[Settings, str]:
        """Every distinct way in which a layer is quantized → the first such layer."""
        found: dict[Settings, str] = {}
        for layer in self.layers:
            found.setdefault(layer.settings, layer.name)
        return found

    @property
    def model_type(self) -> str:
        """Of the model's configuration."""
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """The first of ``architectures``; "" where the configuration names none."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @property
    def has_tied_head(self) -> bool:
        """Whether the configuration says that the head is the embedding."""
        return self.config.get("tie_word_embeddings") is True


def planned(export: Export, linears: Iterable[Linear], config: Mapping[str, Any]) -> Facts:
    """Facts of an export that was asked for.

    Args:
        export: what was asked for.
        linears: the layers that may be quantized; those that ``dynamic`` leaves out are not.
        config: of the merged model.
    """
    layers = [
        Layer(linear.name, linear.outputs, linear.inputs, settings)
        for linear in linears
        if (settings := export.of(linear.name)) is not None
    ]
    given = {layer.name: layer.settings for layer in layers}
    return gathered(export, layers, config, lambda part: given.get(part, export.of(part)))


def gathered(
    export: Export,
    layers: Iterable[Layer],
    config: Mapping[str, Any],
    settings_of: Callable[[str], Settings | None],
    stored: Stored | None = None,
) -> Facts:
    """Facts, with what is fused compared.

    Args:
        settings_of: name of a part → its settings, or None where it is not quantized.
        stored: see :class:`Facts`.
    """
    from ..structure import normalised  # which imports these facts

    layers = tuple(layers)
    routed = normalised(config)["experts"]
    inputs = {layer.name: layer.inputs for layer in layers}
    uneven, unseen = [], []
    for whole, parts in fused(inputs, routed if isinstance(routed, int) else 0).items():
        given = {settings_of(part) for part in parts}
        if len(given) > 1:
            uneven.append(whole)
            continue
        width = next(inputs[part] for part in parts if part in inputs)
        if _plain(export.of(whole), width) != _plain(next(iter(given)), width):
            unseen.append(whole)
    found = Facts(export, layers, tuple(uneven), tuple(unseen), config)
    return found if stored is None else replace(found, stored=stored, is_finished=True)


def _plain(settings: Settings | None, inputs: int) -> Settings | None:
    return None if settings is None else plain(settings, inputs)


def plain(settings: Settings, inputs: int) -> Settings:
    """Settings with what means the same spelt the same: one group over all inputs is -1."""
    if settings.group_size == -1 or settings.group_size >= inputs:
        return settings._replace(group_size=-1)
    return settings
