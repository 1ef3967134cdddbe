"""A transformers model without weights: where its layer stacks are, and how weights get in and out.

Merging with calibration, and the experts' own passes while a merge is quantized, run one layer of
one model at a time. A :class:`Skeleton` is the network of the models that are merged, with every
parameter on torch's meta device until :meth:`Skeleton.fill` puts one model's tensors there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import EPMQInputError
from ...io.checkpoints import Checkpoint
from ...io.families import family_of
from ..linears import is_linear, is_transposed

# What checkpoints put before the names of a model's parameters, or leave out, by its class.
_PREFIXES = ("", "model.", "transformer.", "vision_model.")


@dataclass(frozen=True)
class LayerStack:
    """One run of layers of a model, and what it takes to run rows through it.

    Attributes:
        path: of the list of layers, for example ``"encoder.block"``.
        layers: in the order in which they run.
        root: the module whose forward runs them.
        inputs: keys of a batch that ``root`` is called with; others are left out.
        options: further arguments of ``root``.
        mask: key of the mask of the stack's own tokens, None where all count.
        memory_mask: key of the mask of the tokens that it attends to in another stack.
        is_read: whether stacks after it read its outputs.
    """

    path: str
    layers: tuple[nn.Module, ...]
    root: nn.Module
    inputs: tuple[str, ...]
    options: dict[str, Any]
    mask: str | None = None
    memory_mask: str | None = None
    is_read: bool = False

    def name(self, index: int) -> str:
        """The full name of a layer."""
        return f"{self.path}.{index}"

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Full name → linear layer, of one layer."""
        found = self.layers[index].named_modules(prefix=self.name(index))
        return {name: module for name, module in found if is_linear(module)}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as W: (out, in); transformers' Conv1D stores it transposed."""
    weight = module.weight.detach()
    return weight.T if is_transposed(module) else weight


class Skeleton:
    """The network of a checkpoint.

    Args:
        checkpoint: whose configuration says which network it is, and whose tensors have the names
            that all models of the merge share.
        device: where parameters that are filled in live.
        dtype: of them.

    Attributes:
        model: the network.
        stacks: its layer stacks, in the order in which they run.

    Raises:
        EPMQInputError: transformers has no such class, its layers cannot be found, or a parameter
            has no tensor of its own in the checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32
    ):
        self.device, self.dtype = device, dtype
        self._what = checkpoint.what
        self.model = _build(checkpoint)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._modules = dict(self.model.named_modules())
        self.stacks = _stacks(self.model, checkpoint)
        self._names = self._tensor_names(checkpoint, self._what)

    # ---- names -------------------------------------------------------------------------------

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def names_in(
        self, store: Container[str], *, what: str, apart_from: Container[str] = ()
    ) -> dict[str, str]:
        """Parameter → tensor of another model of this network; the head may be left out.

        Args:
            store: its tensors.
            what: how errors call it.
            apart_from: parameters that are read in another way.

        Raises:
            EPMQInputError: a parameter has no tensor of its own there.
        """
        return self._tensor_names(store, what, apart_from)

    def _tensor_names(
        self, checkpoint: Container[str], what: str, apart_from: Container[str] = ()
    ) -> dict[str, str]:
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        buffers = [name for name, tensor in self.model.named_buffers() if _is_floating(tensor)]
        parameters = [name for name in parameters if name not in apart_from]
        layered = [name for name in parameters if self._is_layered(name)]
        rename = self._renaming(layered, checkpoint)
        partners = _tied(self.model)
        head = self._head()
        names: dict[str, str] = {}
        for name in [*parameters, *buffers]:
            found = next((rename(n) for n in partners.get(name, [name]) if rename(n)), None)
            if found is not None:
                names[name] = found
            elif name in parameters and name not in head:
                raise EPMQInputError(
                    f"{what}: parameter `{name}` of {type(self.model).__name__} has no tensor of "
                    "its own in the checkpoint.",
                    code="EPMQ-F38",
                    subject=f"parameter `{name}`",
                    remedy="Layers that a checkpoint stores in pieces or stacked are not run here: "
                    "merge with a method that takes no calibration, such as `average`, and "
                    "quantize with `eta=0, rho=0`.",
                )
        return names

    def _renaming(
        self, layered: Sequence[str], checkpoint: Container[str]
    ) -> Callable[[str], str | None]:
        """Names differ by one prefix at most: a base model saved alone, or within another."""
        own = f"{self.model.base_model_prefix}."
        for prefix in dict.fromkeys((*_PREFIXES, own)):
            if all(prefix + name in checkpoint for name in layered):
                return lambda name, p=prefix: _first(checkpoint, p + name, name)
            if prefix and all(name.removeprefix(prefix) in checkpoint for name in layered):
                return lambda name, p=prefix: _first(checkpoint, name.removeprefix(p), name)
        return lambda name: _first(checkpoint, name)

    def _is_layered(self, name: str) -> bool:
        return any(name.startswith(f"{stack.path}.") for stack in self.stacks)

    def _head(self) -> set[str]:
        """Parameters of the output head, which nothing here reaches."""
        return self._parameters_of(self.model.get_output_embeddings)

    def _parameters_of(self, get: Callable[[], nn.Module | None]) -> set[str]:
        try:
            wanted = get()
        except (AttributeError, NotImplementedError):
            return set()
        paths = [path for path, module in self._modules.items() if module is wanted]
        return {f"{path}.{leaf}" for path in paths for leaf in wanted._parameters}

    def tensor_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter."""
        return self._names[parameter]

    # ---- weights -----------------------------------------------------------------------------

    def outer(self, *, embeddings: bool) -> list[str]:
        """Parameters outside of the stacks that a forward reaches.

        Args:
            embeddings: with those of the input, which only a first layer depends on.
        """
        skipped = self._head() | (set() if embeddings else self._embeddings())
        return [n for n in self._names if not self._is_layered(n) and n not in skipped]

    def _embeddings(self) -> set[str]:
        found = self._parameters_of(self.model.get_input_embeddings)
        partners = _tied(self.model)
        return found | {partner for name in found for partner in partners.get(name, [])}

    def within(self, layer: str) -> list[str]:
        """Parameters of a layer."""
        return [name for name in self._names if name.startswith(f"{layer}.")]

    def fill(self, parameters: Sequence[str], read: Callable[[str], Tensor]) -> None:
        """Put tensors into parameters; ``read`` is called with the checkpoint's names."""
        last: dict[str, Tensor] = {}
        for parameter in parameters:
            name = self._names[parameter]
            if name not in last:
                last[name] = read(name).to(self.device, self.dtype)
            self._set(parameter, last[name])

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Put one tensor into a parameter."""
        self._set(parameter, tensor.to(self.device, self.dtype))

    def empty(self, parameters: Sequence[str]) -> None:
        """Forget tensors that were put into parameters."""
        for parameter in parameters:
            self._set(parameter, self.get(parameter).detach().to("meta"))

    def get(self, parameter: str) -> Tensor:
        """A parameter or buffer as it is now."""
        path, _, leaf = parameter.rpartition(".")
        return getattr(self._modules[path], leaf)

    def _set(self, parameter: str, tensor: Tensor) -> None:
        path, _, leaf = parameter.rpartition(".")
        module = self._modules[path]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


# ---- the network ---------------------------------------------------------------------------------


def _build(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint, its parameters on the meta device and its buffers computed."""
    import transformers
    from accelerate import init_empty_weights

    names = checkpoint.config().get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    try:
        kind = None if name is None else getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # one whose dependencies are not installed
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise _unknown(checkpoint, f"`architectures` of config.json names {name!r}")
    try:
        config = kind.config_class.from_pretrained(str(checkpoint.path))
        with init_empty_weights(include_buffers=False):
            model = kind(config)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _unknown(checkpoint, f"{name} cannot be built: {str(error).rstrip('.')}") from error
    # Buffers that the constructor computed, such as rotary frequencies, are wanted as they are.
    return model.eval().requires_grad_(False)


