"""LoRA adapters of PEFT as experts: W_i = W_0 + s B A, never built.

``D += (W_i − W_m) H_i`` is ``D += (W_0 − W_m) H_i + s B (A H_i)``. DoRA multiplies the rows of
W_0 + s B A by m/‖·‖, which is the same with scaled rows of W_0 and of B. Every option and every
tensor of an adapter is either accounted for exactly, or the adapter is refused by that name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import EPMQInputError
from ..io.checkpoints import Checkpoint
from ..io.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_refusal, list_folder, read_json
from ..io.state_dicts import StateDict
from ..io.yaml_files import exists
from .linears import Linear, StoredWeight, piece, resolve

_PREFIX = "base_model.model."

# Options of peft.LoraConfig that give the weight, and are used below.
_USED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"}
# Options that only say how it was trained, or which tensors there are; the tensors say that better.
# `fan_in_fan_out` is about how W_0 is stored, which the merged model's layers say.
_NEUTRAL = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
    *("fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("lora_bias", "ensure_weight_tying", "qalora_group_size"),
}
# These initialisations change W_0 itself: the published W_0 plus s B A is not what was trained.
_CHANGES_BASE = re.compile(r"pissa|corda|olora|loftq|lora_ga", re.IGNORECASE)

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A\.weight|B\.weight|magnitude_vector(?:\.weight)?)"
)
# Tensors that change no linear weight: E-PMQ keeps the merge's embeddings and biases.
_UNUSED = re.compile(
    r".+\.(?:lora_embedding_[AB]|lora_B\.bias|bias|token_adapter\..+|trainable_tokens\w*)"
)
# The number of a layer.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Names inside PEFT's wrappers; what it saves has the name of the module in the base.
_NOT_WHOLE = re.compile(r"\.(?:lora_\w+|modules_to_save|original_module)\.")


class Update(NamedTuple):
    """What an adapter does to one weight ``W_0: (out, in)``; all fp32, on the CPU.

    Attributes:
        A, B: ``(r, in)`` and ``(out, r)``, the scale s already in B: W = W_0 + B A.
        magnitude: ``(out,)`` norms of the rows of W (DoRA), or None.
    """

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None


class Adapter:
    """One LoRA adapter.

    Args:
        options: what ``adapter_config.json`` holds.
        tensors: the adapter's own tensors.
        what: how errors call it, for example ``"expert `math`"``.

    Raises:
        EPMQInputError: an option or a tensor that cannot be accounted for exactly.
    """

    def __init__(
        self, options: Mapping[str, Any], tensors: Checkpoint | StateDict, *, what: str
    ) -> None:
        self.what = what
        self.tensors = tensors
        self.options = dict(options)
        self._config = _lora_config(options, what)
        self.base: str | None = self._config.base_model_name_or_path or None
        if self.base and self._config.revision and not exists(Path(self.base)):
            self.base = f"{self.base}@{self._config.revision}"
        self._names: dict[str, dict[str, str]] = {}  # module -> "A" | "B" | "magnitude" -> tensor
        self.replaced: dict[str, str] = {}  # tensor of the base -> tensor that takes its place
        self.unused: list[str] = []
        for name in tensors:
            self._classify(name)
        if not self._names and not self.replaced:
            raise self._refusal(f"`{ADAPTER_WEIGHTS}` holds no LoRA factors.", ADAPTER_WEIGHTS)
        for module, names in self._names.items():
            self._check_factors(module, names)

    @classmethod
    def open(cls, folder: Path, *, what: str) -> Adapter:
        """The adapter of a folder that :func:`is_adapter` knows.

        Raises:
            EPMQInputError: it is not readable, in a pickle format, or see :class:`Adapter`.
        """
        pickled = next(folder.glob("adapter_model.bin"), None)
        if pickled is not None and not (folder / ADAPTER_WEIGHTS).is_file():
            raise EPMQInputError(
                f"{what}: the adapter is in `{pickled.name}`; pickle files are never opened.",
                code="EPMQ-F14",
                subject=what,
                remedy="Load it with peft and save it with `save_pretrained(...)`, which writes "
                "safetensors.",
            )
        options = read_json(folder, ADAPTER_CONFIG, what)
        return cls(options, _AdapterFile(folder, what=what), what=what)

    @property
    def modules(self) -> list[str]:
        """The adapted modules, by the names they had in training."""
        return list(self._names)

    def bind(
        self, linears: Iterable[Linear], known: Checkpoint | StateDict
    ) -> dict[str, StoredWeight]:
        """Which adapted module, or which half of its rows, is which linear layer, by full name.

        Args:
            linears: of the merged model.
            known: the base; what is adapted or replaced there but not quantized (an embedding, a
                router, a layer left out) changes nothing and is fine.

        Raises:
            EPMQInputError: shapes that do not fit, or a module that nobody knows.
        """
        linears = list(linears)
        bound: dict[str, StoredWeight] = {}
        for linear in linears:
            place = next((p for p in _modules(linear) if p.tensor in self._names), None)
            if place is None:
                continue
            module = place.tensor
            A, B = (self.tensors.info(self._names[module][kind]).shape for kind in "AB")
            shape = piece((B[0], A[1]), place)
            if shape != (linear.outputs, linear.inputs):
                raise self._refusal(
                    f"`{module}`: B A has shape {shape}, the merged model's "
                    f"`{linear.name}` has {(linear.outputs, linear.inputs)}.",
                    f"module `{module}`",
                    "Give the adapter of the same base.",
                )
            bound[linear.name] = place
        self._refuse_strangers(linears, {place.tensor for place in bound.values()}, known)
        return bound

    def _refuse_strangers(
        self, linears: list[Linear], bound: set[str], known: Checkpoint | StateDict
    ) -> None:
        places = [place.tensor for linear in linears for place in linear.stored]
        mine = {tensor.removesuffix(".weight") for tensor in places} | bound
        leaves = {module.rpartition(".")[2] for module in mine}
        replaced = (tensor.removesuffix(".weight") for tensor in self.replaced)
        for module in (*self._names, *replaced):
            if module in mine or f"{module}.weight" in known or module in known:
                continue
            # Outside of the layers: a head that the base ties to its embedding has no tensor there.
            if _NUMBER.search(module) or module.rpartition(".")[2] in leaves:
                raise self._refusal(
                    f"it changes `{module}`, which neither its base nor the merged model has.",
                    f"module `{module}`",
                    "Give the adapter of the same base.",
                )

    def replacement(self, linear: Linear) -> StoredWeight | None:
        """The whole weight that it keeps of this layer (`modules_to_save`), if it does."""
        place = resolve(linear, self.replaced)
        return place and dataclasses.replace(place, tensor=self.replaced[place.tensor])

    def update(self, place: StoredWeight) -> Update:
        """The factors of what ``bind`` found, scaled (PEFT's rules: rsLoRA, rank and alpha)."""
        names = self._names[place.tensor]
        A = self.tensors.read(names["A"]).float()
        B = piece(self.tensors.read(names["B"]), place).float() * self._scale(place.tensor)
        magnitude = names.get("magnitude")
        if magnitude is not None:
            magnitude = self.tensors.read(magnitude).float().reshape(-1)
            return Update(A, B, piece(magnitude, place))
        return Update(A, B, None)

    def digest(self) -> str:
        """SHA-256 of the adapter's tensors."""
        return self.tensors.digest()

    def close(self) -> None:
        """Release the mapped file."""
        self.tensors.close()

    # ---- checks ------------------------------------------------------------------------------

    def _classify(self, name: str) -> None:
        plain = name.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(plain)
        if factor is not None:
            kind = factor["kind"].partition(".")[0].removesuffix("_vector")
            self._names.setdefault(factor["module"], {})[kind] = name
        elif _UNUSED.fullmatch(plain):
            self.unused.append(plain)
        elif plain.endswith(".weight") and not _NOT_WHOLE.search(plain):
            # `modules_to_save`: trained whole, so it takes the place of the base's weight.
            self.replaced[plain.replace(".base_layer.", ".")] = name
        else:
            raise self._refusal(
                f"tensor `{name}` is not one of a LoRA or DoRA adapter of linear layers.",
                f"tensor `{name}`",
            )

    def _check_factors(self, module: str, names: Mapping[str, str]) -> None:
        missing = [kind for kind in ("A", "B") if kind not in names]
        if self._config.use_dora and "magnitude" not in names:
            missing.append("magnitude_vector")
        if missing:
            raise self._refusal(
                f"`{module}` has no `lora_{missing[0]}`.", f"module `{module}`", "Save it again."
            )
        if "magnitude" in names and not self._config.use_dora:
            raise self._refusal(
                f"`{module}` has a DoRA magnitude, but `use_dora` is off.", f"module `{module}`"
            )
        A, B = (self.tensors.info(names[kind]) for kind in ("A", "B"))
        for info in (A, B):
            if len(info.shape) != 2:
                raise self._refusal(
                    f"tensor `{info.name}` has shape {info.shape}; only linear layers are adapted "
                    "here.",
                    f"tensor `{info.name}`",
                )
            if info.torch_dtype is None:
                raise self._refusal(
                    f"tensor `{info.name}` has dtype {info.dtype}, not a floating one.",
                    f"tensor `{info.name}`",
                )
        rank = self._rank(module)
        if A.shape[0] != rank or B.shape[1] != rank:
            raise self._refusal(
                f"`{module}` has factors of rank {A.shape[0]} and {B.shape[1]}, "
                f"`{ADAPTER_CONFIG}` says {rank}.",
                f"module `{module}`",
                "Correct `r` or `rank_pattern`: the scale depends on it.",
            )

    def _rank(self, module: str) -> int:
        return _of_pattern(self._config.rank_pattern, module, self._config.r)

    def _scale(self, module: str) -> float:
        alpha = _of_pattern(self._config.alpha_pattern, module, self._config.lora_alpha)
        rank = self._rank(module)
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)

    def _refusal(self, cause: str, subject: str, remedy: str = "") -> EPMQInputError:
        return _refusal(self.what, cause, subject, remedy)


