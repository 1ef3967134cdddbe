"""Differences between two models' ``config.json``, as data: no code of a checkpoint is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..io.families import family_of
from .findings import Finding

# Where the language model's own options are in a multimodal configuration.
_NESTED = ("text_config", "llm_config", "language_config")


class _Rule(NamedTuple):
    """One option, the spellings of it (newest first), and what a difference means."""

    name: str
    spellings: tuple[str, ...]
    level: str


# "error": the linear layers mean something else, or are others. "warning": the experts' activations
# differ from the merge's, but every weight still has its counterpart.
_RULES = (
    _Rule("model_type", ("model_type",), "error"),
    _Rule("hidden_size", ("hidden_size", "n_embd", "d_model"), "error"),
    _Rule("num_hidden_layers", ("num_hidden_layers", "n_layer", "num_layers"), "error"),
    _Rule("num_attention_heads", ("num_attention_heads", "n_head", "num_heads"), "error"),
    _Rule("num_key_value_heads", ("num_key_value_heads",), "error"),
    _Rule("head_dim", ("head_dim", "d_kv"), "error"),
    _Rule("intermediate_size", ("intermediate_size", "ffn_dim", "n_inner", "d_ff"), "error"),
    _Rule("num_decoder_layers", ("num_decoder_layers",), "error"),
    _Rule("patch_size", ("patch_size",), "error"),
    _Rule("image_size", ("image_size",), "warning"),
    _Rule("relative_attention_num_buckets", ("relative_attention_num_buckets",), "warning"),
    _Rule("relative_attention_max_distance", ("relative_attention_max_distance",), "warning"),
    _Rule("moe_intermediate_size", ("moe_intermediate_size",), "error"),
    _Rule(
        "hidden_act",
        ("hidden_activation", "hidden_act", "activation_function", "feed_forward_proj"),
        "error",
    ),
    _Rule("experts", ("num_local_experts", "num_experts", "n_routed_experts"), "error"),
    _Rule("experts per token", ("num_experts_per_tok",), "warning"),
    _Rule("rope_theta", (), "warning"),
    _Rule("rope_scaling", (), "warning"),
    _Rule("partial_rotary_factor", (), "warning"),
    _Rule(
        "norm eps",
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        "warning",
    ),
    _Rule("sliding_window", ("sliding_window",), "warning"),
    _Rule("attn_logit_softcapping", ("attn_logit_softcapping",), "warning"),
    _Rule("max_position_embeddings", ("max_position_embeddings", "n_positions"), "note"),
)

# Names of one and the same function.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu", "gelu_fast": "gelu_new"}
_ROPE_DEFAULT = 10000.0
_ROPE_TYPES = {"su": "longrope"}  # its name in Phi-3's first files
_ROPE_STRETCHED = ("llama3", "yarn", "longrope")
# Parts of a rope block that are options of their own above, or say the same twice.
_ROPE_KEYS = {"rope_theta", "partial_rotary_factor", "type", "rope_type"}

_REMEDY = {
    "error": "Give experts that were fine-tuned from the model that the merge was made of.",
    "warning": "Go on if it is meant: the merged model's own setting is used.",
    "note": "",
}


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are compared, under one name each; None where a configuration has none.

    What old files leave out gets the value it had: key-value heads as many as heads, a head as
    wide as hidden_size/heads, theta 10000.
    """
    config = _own_part(config)
    found = {rule.name: _first(config, rule.spellings) for rule in _RULES}
    found["model_type"] = str(found["model_type"] or "").removesuffix("_text") or None
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if found["head_dim"] is None and _counts(heads, hidden):
        found["head_dim"] = hidden // heads
    if isinstance(found["hidden_act"], str):
        found["hidden_act"] = _ACTIVATIONS.get(found["hidden_act"], found["hidden_act"])
    # Gemma's first files say "gelu" and have always been run with the approximation.
    if found["model_type"] == "gemma" and found["hidden_act"] == "gelu":
        found["hidden_act"] = "gelu_new"
    if config.get("use_sliding_window") is False:
        found["sliding_window"] = None
    return found | _rope(config)


def _own_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    family = family_of(config.get("model_type"))
    if family is not None and family.inner is not None:
        key, model_type = family.inner
        if isinstance(config.get(key), Mapping):
            # What is quantized, which is also saved as a model of its own.
            return {**config[key], "model_type": model_type}
    for name in _NESTED:
        if isinstance(config.get(name), Mapping):
            return {**config, **config[name]}
    return config


def _first(config: Mapping[str, Any], spellings: tuple[str, ...]) -> Any:
    return next((config[name] for name in spellings if config.get(name) is not None), None)


def _counts(*values: Any) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes `rope_parameters`, before that `rope_theta` and `rope_scaling`."""
    block = config.get("rope_parameters") or config.get("rope_scaling")
    block = dict(block) if isinstance(block, Mapping) else {}
    if block and all(isinstance(part, Mapping) for part in block.values()):
        # One block per kind of layer (Gemma 3): compared as a whole.
        return {"rope_theta": None, "rope_scaling": block, "partial_rotary_factor": None}
    kind = block.get("rope_type", block.get("type", "default"))
    theta = block.get("rope_theta", config.get("rope_theta"))
    partial = block.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    kind = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    scaling = {key: value for key, value in block.items() if key not in _ROPE_KEYS}
    if kind in _ROPE_STRETCHED:
        # Transformers 5 writes it into the block, before that it stood beside it or was left out.
        names = ("original_max_position_embeddings", "max_position_embeddings")
        scaling.setdefault(names[0], _first(config, names))
    return {
        "rope_theta": _ROPE_DEFAULT if theta is None else theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
        "partial_rotary_factor": 1.0 if partial is None else partial,
    }


def compare_configs(
    merged: Mapping[str, Any], other: Mapping[str, Any], what: str
) -> Iterator[Finding]:
    """What another model's configuration says differently, worst first.

    An option that only one of the two has is no difference: files of other versions leave out what
    they have as a default. Where ``other`` is empty (a state dict without one) nothing is compared.

    Args:
        merged: ``config.json`` of the merged model.
        other: that of the expert or base.
        what: how the findings call it, for example ``"expert `math`"``.
    """
    if not merged or not other:
        return
    mine, theirs = normalised(merged), normalised(other)
    for level in ("error", "warning", "note"):
        differing = [
            f"`{rule.name}` is {_shown(theirs[rule.name])}, the merged model has "
            f"{_shown(mine[rule.name])}"
            for rule in _RULES
            if rule.level == level and _differs(rule.name, mine[rule.name], theirs[rule.name])
        ]
        if differing:
            yield Finding(
                level, "EPMQ-F04", what, f"{what}: {'; '.join(differing)}.", _REMEDY[level]
            )
    yield from _compare_heads(_own_part(merged), _own_part(other), what)


def _differs(name: str, mine: Any, theirs: Any) -> bool:
    # No scaling and no window are values of their own; elsewhere None is "not said".
    if name not in ("rope_scaling", "sliding_window") and (mine is None or theirs is None):
        return False
    return mine != theirs


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _compare_heads(
    merged: Mapping[str, Any], other: Mapping[str, Any], what: str
) -> Iterator[Finding]:
    mine, theirs = (config.get("tie_word_embeddings") for config in (merged, other))
    if mine is None or theirs is None or bool(mine) == bool(theirs):
        return
    words = {True: "tied to the embeddings", False: "a tensor of its own"}
    yield Finding(
        "note",
        "EPMQ-F37",
        what,
        f"{what}: the head is {words[bool(theirs)]}, the merged model's is {words[bool(mine)]}.",
        "It is not quantized, so nothing follows from it.",
    )
