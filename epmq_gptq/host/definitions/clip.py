"""CLIP for GPTQModel: the vision tower, and the text tower where `dynamic` asks for it.

Layers see no mask in the vision tower and a causal one in the text tower. Both towers make one list
of layers, as the host wants it: where the second begins, the texts' embeddings become its input.
"""

from __future__ import annotations

import copy
import functools
import shutil
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from gptqmodel.models import loader as host_loader
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization.config import METHOD
from transformers import CLIPTextConfig
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask

from ...calibration.batches import CalibrationPlan, input_rules
from ...calibration.draws import read_calibration
from ...calibration.images import PROCESSOR_FILES, ImageRow
from ...errors import EPMQInputError
from ...io.declared import conflict
from ...io.families import family_of

ARCHITECTURES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
_VISION, _TEXT = "vision_model", "text_model"
_ROWS = "calibration"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

_LAYER = {
    "layer_norm1": ("layer_norm1:!",),
    "self_attn": ("q_proj:0:in=x", "k_proj:0:in=x", "v_proj:0:in=x", "out_proj:1"),
    "layer_norm2": ("layer_norm2:!",),
    "mlp": ("fc1:0", "fc2:1"),
}


def _without_tokenizer(host_load):
    """A vision tower reads no text, so it may lack the tokenizer that the host wants."""

    @functools.wraps(host_load)
    def load(folder: str, *, model_config: Any = None, **options: Any) -> Any:
        family = family_of(getattr(model_config, "model_type", None))
        is_clip = family is not None and family.name == "clip"
        if is_clip and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
            return None
        return host_load(folder, model_config=model_config, **options)

    return load


