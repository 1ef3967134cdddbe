"""The linear layers that the host will quantize, from the model it has built; no weight is read.

Also what is refused for its architecture: what the host has no definition for, layers that are not
linear, and layers whose weight cannot be found in the merged model's own checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import torch
from gptqmodel.models.base import BaseQModel
from gptqmodel.utils.model import get_layers_with_prefixes
from gptqmodel.utils.structure import LazyTurtle

from ..errors import EPMQInputError
from ..experts.linears import ROUTED, Linear, StoredWeight, is_linear, is_transposed

# How many offending layers an error spells out.
_LISTED = 5
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_HALVES = {"gate_proj": 0, "up_proj": 1}


def quantizable_linears(model: BaseQModel) -> Iterator[Linear]:
    """The layers the host will quantize, in forward order, `dynamic` exclusions left out."""
    modules = dict(model.model.named_modules())
    names = _CheckpointNames(model)
    for name, module in _quantizable_modules(model, modules):
        joined = _joined(name, modules, names)
        pieces = {place.tensor for place in joined}
        yield Linear(
            name,
            tuple(module.weight.shape),
            tuple(tensor for tensor in names(f"{name}.weight") if tensor not in pieces),
            joined,
            transposed=is_transposed(module),
        )


# ---- what is refused ---------------------------------------------------------------------------


def check_architecture(model: BaseQModel) -> None:
    """Refuse an architecture whose layers cannot all be quantized towards experts.

    Raises:
        EPMQInputError: the host has no definition for it and would guess; it reads more than text;
            it has layers that are neither ``nn.Linear`` nor transformers' ``Conv1D``, or routed
            modules that the host does not find.
    """
    config = model.model.config
    what = f"`{config.model_type}` ({type(model.model).__name__})"
    if type(model) is BaseQModel:
        raise _refusal(
            f"{what}: GPTQModel has no definition for this architecture and would guess which "
            "layers to quantize.",
            what,
            "Use a model of an architecture in `gptqmodel.models.MODEL_MAP`, or add a definition "
            "for this one to GPTQModel.",
        )
    if _reads_more_than_text(model):
        raise _refusal(
            f"{what}: it reads more than text, and calibration with images or sound is not "
            "supported.",
            what,
            "Merge and quantize its language model, saved as a model of its own.",
        )
    modules = dict(model.model.named_modules())
    others: dict[str, list[str]] = {}
    for name, module in _quantizable_modules(model, modules):
        if not is_linear(module):
            others.setdefault(type(module).__name__, []).append(name)
    if others:
        found = "; ".join(f"{len(n)} x {kind}, such as `{n[0]}`" for kind, n in others.items())
        raise _refusal(
            f"{what}: layers that are neither nn.Linear nor Conv1D cannot be quantized towards "
            f"experts: {found}.",
            what,
            "Leave them out with `dynamic` (`-:` before their name).",
        )
    missed = _missed_routed(model, modules)
    if missed is not None:
        raise _refusal(
            f"{what}: GPTQModel's definition names routed modules such as `{missed}`, but the "
            "model has none of these, so that its routed modules would be left unquantized.",
            what,
            "Use an architecture, or a version of transformers, whose routed modules GPTQModel "
            "finds.",
        )


def check_head(model: BaseQModel) -> None:
    """Refuse `lm_head` where there is no head of its own.

    Raises:
        EPMQInputError: `lm_head` is set and the head shares the embedding's weight, or is missing.
    """
    if not model.quantize_config.lm_head:
        return
    head = dict(model.model.named_modules()).get(model.lm_head)
    if head is None:
        raise _refusal(
            f"`lm_head` is set, but the model has no `{model.lm_head}`.",
            "`lm_head`",
            "Leave `lm_head` out.",
        )
    embedding = model.get_input_embeddings()
    config = model.model.config.get_text_config()
    shared = embedding is not None and head.weight is embedding.weight
    if shared or getattr(config, "tie_word_embeddings", False):
        raise EPMQInputError(
            f"`lm_head` is set, but `{model.lm_head}` shares its weight with the embedding "
            "(`tie_word_embeddings`), which stays as it is.",
            code="EPMQ-F37",
            subject="`lm_head`",
            remedy="Leave `lm_head` out.",
        )


def _refusal(cause: str, subject: str, remedy: str) -> EPMQInputError:
    return EPMQInputError(cause, code="EPMQ-F38", subject=subject, remedy=remedy)


def _reads_more_than_text(model: BaseQModel) -> bool:
    if hasattr(type(model), "row_form"):
        return False  # a definition of ours, which says what it reads
    config = model.model.config
    towers = ("vision_config", "audio_config")
    return any(getattr(config, name, None) is not None for name in towers) or any(
        modality.name != "TEXT" for modality in type(model).modality
    )


def _missed_routed(model: BaseQModel, modules: dict[str, torch.nn.Module]) -> str | None:
    """The first routed module of the definition, if no layer has any of them.

    They are still stacked in one tensor then, or have another name than the definition knows.
    """
    groups, layers = _definition(model)
    routed = [name for group in groups for name in group if _NUMBER.search(name)]
    found = any(f"{layer}.{name}" in modules for layer in layers for name in routed)
    # A model may have dense layers only.
    if found or not any(path.endswith(".experts") for path in modules):
        return None
    return next(iter(routed), None)


# ---- names -------------------------------------------------------------------------------------


def _quantizable_modules(
    model: BaseQModel, modules: dict[str, torch.nn.Module]
) -> Iterator[tuple[str, torch.nn.Module]]:
    """What the host's definition names, in forward order, `dynamic` exclusions left out."""
    config = model.quantize_config
    groups, layers = _definition(model)
    full_names = [f"{layer}.{name}" for layer in layers for group in groups for name in group]
    if config.lm_head:
        full_names.append(model.lm_head)
    for name in full_names:
        module = modules.get(name)
        # Not every layer has every module: dense layers of a mixture, say.
        if module is not None and config.dynamic_get(layer_name=name) is not False:
            yield name, module


