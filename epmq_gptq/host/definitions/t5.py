"""T5 and FLAN-T5 for GPTQModel: two stacks, the second of which reads the first one's result.

The host runs one list of layers and hands each the last one's output. Encoder blocks come first,
then decoder blocks; in between, the encoder's output (of quantized blocks, normed) becomes what
every decoder block looks at, and the decoder's embeddings become the input.

Two masks go with a batch. Padding of the source is hidden from what reads the encoder's states,
padding of the target from the rest.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from gptqmodel.models.base import BaseQModel
from torch.nn.functional import embedding
from transformers import AutoModelForSeq2SeqLM
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.t5.modeling_t5 import T5Block

from .t5_awq import scaling_groups
from .t5_description import describe
from .t5_rows import batches_of_pairs

_ATTENTION = ("q:0:in=x", "k:0:in=x", "v:0:in=x", "o:1")
# Keys and values read the encoder's states, the queries the decoder's.
_CROSS_ATTENTION = ("q:0", "k:0:in=encoder", "v:0:in=encoder", "o:1")
# A model has either `wi` or the other two (gated).
_FEED_FORWARD = ("wi:0", "wi_0:0:in=x", "wi_1:0:in=x", "wo:1")


class T5QModel(BaseQModel):
    """``T5ForConditionalGeneration``: T5, T5 v1.1, FLAN-T5."""

    row_form = "pairs"
    loader = AutoModelForSeq2SeqLM
    layer_modules_strict = False  # `wi` or `wi_0` and `wi_1`; the encoder has no third sub-layer
    shared_input_verified_model_types = frozenset({"t5"})
    pre_lm_head_norm_module = "decoder.final_layer_norm"

    module_tree = [
        [
            "encoder",
            "block",
            "#",
            {"layer.0.SelfAttention": _ATTENTION, "layer.1.DenseReluDense": _FEED_FORWARD},
        ],
        [
            "decoder",
            "block",
            "#",
            {
                "layer.0.SelfAttention": _ATTENTION,
                "layer.1.EncDecAttention": _CROSS_ATTENTION,
                "layer.2.DenseReluDense": _FEED_FORWARD,
            },
        ],
    ]

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._running = threading.local()  # the masks of the batch that this thread runs
        self._position_tables: dict[bool, torch.Tensor] = {}  # is it the decoder's? → (buckets, h)
        self._encoder_norm: tuple[torch.nn.Module, torch.Tensor] | None = None
        self._own_head = self._keep_own_head()

    def _keep_own_head(self) -> bool:
        """Let nothing tie a head of its own (T5 v1.1, FLAN-T5) to the embedding; is it one?

        transformers 5 calls every T5 tied, and tells the two kinds apart by the weights it has
        read. The host reads them later, and ties whenever it has read some.
        """
        model, turtle = self.model, self.turtle_model
        if turtle is not None:  # nothing is read yet
            head, shared = (
                turtle.checkpoint_tensors_for_submodule(
                    target_model=model, target_submodule=module, recurse=False
                ).get("weight")
                for module in (model.lm_head, model.shared)
            )
            own = head is not None and shared is not None and not torch.equal(head, shared)
            if own:
                model.lm_head.weight = torch.nn.Parameter(
                    torch.empty_like(model.lm_head.weight), requires_grad=False
                )
        else:
            own = model.lm_head.weight is not model.shared.weight
        if own:
            model._tied_weights_keys = _without_head(model._tied_weights_keys)
            model.all_tied_weights_keys = _without_head(model.all_tied_weights_keys)
        return own

    @classmethod
    def get_base_modules(cls, model: torch.nn.Module) -> list[str]:
        """What the first forward pass needs besides the blocks."""
        return ["shared", *super().get_base_modules(model)]

    @classmethod
    def simple_layer_modules(
        cls, model_config: Any, quantize_config: Any, **options: bool
    ) -> list[list[str]]:
        """The linear layers of a block, those with one input together."""
        groups = super().simple_layer_modules(model_config, quantize_config, **options)
        return _existing(groups, model_config)

    @classmethod
    def full_layer_modules(cls, model_config: Any = None, **options: bool) -> list[list[str]]:
        """The same, with what the configuration leaves out."""
        return _existing(super().full_layer_modules(model_config, **options), model_config)

    def after_model_load(
        self, model: torch.nn.Module, load_quantized_model: bool
    ) -> torch.nn.Module:
        """The model, with packed layers that transformers' feed-forward can ask for a weight."""
        if load_quantized_model:
            _name_weights(model)
        return model

    def after_quantize(self) -> None:
        """Let the model run as it is in memory."""
        super().after_quantize()
        _name_weights(self.model)

    def save_quantized(self, save_dir: str, *arguments: Any, **options: Any) -> None:
        """Save as the host does, and say in config.json what other readers have to guess."""
        super().save_quantized(save_dir, *arguments, **options)
        packed = [name for name, module in self.model.named_modules() if hasattr(module, "qweight")]
        describe(Path(save_dir), packed, own_head=self._own_head)

    def prepare_dataset(
        self,
        calibration_dataset: Any,
        calibration_dataset_concat_size: int | None = None,
        calibration_dataset_sort: str | None = None,
        batch_size: int = 1,
        calibration_data_min_length: int = 10,
        calibration_concat_separator: str | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Pairs → batches, for the host's own methods; see ``batches_of_pairs``.

        The order of batches changes no sum, so ``calibration_dataset_sort`` has nothing to do; and
        no pair is too short, so neither has ``calibration_data_min_length``.

        Raises:
            EPMQInputError: a row is no pair, or pairs should be concatenated.
        """
        return batches_of_pairs(
            self,
            calibration_dataset,
            batch_size,
            calibration_concat_size=calibration_dataset_concat_size,
            calibration_concat_separator=calibration_concat_separator,
        )

    # ---- the inputs of the two stacks ----------------------------------------------------------

    def run_input_capture(
        self, example: dict[str, torch.Tensor], use_cache: bool, data_device: torch.device
    ) -> None:
        """Embed both sides of a batch; the host's hook on the first block keeps what it is given.

        Args:
            example: ``input_ids (B, S)``, ``decoder_input_ids (B, T)``, and ``attention_mask`` and
                ``decoder_attention_mask`` of the same shapes where there is padding.
        """
        encoder, decoder = self.model.encoder, self.model.decoder
        if self._encoder_norm is None:
            # The host may put the original out of memory once the blocks run.
            norm = encoder.final_layer_norm
            self._encoder_norm = (norm, norm.weight.detach().clone())
        ids, decoder_ids = example["input_ids"], example["decoder_input_ids"]
        encoder.block[0](
            encoder.embed_tokens(ids),
            attention_mask=_mask_or_ones(example.get("attention_mask"), ids),
            decoder_embeddings=decoder.embed_tokens(decoder_ids),
            decoder_mask=_mask_or_ones(example.get("decoder_attention_mask"), decoder_ids),
        )

    def prepare_layer_replay_kwargs(
        self,
        layer: torch.nn.Module,
        layer_input: list[torch.Tensor],
        additional_inputs: dict[str, Any],
        target_device: torch.device,
    ) -> dict[str, Any]:
        """What the stack would give this block; and the first decoder block its input."""
        masks = additional_inputs["attention_mask"], additional_inputs["decoder_mask"]
        self._running.encoder_mask, self._running.mask = masks
        if not isinstance(layer, T5Block):
            return additional_inputs  # lm_head, which gets its input alone
        if not layer.is_decoder:
            self._running.mask = masks[0]
            return self._stack_arguments(layer, layer_input[0], masks[0])
        encoder_states = additional_inputs["encoder_states"]
        if _index(layer) == 0:
            layer_input[0] = additional_inputs["decoder_embeddings"]
        hidden = layer_input[0]
        return self._stack_arguments(layer, hidden, masks[1]) | {
            "encoder_hidden_states": encoder_states,
            "encoder_attention_mask": create_bidirectional_mask(
                config=self.model.decoder.config,
                inputs_embeds=hidden,
                attention_mask=masks[0],
                encoder_hidden_states=encoder_states,
            ),
        }

    def update_layer_replay_kwargs_from_output(
        self,
        layer: torch.nn.Module,
        layer_output: Any,
        layer_input_kwargs: dict[str, Any],
        target_device: torch.device,
    ) -> dict[str, Any]:
        """Keep what later blocks need: the table of position biases, the encoder's result.

        A block runs several times; the last time all of it is quantized, and that is what stays.
        """
        if not isinstance(layer, T5Block):
            return layer_input_kwargs
        index = _index(layer)
        if index == 0:
            table = layer.layer[0].SelfAttention.relative_attention_bias.weight
            self._position_tables.setdefault(layer.is_decoder, table.detach().cpu().clone())
        if not layer.is_decoder and index == self.model.config.num_layers - 1:
            states = self._normed(layer_output[0])
            layer_input_kwargs["encoder_states"] = states.to(target_device)
        if layer.is_decoder and index == 1:
            layer_input_kwargs["decoder_embeddings"] = None  # used up
        return layer_input_kwargs

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        norm, weight = self._encoder_norm
        return torch.func.functional_call(norm, {"weight": weight.to(hidden.device)}, (hidden,))

    def _stack_arguments(
        self, layer: T5Block, hidden: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, Any]:
        stack = self.model.decoder if layer.is_decoder else self.model.encoder
        create = create_causal_mask if layer.is_decoder else create_bidirectional_mask
        options = {"past_key_values": None} if layer.is_decoder else {}
        return {
            "attention_mask": create(
                config=stack.config, inputs_embeds=hidden, attention_mask=mask, **options
            ),
            "position_bias": self._position_bias(layer, hidden) if _index(layer) else None,
        }

    def _position_bias(self, layer: T5Block, hidden: torch.Tensor) -> torch.Tensor:
        """``(1, heads, T, T)`` in the dtype of the table, as the stack's first block makes it.

        Made anew for each block and batch: kept, they would take more memory than the activations.
        """
        attention = layer.layer[0].SelfAttention
        places = torch.arange(hidden.shape[1], device=hidden.device)
        buckets = attention._relative_position_bucket(
            places[None, :] - places[:, None],
            bidirectional=not layer.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        table = self._position_tables[layer.is_decoder].to(hidden.device)
        return embedding(buckets, table).permute(2, 0, 1)[None]

    # ---- going on after a kill -------------------------------------------------------------------

    def continuation_state_dict(self) -> dict[str, Any]:
        """What later blocks need of those before them, beside the hidden states."""
        return {"position_tables": dict(self._position_tables)}

    def load_continuation_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`continuation_state_dict` was called."""
        self._position_tables = dict(state["position_tables"])

    # ---- what counts as calibration --------------------------------------------------------------

    def token_mask(self, name: str) -> torch.Tensor | None:
        """``(B, S)`` bool: the calibration tokens in what layer ``name`` of a block reads.

        In the batch that the calling thread runs; None where it runs none.
        """
        reads_encoder = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return getattr(self._running, "encoder_mask" if reads_encoder else "mask", None)

    # ---- AWQ -------------------------------------------------------------------------------------

    @classmethod
    def awq_input_feature_aggregation(cls, module_name: str) -> dict[str, Any]:
        """Rows of tokens for every layer, so that AWQ sees all batches whatever their lengths."""
        return {"mode": "token_rows"}

    def awq_get_modules_for_scaling(
        self, module: T5Block, input_feat: dict[str, torch.Tensor], module_kwargs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Layers whose input can be scaled by what comes before them; see ``scaling_groups``."""
        return scaling_groups(module, input_feat, self.model.config)


def _index(layer: T5Block) -> int:
    return layer.layer[0].SelfAttention.layer_idx


def _without_head(tied: dict[str, str]) -> dict[str, str]:
    return {target: source for target, source in tied.items() if target != "lm_head.weight"}


def _existing(groups: list[list[str]], config: Any) -> list[list[str]]:
    """Without `wi` or without the other two: the host takes a name for a prefix of another."""
    if config is None:
        return groups
    absent = (".wi",) if config.is_gated_act else (".wi_0", ".wi_1")
    kept = ([name for name in group if not name.endswith(absent)] for group in groups)
    return [group for group in kept if group]


def _name_weights(model: torch.nn.Module) -> None:
    # transformers casts to the dtype of `wo.weight` if that is a tensor; most of the host's kernels
    # have no such attribute at all.
    for name, module in model.named_modules():
        if name.endswith(".wo") and not hasattr(module, "weight"):
            module.weight = None


def _mask_or_ones(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


DEFINITION = T5QModel