def _with_root_tensors(host_load):
    """The host's map of devices names modules; a ``CLIPModel`` has a tensor of its own."""

    @functools.wraps(host_load)
    def load(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        places = options.get("device_map")
        if isinstance(model, transformers.CLIPModel) and places:
            last = list(places.values())[-1]
            own = dict.fromkeys((name for name, _ in model.named_parameters(recurse=False)), last)
            options["device_map"] = own | places
        return host_load(model, *arguments, **options)

    return load


def _wrap(name: str, wrapper: Any) -> None:
    """Replace a function that the host's loader calls, once."""
    function = getattr(host_loader, name)
    if not hasattr(function, "_epmq_clip"):
        wrapped = wrapper(function)
        wrapped._epmq_clip = True
        setattr(host_loader, name, wrapped)


_wrap("load_hf_tokenizer", _without_tokenizer)
_wrap("load_checkpoint_in_model_then_tie_weights", _with_root_tensors)


class ByArchitecture:
    """A loader like transformers' ``AutoModel``, which would drop the projections."""

    @classmethod
    def from_config(cls, config: Any, trust_remote_code: Any = None, **options: Any) -> Any:
        """A model without weights, of the class that ``config`` names."""
        return _prepared(_class_of(config)._from_config(config, **options))

    @classmethod
    def from_pretrained(
        cls, folder: str, *, config: Any, trust_remote_code: Any = None, **options: Any
    ) -> Any:
        """A model with its weights, of the class that ``config`` names."""
        kind = _class_of(config)
        return _prepared(kind.from_pretrained(folder, config=config, **options))


def _patch_embedding(model: torch.nn.Module) -> torch.nn.Module:
    return model.vision_model.embeddings.patch_embedding


def _prepared(model: torch.nn.Module) -> torch.nn.Module:
    """A ``CLIPModel`` with what the host asks of every model."""
    if isinstance(model, transformers.CLIPModel):
        # It has two, so that transformers raises.
        model.get_input_embeddings = types.MethodType(_patch_embedding, model)
        # The host builds a copy for the buffers that no checkpoint holds.
        model.text_model.embeddings.config = model.config.text_config
    return model


def _class_of(config: Any) -> type[torch.nn.Module]:
    named = (getattr(config, "architectures", None) or [None])[0]
    default = "CLIPModel" if config.model_type == "clip" else "CLIPVisionModel"
    if (named or default) not in ARCHITECTURES:
        raise EPMQInputError(
            f"`architectures` of config.json should be one of {', '.join(ARCHITECTURES)}, got "
            f"{named}.",
            code="EPMQ-F38",
            subject="`architectures`",
            remedy="Save the vision tower as a CLIPVisionModel.",
        )
    return getattr(transformers, named or default)


class CLIPQModel(BaseQModel):
    """``CLIPVisionModel``, ``CLIPVisionModelWithProjection`` and ``CLIPModel``.

    Of a ``CLIPModel`` the text tower stays as it is, unless a rule of ``dynamic`` that adds (and
    does not begin with ``-:``) names ``text_model``, as in ``{r"+:text_model\\..*": {}}``. Every
    calibration row has a text then.

    Everything but the quantized layers is saved as the merged model has it. The biases of these
    are in half precision, as the host packs them. ``GPTQModel.load`` or ``load_clip`` load it.
    """

    row_form = "images"
    loader = ByArchitecture
    shared_input_verified_model_types = frozenset({"clip", "clip_vision_model"})

    module_tree = [
        [_VISION, "encoder", "layers", "#", _LAYER],
        [_TEXT, "encoder", "layers", "#", _LAYER],
        ["encoder", "layers", "#", _LAYER],  # of a CLIPVisionModel
    ]

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._running = threading.local()  # the mask of the batch that this thread runs
        if self.reads_text:
            # A layer does not know its place, and the host may run copies of it.
            getattr(self.model, _TEXT).encoder.layers[0].begins_texts = True

    # ---- where things are ------------------------------------------------------------------------

    @classmethod
    def _resolve_effective_module_tree(
        cls, model: torch.nn.Module, quantize_config: Any, detector: Any = None
    ) -> list[Any]:
        """The towers of this model that are quantized."""
        roots = [[_VISION] if hasattr(model, _VISION) else []]
        if hasattr(model, _TEXT) and wants_text_tower(quantize_config):
            roots.append([_TEXT])
        return [[*root, "encoder", "layers", "#", copy.deepcopy(_LAYER)] for root in roots]

    @classmethod
    def get_base_modules(cls, model: torch.nn.Module) -> list[str]:
        """What the first forward pass needs besides the layers."""
        names = []
        for layers in cls.extract_layers_node():
            root = layers.removesuffix("encoder.layers")
            names.append(f"{root}embeddings")
            if not root.startswith(_TEXT):
                names.append(f"{root}pre_layrnorm")
        return names

    @classmethod
    def resolve_hf_conversion_map_reversed(cls, target_model: torch.nn.Module | None = None) -> Any:
        """A ``CLIPVisionModel`` is the tower itself, and checkpoints of the hub name it."""
        if target_model is None or hasattr(target_model, _VISION):
            return None
        return [PrefixChange(prefix_to_add=_VISION)]

    # ---- calibration -----------------------------------------------------------------------------

    def prepare_dataset(
        self,
        calibration_dataset: Any,
        calibration_dataset_concat_size: int | None = None,
        calibration_dataset_sort: str | None = None,
        batch_size: int = 1,
        calibration_data_min_length: int = 10,
        calibration_concat_separator: str | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Rows of images → batches, for the host's own methods.

        Images are all of one size, so nothing is sorted, joined or too short. Without the text
        tower their texts are not read.

        Raises:
            EPMQInputError: a row is no image, or images should be concatenated.
        """
        joined = {
            "calibration_concat_size": calibration_dataset_concat_size,
            "calibration_concat_separator": calibration_concat_separator,
        }
        for option, value in joined.items():
            if value is not None:
                cause = f"cannot be used with images, got {value!r}"
                raise conflict(option, cause, "Leave it out.")
        if self.reads_text and self.quantize_config.method == METHOD.AWQ:
            raise EPMQInputError(
                "`dynamic` asks for CLIP's text tower, which AWQ cannot quantize: GPTQModel would "
                "measure its errors without the causal mask.",
                code="EPMQ-F38",
                subject="`dynamic`",
                remedy="Leave the rule with `text_model` out, or use another method.",
            )
        rules = input_rules(self)
        if not self.reads_text:
            rules = replace(rules, text=None)
        sets = read_calibration({_ROWS: calibration_dataset}, [_ROWS], form=rules.form)
        alike: dict[int, list[ImageRow]] = {}
        for row in rules.encode(sets).rows[_ROWS]:
            # The host's own methods would count padding, so texts of one length go together.
            alike.setdefault(row.length, []).append(row)
        batches = [batch for rows in alike.values() for batch, _ in rules.batches(rows, batch_size)]
        return CalibrationPlan(batches, positions=rules.positions).host_batches

    @property
    def reads_text(self) -> bool:
        """Whether the text tower is quantized."""
        return len(self.effective_module_tree) > 1

    def run_input_capture(
        self, example: dict[str, torch.Tensor], use_cache: bool, data_device: torch.device
    ) -> None:
        """Embed the images of a batch; the host's hook on the first layer keeps what it is given.

        Args:
            example: ``pixel_values (B, C, H, W)``, and ``input_ids (B, S)`` with their
                ``attention_mask`` where there are texts; ids without a mask are filled in by us.

        Raises:
            EPMQInputError: the text tower is quantized and there is no text.
        """
        tower = getattr(self.model, _VISION, self.model)
        pixels = example["pixel_values"].to(tower.embeddings.patch_embedding.weight.device)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        tower.encoder.layers[0](hidden, attention_mask=None, **self._texts(example))

    def _texts(self, example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.reads_text:
            return {}
        if "attention_mask" not in example:
            raise EPMQInputError(
                "`dynamic` asks for CLIP's text tower, and a row of calibration has no `text`.",
                code="EPMQ-F32",
                subject="`calibration`",
                remedy="Give every image a text, or leave the rule with `text_model` out.",
            )
        embeddings = getattr(self.model, _TEXT).embeddings
        ids = example["input_ids"].to(embeddings.token_embedding.weight.device)
        return {"text_states": embeddings(ids), "text_mask": example["attention_mask"].bool()}

    def prepare_layer_replay_kwargs(
        self,
        layer: torch.nn.Module,
        layer_input: list[torch.Tensor],
        additional_inputs: dict[str, Any],
        target_device: torch.device,
    ) -> dict[str, Any]:
        """The mask of this layer's tower; and the first layer of the text tower its input."""
        self._running.mask = None
        if not isinstance(layer.self_attn.config, CLIPTextConfig):
            return {"attention_mask": None}
        if getattr(layer, "begins_texts", False):
            layer_input[0] = additional_inputs["text_states"]
        self._running.mask = additional_inputs["text_mask"]
        mask = create_causal_mask(
            config=layer.self_attn.config,
            inputs_embeds=layer_input[0],
            attention_mask=self._running.mask,
            past_key_values=None,
        )
        return {"attention_mask": mask, "is_causal": True}

    def token_mask(self, name: str) -> torch.Tensor | None:
        """``(B, S)`` bool: the tokens of a text that are no padding; None for images: all count.

        Of the batch that the calling thread runs.
        """
        return getattr(self._running, "mask", None)

    # ---- saving ----------------------------------------------------------------------------------

    def save_quantized(self, save_dir: str, *arguments: Any, **options: Any) -> None:
        """As the host's, with the image processor, which the host keeps for its own models only."""
        super().save_quantized(save_dir, *arguments, **options)
        for name in PROCESSOR_FILES:
            source, target = Path(str(self.model_local_path)) / name, Path(save_dir) / name
            if source.is_file() and not target.exists():
                shutil.copyfile(source, target)

    # ---- AWQ -------------------------------------------------------------------------------------

    def awq_get_modules_for_scaling(
        self, module: torch.nn.Module, input_feat: dict[str, torch.Tensor], module_kwargs: Any
    ) -> list[dict[str, Any]]:
        """The host's groups without fc2: no factor passes the activation between fc1 and fc2."""
        groups = super().awq_get_modules_for_scaling(module, input_feat, module_kwargs)
        return [group for group in groups if group["layers"][0] is not module.mlp.fc2]


def wants_text_tower(quantize_config: Any) -> bool:
    """Whether a rule of ``dynamic`` that adds names the text tower."""
    rules = getattr(quantize_config, "dynamic", None) or {}
    return any(_TEXT in rule and not rule.startswith("-:") for rule in rules)


DEFINITION = CLIPQModel