def _unknown(checkpoint: Checkpoint, cause: str) -> EPMQInputError:
    return EPMQInputError(
        f"{checkpoint.what}: {cause}; a merge with calibration runs the models' layers.",
        code="EPMQ-F38",
        subject=checkpoint.what,
        remedy="Give causal language models, CLIP models or T5 models of transformers, or use a "
        "method that takes no calibration.",
    )


def _stacks(model: nn.Module, checkpoint: Checkpoint) -> list[LayerStack]:
    lists = dict(_layer_lists(model))
    for path, layers in lists.items():
        if not any(is_linear(module) for layer in layers for module in layer.modules()):
            raise _unknown(checkpoint, f"`{path}` of {type(model).__name__} has no linear layers")
    family = family_of(model.config.model_type)
    if family is not None and family.towers:
        return [_clip_stack(model, path, layers) for path, layers in sorted(lists.items())]
    if getattr(model.config, "is_encoder_decoder", False) and len(lists) == 2:
        return [_pair_stack(model, path, layers) for path, layers in lists.items()]
    if len(lists) == 1 and model.main_input_name == "input_ids":
        path, layers = next(iter(lists.items()))
        inputs = ("input_ids", "attention_mask")
        return [LayerStack(path, layers, model, inputs, {"use_cache": False}, "attention_mask")]
    found = ", ".join(f"`{path}`" for path in lists) or "none"
    raise _unknown(
        checkpoint,
        f"{type(model).__name__} should have the layers of one causal language model, of CLIP or "
        f"of an encoder and a decoder, found {found}",
    )


def _layer_lists(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Path → layers of every stack: the outermost lists of what must not be split over devices."""
    whole = set(model._no_split_modules or ())
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{other}.") for other in found)
        if not isinstance(module, nn.ModuleList) or inner or not len(module):
            continue
        if all(type(layer).__name__ in whole for layer in module):
            found.append(path)
            yield path, tuple(module)


def _clip_stack(model: nn.Module, path: str, layers: tuple[nn.Module, ...]) -> LayerStack:
    tower = path.partition(".")[0]
    if tower == "text_model":
        inputs = ("input_ids", "attention_mask")
        return LayerStack(path, layers, model.text_model, inputs, {}, "attention_mask")
    root = model.vision_model if tower == "vision_model" else model
    return LayerStack(path, layers, root, ("pixel_values",), {})


def _pair_stack(model: nn.Module, path: str, layers: tuple[nn.Module, ...]) -> LayerStack:
    inputs = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    options = {"use_cache": False}
    if "decoder" in path.split("."):
        masks = ("decoder_attention_mask", "attention_mask")
        return LayerStack(path, layers, model, inputs, options, *masks)
    return LayerStack(path, layers, model, inputs, options, "attention_mask", is_read=True)


# ---- names ---------------------------------------------------------------------------------------


def _first(checkpoint: Container[str], *names: str) -> str | None:
    return next((name for name in names if name in checkpoint), None)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameter → all parameters that share its tensor, itself first."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, list[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, [source]).append(target)
    return {
        name: [name, *(other for other in group if other != name)]
        for group in groups.values()
        for name in group
    }
