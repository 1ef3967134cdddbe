"""``EPMQConfig``: a ``GPTQConfig`` that also names the experts and the strength of the anchor."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gptqmodel.quantization.config import GPTQConfig

from .errors import EPMQInputError
from .memory import InMemoryExpert, in_memory, is_in_memory
from .options import bad_option, closest, parse_yaml, shown
from .weighting import WEIGHTINGS

CONFIG_VERSION = 1

# The anchor λ is the damping. The host insists on a value in (0, 1) and adds it once more, so it
# gets one that changes no bit of an fp32 diagonal that the anchor already holds up.
NUMERICAL_DAMP = 1e-12

BITS = (2, 3, 4, 5, 6, 7, 8)
# What the host's kernels pack and run.
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)

# Expert names reach file names, tables and the published provenance.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Host features that move the weights or replace the objective, so that the experts' weights would
# no longer be comparable with the merged ones.
_REFUSED = {
    "rotation": "it rotates the merged weights but not the experts'",
    "gptaq": "it replaces the objective that E-PMQ replaces as well",
    "foem": "it replaces the objective that E-PMQ replaces as well",
    "adapter": "EoRA would repair towards the merge, away from the experts",
    "activation": "W4A streams change the inputs the statistics are taken from",
    "preprocessors": "they change the merged weights but not the experts'",
    "mock_quantization": "it skips the curvature that carries the method",
}
_REFUSED_DYNAMIC = ("damp_percent", "gptaq", "foem", "adapter")

# Fields of the host that describe this machine or this process, not the quantization.
_NOT_SERIALISED = {
    "offload_to_disk_path",
    "device",
    "meta",
    "method",
    "damp_percent",
    "damp_auto_increment",
    "smooth",
    "compute_device_filter",
}


@dataclass
class EPMQConfig(GPTQConfig):
    """Options of one E-PMQ run, on top of every option of GPTQModel's ``GPTQConfig``.

    Args:
        experts: the models that were merged, by name. Each is a local safetensors folder, a hub id
            ``org/name@revision``, a PEFT LoRA adapter (folder or hub id; its base is ``base``, else
            what the adapter says; ``"base+adapter"`` names both), or a model in memory: a module, a
            PEFT model or a state dict, which is not copied. The order is the order in which they
            are folded. At least one.
        alpha: strength of the anchor to the merged weights, λ = alpha · tr(H) / d (eq. 13). The
            paper uses 0.01–0.1 for CLIP, 1 for LLMs, 10 for WUDI merges. Large values give plain
            GPTQ of the merge; 0 is allowed only where every Gram has full rank.
        alpha_pattern: other alphas for some linear layers: a regular expression that must match the
            end of the module's full name, whole path parts (``"mlp.down_proj"``, ``"layers.0..*"``;
            PEFT's rule for its pattern options) → alpha. The first match wins.
        base: the model that the experts were fine-tuned from: folder or hub id. Needed by
            ``data_free``, and by adapters that name none.
        weighting: how much each expert counts: ``"raw"`` sums over its calibration tokens, as the
            paper does; ``"token"``: as if all had equally many tokens; ``"trace"``: as if all had
            the same tr(H_i) in every layer. See :class:`~epmq_gptq.weighting.Weighting`.
        expert_weights: a factor on top, for some experts (default 1).
        data_free: experts that have no calibration rows: in place of their Gram goes that of their
            task vector, see :func:`~epmq_gptq.statistics.data_free_gram`. Not part of the paper.
        allow_duplicates: accept experts that are the same model under two names; each counts.
        require_pinned: refuse a hub id without a 40-digit commit as its revision.
        on_bad_module: what happens where numbers cannot be trusted (non-finite activations, expert
            weights, target or scales, a curvature that is not positive definite): ``"raise"`` stops
            the run; ``"rtn"`` rounds that module's merged weight to nearest and records it.
            Non-finite *merged* weights always stop the run.

    In a mixture of experts, a routed module that fewer tokens reach than ``fallback.threshold``
    (the host's, 0.5 % of all tokens) keeps the merged weight as its target.

    ``damp_percent`` is not an option here: the anchor is the damping. The host's other fields keep
    their names and defaults (``sym=True, desc_act=False``: what vLLM serves); ``group_size=-1``
    turns ``act_group_aware`` off, which it rules out.

    Raises:
        EPMQInputError: an option is out of range, or a host feature cannot go with E-PMQ.

    Source: arXiv 2605.16882.
    """

    experts: dict[str, Any] = field(default_factory=dict)
    alpha: float = field(default=1.0)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base: str | None = field(default=None)
    weighting: str = field(default="raw", metadata={"choices": list(WEIGHTINGS)})
    expert_weights: dict[str, float] = field(default_factory=dict)
    data_free: list[str] = field(default_factory=list)
    allow_duplicates: bool = field(default=False)
    require_pinned: bool = field(default=False)
    on_bad_module: str = field(default="raise", metadata={"choices": ["raise", "rtn"]})

    def __post_init__(self) -> None:
        self.experts = _check_experts(self.experts)
        self.alpha = _check_alpha(self.alpha, "alpha")
        if not isinstance(self.alpha_pattern, Mapping):
            raise bad_option(
                "alpha_pattern", "a mapping of module patterns to alphas", self.alpha_pattern
            )
        self.alpha_pattern = {
            _check_pattern(pattern): _check_alpha(value, f"alpha_pattern[{pattern!r}]")
            for pattern, value in self.alpha_pattern.items()
        }
        self._check_choices()
        self._check_weighting()
        self._check_grid()
        self._check_damping()
        self._check_host_features()
        try:
            super().__post_init__()
        except EPMQInputError:
            raise
        except (ValueError, TypeError) as error:
            raise EPMQInputError(
                f"EPMQConfig: {str(error).rstrip('.')}.",
                code="EPMQ-O01",
                subject="EPMQConfig",
                remedy="GPTQModel's documentation of `GPTQConfig` says what it takes.",
            ) from error

    def _check_choices(self) -> None:
        if self.on_bad_module not in ("raise", "rtn"):
            raise bad_option("on_bad_module", '"raise" or "rtn"', self.on_bad_module)
        if self.base is not None and (
            not isinstance(self.base, (str, Path)) or not str(self.base).strip()
        ):
            raise bad_option("base", "a folder or a hub id", self.base)
        self.base = None if self.base is None else str(self.base)
        for name in ("allow_duplicates", "require_pinned"):
            if not isinstance(getattr(self, name), bool):
                raise bad_option(name, "True or False", getattr(self, name))

    def _check_weighting(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise bad_option("weighting", f"one of {', '.join(WEIGHTINGS)}", self.weighting)
        if not isinstance(self.expert_weights, Mapping):
            raise bad_option(
                "expert_weights", "a mapping of experts to numbers", self.expert_weights
            )
        weights = {}
        for name, value in self.expert_weights.items():
            self._check_known(name, "expert_weights")
            option = f"expert_weights[{name!r}]"
            weights[name] = _number(value, option)
            if weights[name] <= 0:
                raise bad_option(
                    option, "above 0", value, "Leave out an expert that should not count."
                )
        self.expert_weights = weights
        if isinstance(self.data_free, str) or not isinstance(self.data_free, (list, tuple)):
            raise bad_option("data_free", "a list of experts' names", self.data_free)
        self.data_free = list(dict.fromkeys(self.data_free))
        for name in self.data_free:
            self._check_known(name, "data_free")
        if len(self.data_free) == len(self.experts):
            raise bad_option(
                "data_free",
                "some of the experts",
                self.data_free,
                "Give calibration rows for at least one: activations must come from somewhere.",
                code="EPMQ-F22",
            )
        if self.data_free and self.base is None:
            raise EPMQInputError(
                "`data_free` needs `base`: a task vector is an expert minus the model it was "
                "fine-tuned from.",
                code="EPMQ-O03",
                subject="`data_free`",
                remedy="Set `base` to that model's folder or hub id.",
            )

    def _check_known(self, name: Any, option: str) -> None:
        if name not in self.experts:
            raise EPMQInputError(
                f"`{option}` names {name!r}, which is not one of the experts {list(self.experts)}.",
                code="EPMQ-F21",
                subject=f"`{option}`",
                remedy="Use the names under `experts`.",
            )

    def _check_grid(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise bad_option("bits", f"one of {list(BITS)}", self.bits, code="EPMQ-F33")
        if self.group_size not in GROUP_SIZES:
            raise bad_option(
                "group_size", f"one of {list(GROUP_SIZES)}", self.group_size, code="EPMQ-F33"
            )
        if self.group_size == -1 and self.act_group_aware is None:
            self.act_group_aware = False

    def _check_damping(self) -> None:
        if self.damp_percent not in (None, NUMERICAL_DAMP):
            raise EPMQInputError(
                f"`damp_percent` is not an option of EPMQConfig, got {self.damp_percent!r}: the "
                "anchor is the damping.",
                code="EPMQ-O03",
                subject="`damp_percent`",
                remedy="Set `alpha` (λ = alpha · tr(H)/d) instead.",
            )
        if self.damp_auto_increment not in (None, 0, 0.0):
            raise EPMQInputError(
                "`damp_auto_increment` is not an option of EPMQConfig, got "
                f"{self.damp_auto_increment!r}: damping is never raised behind your back.",
                code="EPMQ-O03",
                subject="`damp_auto_increment`",
                remedy="Leave it out; raise `alpha` where a layer needs it.",
            )
        self.damp_percent, self.damp_auto_increment = NUMERICAL_DAMP, 0.0

    def _check_host_features(self) -> None:
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise EPMQInputError(
                    f"`{name}` cannot be used with EPMQConfig: {why}.",
                    code="EPMQ-O03",
                    subject=f"`{name}`",
                    remedy="Leave it out.",
                )
        for pattern, override in (self.dynamic or {}).items():
            for name in _REFUSED_DYNAMIC:
                if isinstance(override, Mapping) and name in override:
                    raise EPMQInputError(
                        f"`dynamic[{pattern!r}]` sets `{name}`, which EPMQConfig does not allow.",
                        code="EPMQ-O03",
                        subject="`dynamic`",
                        remedy="Use `alpha_pattern` for a module's anchor.",
                    )

    def alpha_for(self, module: str) -> float:
        """The alpha of the linear layer with this full name."""
        for pattern, alpha in self.alpha_pattern.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return alpha
        return self.alpha

    def close(self) -> None:
        """Remove the temporary folder to which the host moves finished layers.

        It otherwise stays as long as this object does. A model that was quantized with this
        configuration cannot be saved any more.
        """
        folder = getattr(self, "_offload_temp_dir", None)
        if folder is not None:
            folder.cleanup()

    # ---- standard GPTQ checkpoint --------------------------------------------------------------

    def _update_meta_payload(self, meta_payload: dict[str, Any]) -> None:
        # The host calls this when it writes quantize_config.json: no place for a machine's path.
        super()._update_meta_payload(meta_payload)
        meta_payload.pop("offload_to_disk_path", None)

    # ---- JSON and YAML -------------------------------------------------------------------------

    def to_options(self) -> dict[str, Any]:
        """Every option that differs from its default, as plain data, with the format's version."""
        options: dict[str, Any] = {"epmq_config_version": CONFIG_VERSION}
        for option in dataclasses.fields(self):
            if not option.init or option.name in _NOT_SERIALISED:
                continue
            value = getattr(self, option.name)
            if value != _normalised_default(option):
                options[option.name] = _plain(value, option.name)
        return options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EPMQConfig:
        """The inverse of :meth:`to_options`.

        Raises:
            EPMQInputError: an option that does not exist, or a version from the future.
        """
        options = dict(options)
        version = options.pop("epmq_config_version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise EPMQInputError(
                f"`epmq_config_version` should be {CONFIG_VERSION}, got {version!r}: this file was "
                "written by another version of epmq_gptq.",
                code="EPMQ-O04",
                subject="`epmq_config_version`",
                remedy="Use that version, or write the options anew.",
            )
        known = [option.name for option in dataclasses.fields(cls) if option.init]
        for name in options:
            if name not in known:
                meant = closest(name, known)
                raise EPMQInputError(
                    f"`{name}` is not an option of EPMQConfig.",
                    code="EPMQ-O02",
                    subject=f"`{name}`",
                    remedy=f"Did you mean `{meant}`?" if meant else "Leave it out.",
                )
        return cls(**options)

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> EPMQConfig:
        """From JSON text, or from a file where a ``Path`` is given."""
        return cls.from_options(_parsed(json.loads, text, "JSON"))

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return yaml.safe_dump(self.to_options(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str | Path) -> EPMQConfig:
        """From YAML text, or from a file where a ``Path`` is given."""
        return cls.from_options(_parsed(parse_yaml, text, "YAML"))


def _check_experts(experts: Any) -> dict[str, str | InMemoryExpert]:
    if not isinstance(experts, Mapping) or not experts:
        raise EPMQInputError(
            f"`experts` should map at least one expert's name to its model, got {shown(experts)}.",
            code="EPMQ-F20",
            subject="`experts`",
            remedy='For example `experts={"math": "org/math-expert@revision"}`.',
        )
    checked = {}
    for name, source in experts.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EPMQInputError(
                "`experts`: a name should be letters, digits, `.`, `_` or `-` (at most 64), got "
                f"{name!r}.",
                code="EPMQ-O01",
                subject="`experts`",
                remedy="Choose a short name; it appears in tables and in the published record.",
            )
        if isinstance(source, InMemoryExpert):
            checked[name] = source
        elif is_in_memory(source):
            checked[name] = in_memory(source, what=f"expert `{name}`")
        elif isinstance(source, (str, Path)) and str(source).strip():
            checked[name] = str(source)
        else:
            raise EPMQInputError(
                f"`experts[{name!r}]` should be a folder, a hub id, a model or a state dict, got "
                f"{shown(source)}.",
                code="EPMQ-O01",
                subject=f"expert `{name}`",
                remedy="Give one of them.",
            )
    return checked


def _number(value: Any, option: str, code: str = "EPMQ-O01") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise bad_option(option, "a number", value, code=code)
    value = float(value)
    if not math.isfinite(value) or value < 0:
        raise bad_option(option, "finite and not negative", value, code=code)
    return value


def _check_alpha(value: Any, option: str) -> float:
    return _number(value, option, "EPMQ-F28")


def _check_pattern(pattern: Any) -> str:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise EPMQInputError(
            f"`alpha_pattern`: {pattern!r} is not a regular expression: {error}.",
            code="EPMQ-O01",
            subject="`alpha_pattern`",
            remedy="Write one that matches the end of a module's name.",
        ) from error
    return pattern


def _normalised_default(option: dataclasses.Field) -> Any:
    """What an option holds after ``__post_init__`` where the user said nothing."""
    if option.name in ("desc_act", "act_group_aware"):
        return option.name == "act_group_aware"
    if option.default is not dataclasses.MISSING:
        return option.default
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return None


def _plain(value: Any, option: str) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, option) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, option) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict(), option)
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), option) for f in dataclasses.fields(value)}
    what = "a model in memory" if isinstance(value, InMemoryExpert) else type(value).__name__
    raise EPMQInputError(
        f"`{option}` cannot be written as JSON or YAML: it holds {what}.",
        code="EPMQ-O01",
        subject=f"`{option}`",
        remedy="Give folders or hub ids where the options are to be written.",
    )


def _parsed(load, text: str | Path, kind: str) -> Mapping[str, Any]:
    try:
        data = load(text.read_text(encoding="utf-8") if isinstance(text, Path) else text)
    except ValueError as error:
        raise EPMQInputError(
            f"the EPMQConfig is not readable as {kind}: {str(error).rstrip('.')}.",
            code="EPMQ-O04",
            subject="EPMQConfig",
            remedy="Write it with `to_yaml()` or `to_json()`.",
        ) from error
    if not isinstance(data, Mapping):
        raise EPMQInputError(
            f"the EPMQConfig should be a {kind} mapping, got {type(data).__name__}.",
            code="EPMQ-O04",
            subject="EPMQConfig",
            remedy="Write it with `to_yaml()` or `to_json()`.",
        )
    return data