class _AdapterFile(Checkpoint):
    """The one file of an adapter's folder."""

    def _shards(self) -> list[str]:
        self._index = None
        self._check_shard_name(ADAPTER_WEIGHTS)
        return [ADAPTER_WEIGHTS]


def _modules(linear: Linear) -> Iterator[StoredWeight]:
    """The modules that an adapter of this layer may have adapted, joined ones too."""
    yield StoredWeight(linear.name)
    for place in linear.stored:
        if place.index is None:
            yield StoredWeight(place.tensor.removesuffix(".weight"), part=place.part)


def is_adapter(folder: Path, *, what: str) -> bool:
    """Whether a folder holds a PEFT adapter.

    Raises:
        EPMQInputError: it holds a model as well, so that one of them would be ignored.
    """
    names = list_folder(folder, what)
    if ADAPTER_CONFIG not in names:
        return False
    if any(name.endswith(".safetensors") for name in names - {ADAPTER_WEIGHTS}):
        raise adapter_refusal(folder, what, beside_model=True)
    return True


def _lora_config(options: Mapping[str, Any], what: str) -> Any:
    """PEFT's own configuration object, if every option is one that is handled exactly."""
    from peft import LoraConfig

    kind = str(options.get("peft_type")).rpartition(".")[2]
    if kind != "LORA":
        raise _refusal(
            what,
            f"`peft_type` is {kind}; only LORA adapters are supported.",
            "`peft_type`",
            "Merge the adapter into its base with peft (`merge_and_unload()`) and give that model.",
        )
    known = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name, value in options.items():
        if name in _USED or name in _NEUTRAL or not value:
            continue
        default = known[name].default if name in known else None
        if value != default:
            raise _refusal(
                what,
                f"`{ADAPTER_CONFIG}` sets `{name}`, which changes what the adapter computes and is "
                "not supported.",
                f"`{name}`",
                "Merge the adapter into its base with peft (`merge_and_unload()`) and give that "
                "model.",
            )
    init = options.get("init_lora_weights")
    if isinstance(init, str) and _CHANGES_BASE.search(init):
        raise _refusal(
            what,
            f"`init_lora_weights` is {init!r}: it changed the base's own weights, which the "
            "adapter does not hold.",
            "`init_lora_weights`",
            "Save it with `path_initial_model_for_weight_conversion`, or merge it with peft.",
        )
    try:
        config = LoraConfig(**{k: v for k, v in options.items() if k in _USED and v is not None})
        for name in ("base_model_name_or_path", "revision"):
            setattr(config, name, options.get(name))
        _check_numbers(config, what)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, EPMQInputError):
            raise
        raise _refusal(what, f"`{ADAPTER_CONFIG}`: {error}.", ADAPTER_CONFIG) from error
    return config


def _check_numbers(config: Any, what: str) -> None:
    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.items()}
    for name, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refusal(
                what, f"`{name}` should be a positive integer, got {value!r}.", f"`{name}`"
            )
    for name, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _refusal(what, f"`{name}` should be a number, got {value!r}.", f"`{name}`")


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern.keys(), module), default)


def _refusal(what: str, cause: str, subject: str, remedy: str = "") -> EPMQInputError:
    return EPMQInputError(
        f"{what}: {cause}",
        code="EPMQ-F34",
        subject=subject,
        remedy=remedy or "Give an adapter as peft saves it, or the full model.",
    )