def layers_of(model: BaseQModel) -> dict[str, torch.nn.Module]:
    """The layers that the host runs one after the other, by their names."""
    layers, names = get_layers_with_prefixes(model.model, model.extract_layers_node())
    return dict(zip(names, layers, strict=True))


def _definition(model: BaseQModel) -> tuple[list[list[str]], list[str]]:
    """Names of the linear layers within a layer, those with one input together; and the layers."""
    groups = model.simple_layer_modules(
        model_config=model.model.config, quantize_config=model.quantize_config
    )
    return groups, list(layers_of(model))


def _joined(
    name: str,
    modules: dict[str, torch.nn.Module],
    checkpoint_names: Callable[[str], tuple[str, ...]],
) -> tuple[StoredWeight, ...]:
    """Larger tensors that may hold this layer: stacked routed modules, gate and up in one."""
    routed = ROUTED.fullmatch(name)
    if routed is None:
        parent, _, projection = name.rpartition(".")
        half = _HALVES.get(projection)
        wholes = () if half is None else checkpoint_names(f"{parent}.gate_up_proj.weight")
        return tuple(StoredWeight(whole, part=half) for whole in wholes)
    stack, projection, index = routed["stack"], routed["projection"], int(routed["index"])
    if not _stacked_by_rows(modules[stack]):
        return ()
    half = _HALVES.get(projection)
    wholes = () if half is None else checkpoint_names(f"{stack}.gate_up_proj")
    return (
        *(StoredWeight(whole, index, half) for whole in wholes),
        *(StoredWeight(whole, index) for whole in checkpoint_names(f"{stack}.{projection}")),
    )


def _stacked_by_rows(experts: torch.nn.Module) -> bool:
    """Whether transformers stacks these routed modules as (E, out, in), gate rows before up rows.

    A transposed or interleaved stack can have the same shape as a plain one, so this is asked of
    the class and never guessed from shapes.
    """
    transposed = getattr(experts, "is_transposed", None)
    if transposed is not None:
        return not transposed and getattr(experts, "is_concatenated", True)
    # The host's own replacements of such classes are plain lists of modules.
    return isinstance(experts, torch.nn.ModuleList)


class _CheckpointNames:
    """Names under which checkpoints may hold a tensor of the model; the host knows the renamings.

    They are worked out once per kind of layer: only the numbers differ between layers.
    """

    def __init__(self, model: BaseQModel):
        self._source = model.turtle_model or LazyTurtle.maybe_create(
            model_local_path=str(model.model_local_path),
            config=model.model.config,
            module_tree=copy.deepcopy(type(model).module_tree),
            hf_conversion_map_reversed=type(model).resolve_hf_conversion_map_reversed(
                target_model=model.model
            ),
            target_model=model.model,
        )
        self._templates: dict[str, tuple[str, ...]] = {}

    def __call__(self, tensor: str) -> tuple[str, ...]:
        """Most likely first: the name in the model, then those the host would try."""
        numbers = _NUMBER.findall(tensor)
        key = _NUMBER.sub("{}", tensor)
        if key not in self._templates:
            self._templates[key] = tuple(self._candidates(tensor, numbers))
        return tuple(template.format(*numbers) for template in self._templates[key])

    def _candidates(self, tensor: str, numbers: list[str]) -> Iterator[str]:
        module, _, leaf = tensor.rpartition(".")
        found = self._source._checkpoint_tensor_candidates(module, leaf) if self._source else []
        for name in dict.fromkeys((tensor, *found)):
            # The host also tries names without the layer's number; in a checkpoint of one model
            # those would be another tensor.
            if _NUMBER.findall(name) == numbers and not name[0].isdigit() and "." in name:
                yield _NUMBER.sub("{}", name)
