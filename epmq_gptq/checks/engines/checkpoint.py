"""What is in a finished GPTQ checkpoint: read from its tensors, and compared with its words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ...errors import EPMQInputError
from ...io.checkpoints import TensorInfo
from .facts import Export, Facts, Layer, Settings, Stored, gathered
from .fused import LINEAR_LEAVES
from .packed import PACKED, Shape, group_size, is_plain_order, shape_of, zero_kind
from .table import CONFIG_FILE

CONFIG, QUANTIZE_CONFIG = "config.json", "quantize_config.json"
assert set(CONFIG_FILE.values()) == {CONFIG, QUANTIZE_CONFIG}
_NEEDED = PACKED[:3]
_BLOCK = re.compile(r"(.*?)\.\d+\.")
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "head")

Modules = dict[str, dict[str, TensorInfo]]


class Store(Protocol):
    """Tensors by name: a :class:`~epmq_gptq.io.checkpoints.Checkpoint`, or one of a hub."""

    what: str

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> torch.Tensor: ...
    def config(self) -> dict[str, Any]: ...


@dataclass
class Reading:
    """What was found.

    Attributes:
        facts: for the rules.
        found: the same as plain data, for people and JSON.
        shapes: packed layer → its shape, of those whose tensors fit one another.
    """

    facts: Facts
    found: dict[str, Any]
    shapes: dict[str, Shape]


@dataclass
class _Content:
    """What zero points and order say, as far as they were read; see :class:`Stored`."""

    zeros: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    reordered: str = ""


def read_checkpoint(
    store: Store, quantize_config: Mapping[str, Any] | None, limit: int | None = None
) -> Reading:
    """Everything that the rules look at.

    Args:
        store: the checkpoint.
        quantize_config: what ``quantize_config.json`` holds; None where there is none.
        limit: of how many layers zero points and order are read; None for all.

    Raises:
        EPMQInputError: nothing in it is quantized, or not by GPTQ.
    """
    config = store.config()
    claims = _claims(config, quantize_config, store.what)
    modules = _modules(store)
    if not modules:
        raise _not_gptq(store.what, "it holds no packed layer (`….qweight`)")
    if not claims:
        raise _not_gptq(store.what, f"neither `{CONFIG}` nor `{QUANTIZE_CONFIG}` says how")
    # Engines differ in which of the two they read; most read config.json.
    claimed = claims.get(CONFIG) or claims[QUANTIZE_CONFIG]
    export = replace(claimed, lm_head=any(name.rpartition(".")[2] in _HEADS for name in modules))
    shapes, faults = _shapes(store, modules, export)
    content = _content(store, modules, shapes, export, limit)
    layers = [
        Layer(name, shape.outputs, shape.inputs, _settings(name, shape, export, content))
        for name, shape in shapes.items()
    ]
    block = _quantization_block(config) or {}
    stored = Stored(
        faults=(*faults, *_head_faults(store, config)),
        unlike={
            file: tuple(_unlike(file, claim, export, shapes, content))
            for file, claim in claims.items()
        },
        config_file=CONFIG in claims,
        silent=tuple(key for key in ("sym", "desc_act") if CONFIG in claims and key not in block),
        zeros=content.zeros,
        reordered=content.reordered,
        no_order=next((name for name, parts in modules.items() if "g_idx" not in parts), ""),
        words=_other_words(modules),
        restricted=_restricted(block),
        dense_linears=tuple(_dense_linears(store, modules)),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        remote_code=bool(config.get("auto_map")),
    )
    given = {layer.name: layer.settings for layer in layers}
    facts = gathered(export, layers, config, given.get, stored)
    return Reading(facts, _found(store, facts, content), shapes)


# ---- what the configuration says ---------------------------------------------------------------


def _quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(place.get("quantization_config"), Mapping):
            return place["quantization_config"]
    return None


def _claims(
    config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None, what: str
) -> dict[str, Export]:
    blocks = {CONFIG: _quantization_block(config), QUANTIZE_CONFIG: quantize_config}
    return {file: _claim(file, block, what) for file, block in blocks.items() if block is not None}


def _claim(file: str, block: Mapping[str, Any], what: str) -> Export:
    method = block.get("quant_method", block.get("method", "gptq"))
    if str(method).lower() != "gptq":
        raise _not_gptq(what, f"`{file}` says it is quantized by {method!r}")
    kinds = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool, "lm_head": bool}
    given = {}
    for key, kind in kinds.items():
        value = block.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _unreadable(what, file, f"`{key}` should be {kind.__name__}, got {value!r}")
        given[key] = value
    if "bits" not in given or not 1 <= given["bits"] <= 16:
        raise _unreadable(what, file, f"`bits` should be 1 to 16, got {block.get('bits')!r}")
    dynamic = block.get("dynamic") or None
    if dynamic is not None:
        _check_dynamic(dynamic, what, file)
    named = block.get("checkpoint_format") or block.get("format") or "gptq"
    return Export(**given, dynamic=dynamic, format=str(named).lower())


def _check_dynamic(dynamic: Any, what: str, file: str) -> None:
    if not isinstance(dynamic, Mapping):
        raise _unreadable(what, file, f"`dynamic` should be an object, got {dynamic!r}")
    for pattern, override in dynamic.items():
        try:
            re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except (re.error, RecursionError) as error:
            raise _unreadable(what, file, f"`dynamic` has `{pattern}`: {error}") from error
        numbers = ("bits", "group_size")
        if not isinstance(override, Mapping) or not all(
            isinstance(override[key], int) for key in numbers if key in override
        ):
            raise _unreadable(what, file, f"`dynamic` gives `{pattern}` {override!r}")


def _restricted(block: Mapping[str, Any]) -> tuple[str, ...]:
    """``modules_in_block_to_quantize``: a list of names, or a list of such lists."""
    names = block.get("modules_in_block_to_quantize")
    flat = []
    for entry in names if isinstance(names, list) else []:
        flat += entry if isinstance(entry, list) else [entry]
    return tuple(name for name in flat if isinstance(name, str))


# ---- what the tensors say ---------------------------------------------------------------


def _modules(store: Store) -> Modules:
    modules: Modules = {}
    for name in store:
        module, _, part = name.rpartition(".")
        if part in PACKED and f"{module}.qweight" in store:
            modules.setdefault(module, {})[part] = store.info(name)
    return modules


def _shapes(store: Store, modules: Modules, export: Export) -> tuple[dict[str, Shape], list[str]]:
    shapes, faults = {}, []
    for name, parts in modules.items():
        missing = [part for part in _NEEDED if part not in parts]
        if missing:
            faults.append(f"`{name}.{missing[0]}` is missing")
            continue
        claimed = export.of(name) or export.base
        shape = shape_of({part: info.shape for part, info in parts.items()}, claimed.bits)
        if isinstance(shape, str):
            faults.append(f"the tensors of `{name}` do not fit one another: {shape}")
            continue
        if parts["scales"].torch_dtype is None:
            faults.append(f"`{name}.scales` is {parts['scales'].dtype}, no floating numbers")
        if f"{name}.weight" in store:
            faults.append(f"`{name}` is there twice, packed and as `{name}.weight`")
        shapes[name] = shape
    return shapes, faults


def _head_faults(store: Store, config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if config.get("tie_word_embeddings") is not False or not architecture.endswith("ForCausalLM"):
        return []
    # `lm_head.weight`, or the parts of a packed one.
    if any(name.split(".")[-2:-1] and name.split(".")[-2] in _HEADS for name in store):
        return []
    return ["there is no head (`lm_head`), and `config.json` does not tie it to the embedding"]


def _dense_linears(store: Store, modules: Modules) -> Iterator[str]:
    """Linear layers beside packed ones that are not packed; vision towers have other stacks."""
    stacks = {match[1] for name in modules if (match := _BLOCK.match(name))}
    leaves = LINEAR_LEAVES | {name.rpartition(".")[2] for name in modules}
    for name in store:
        module, _, part = name.rpartition(".")
        match = _BLOCK.match(module)
        if part != "weight" or match is None or match[1] not in stacks or module in modules:
            continue
        if module.rpartition(".")[2] in leaves and len(store.info(name).shape) == 2:
            yield module


def _other_words(modules: Modules) -> str:
    for name, parts in modules.items():
        for part in ("qweight", "qzeros"):
            if part in parts and parts[part].dtype != "I32":
                return f"{name}.{part}"
    return ""


def _content(
    store: Store,
    modules: Modules,
    shapes: Mapping[str, Shape],
    export: Export,
    limit: int | None,
) -> _Content:
    """Reads zero points and order; layers of a kind that was not read yet come first."""
    seen: set[tuple[Any, ...]] = set()
    first, others = [], []
    for name, shape in shapes.items():
        kind = (shape.bits, shape.inputs, shape.groups, export.of(name))
        (others if kind in seen else first).append(name)
        seen.add(kind)
    content = _Content()
    for name in (first + others)[:limit]:
        parts, shape = modules[name], shapes[name]
        if parts["qzeros"].dtype == "I32":
            qzeros = store.read(f"{name}.qzeros")
            kind = zero_kind(qzeros, shape.bits, planes=export.format == "gptq_p")
            content.zeros.setdefault(kind, name)
            content.kinds[name] = kind
        if "g_idx" in parts and not content.reordered:
            claimed = export.of(name) or export.base
            size = group_size(shape, claimed.group_size)
            if not is_plain_order(store.read(f"{name}.g_idx"), size):
                content.reordered = name
    return content


def _settings(name: str, shape: Shape, export: Export, content: _Content) -> Settings:
    claimed = export.of(name) or export.base
    return Settings(
        shape.bits,
        group_size(shape, claimed.group_size),
        claimed.sym and content.kinds.get(name) != "free",
        claimed.desc_act,
    )


# ---- where the two differ ---------------------------------------------------------------


def _unlike(
    file: str,
    claim: Export,
    export: Export,
    shapes: Mapping[str, Shape],
    content: _Content,
) -> Iterator[str]:
    """Where a configuration file says other than the tensors; of many layers the first."""
    told: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        for kind, text in _unlike_layer(name, claim, shape, content):
            told.setdefault(kind, []).append(text)
    for texts in told.values():
        more = len(texts) - 1
        yield f"`{file}` says {texts[0]}" + (f" (and {more} layers more)" if more else "")
    if claim.lm_head is not export.lm_head:
        is_is = ("not quantized", "quantized") if export.lm_head else ("quantized", "not quantized")
        yield f"`{file}` says the head is {is_is[0]} (`lm_head`), and it is {is_is[1]}"


def _unlike_layer(
    name: str, claim: Export, shape: Shape, content: _Content
) -> Iterator[tuple[str, str]]:
    claimed = claim.of(name)
    if claimed is None:
        yield "out", f"`{name}` is not quantized, and it is packed"
        return
    if claimed.bits != shape.bits:
        yield "bits", f"`{name}` has {claimed.bits} bits, and its tensors hold {shape.bits}"
    size = group_size(shape, claimed.group_size)
    if size != claimed.group_size and not (size == -1 and claimed.group_size >= shape.inputs):
        yield "groups", f"`{name}` has group_size {claimed.group_size}, and its tensors have {size}"
    if claimed.sym and content.kinds.get(name) == "free":
        yield "sym", f"`{name}` is symmetric, and its zero points are not"


# ---- for people ---------------------------------------------------------------


def _found(store: Store, facts: Facts, content: _Content) -> dict[str, Any]:
    counts = Counter(layer.settings for layer in facts.layers)
    dtypes = Counter(store.info(name).dtype for name in store)
    dense = Counter(
        store.info(name).dtype for name in store if name.rpartition(".")[2] not in PACKED
    )
    stored = facts.stored
    head = "tied to the embedding" if facts.has_tied_head else "not quantized"
    return {
        "architecture": facts.architecture or None,
        "model_type": facts.model_type or None,
        "tensors": sum(dtypes.values()),
        "bytes": sum(store.info(name).nbytes for name in store),
        "files": len({store.info(name).file for name in store}),
        "layers": len(facts.layers),
        "settings": [
            {**settings._asdict(), "layers": count, "first": facts.settings[settings]}
            for settings, count in counts.most_common()
        ],
        "dense_linears": list(stored.dense_linears),
        "dense_dtypes": dict(dense.most_common()),
        "dtype": stored.dtype,
        "head": "quantized" if facts.export.lm_head else head,
        "format": facts.export.format,
        "zero_points": {
            "read": len(content.kinds),
            **dict(Counter(content.kinds.values()).most_common()),
        },
        "order": "reordered" if stored.reordered else "plain",
        "uneven": list(facts.uneven),
        "unseen": list(facts.unseen),
        "faults": list(stored.faults),
        "disagreements": [line for lines in stored.unlike.values() for line in lines],
    }


# ---- errors ---------------------------------------------------------------


def _not_gptq(what: str, cause: str) -> EPMQInputError:
    return EPMQInputError(
        f"{what}: no GPTQ checkpoint: {cause}.",
        code="EPMQ-F56",
        subject=what,
        remedy="Give the folder that `save` or GPTQModel wrote.",
    )


def _unreadable(what: str, file: str, cause: str) -> EPMQInputError:
    return EPMQInputError(
        f"{what}: `{file}`: {cause}.",
        code="EPMQ-F13",
        subject=f"`{file}`",
        remedy="Restore the file from where the model came from.",
    )
