"""``EPMQConfig``: a ``GPTQConfig`` that also names the experts and the strength of the anchor."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from gptqmodel.quantization.config import FORMAT, GPTQConfig
from pydantic import BeforeValidator, create_model
from pydantic_core import PydanticCustomError

from .errors import EPMQInputError
from .experts.in_memory import InMemoryExpert, in_memory, is_in_memory
from .io.declared import (
    Declared,
    bad_option,
    conflict,
    is_whole,
    is_word,
    ruled,
    shown,
    unknown_key,
    validated,
)
from .io.families import family_of
from .io.yaml_files import parse_json, parse_yaml, read_data, write_yaml

__all__ = ["BITS", "CONFIG_VERSION", "GROUP_SIZES", "NUMERICAL_DAMP", "PROFILES", "EPMQConfig"]

CONFIG_VERSION = 1
BITS = (2, 3, 4, 5, 6, 7, 8)
# What the host's kernels pack and run.
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
# From here on fp32 no longer tells the target from the merged weights; far above it λ overflows.
LARGEST_ALPHA = 1e9
# Wider apart than this one expert is lost in the rounding of another's Gram.
LARGEST_WEIGHT = 1e6
# The anchor λ is the damping. The host insists on a value in (0, 1) and adds it once more, so it
# gets one that changes no bit of an fp32 diagonal that the anchor already holds up.
NUMERICAL_DAMP = 1e-12

# Layouts that a GPTQ run can be saved in.
_FORMATS = (FORMAT.GPTQ, FORMAT.GPTQ_V2, FORMAT.GPTQ_P)

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


# What says how a run is carried out, not what it makes.
_OF_A_RUN = ("allow_duplicates", "require_pinned", "save_statistics", "regret_rows")

# Fields of the host that describe this machine or this process, not the quantization.
_NOT_SERIALISED = {
    *("offload_to_disk_path", "device", "meta", "method", "damp_percent", "damp_auto_increment"),
    *("smooth", "compute_device_filter"),
}


# ---- profiles ------------------------------------------------------------------------------------

# The paper's α (its §5.6 and appendices E, G): of language models, and of any merge made by WUDI;
# of the other families their own records say it.
_LANGUAGE, _WUDI = 1.0, 10.0


class Profile(NamedTuple):
    """Values for what an ``EPMQConfig`` leaves open.

    Attributes:
        alpha: a number, ``"auto"``, ``"gptq"``, or None for the paper's of the model's family.
        eta, rho, anchor, bias_refit: options of ``EPMQConfig``.
    """

    alpha: float | str | None
    eta: float
    rho: float
    anchor: str
    bias_refit: bool


PROFILES = {
    # By benchmarks/results/ablation.md. Biases (vision8 alone has some) gained nothing there.
    "best": Profile(alpha="auto", eta=1.0, rho=1.0, anchor="identity", bias_refit=False),
    "paper": Profile(alpha=None, eta=0.0, rho=0.0, anchor="identity", bias_refit=False),
    # What is compared with: GPTQ of the merge, with figures per expert.
    "gptq": Profile(alpha="gptq", eta=0.0, rho=0.0, anchor="identity", bias_refit=False),
}


def paper_alpha(model_type: str, merge_method: str | None = None) -> float:
    """The paper's α for a model of transformers' ``model_type`` that ``merge_method`` made."""
    if merge_method is not None and "wudi" in merge_method.lower():
        return _WUDI
    family = family_of(model_type)
    return _LANGUAGE if family is None else family.paper_alpha


# ---- what an option may be -----------------------------------------------------------------------

# Expert names reach file names, tables and the published provenance.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _within(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether it is a finite number of a range; an int may have more digits than a float."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and least <= value <= most and value < math.inf


def _one_of(known: Sequence[int]) -> Any:
    # 128.0 and True equal an int without being one; the host slices with it.
    def holds(value: Any) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and value in known

    return Annotated[Any, ruled(f"one of {list(known)}", holds, code="EPMQ-F33")]


def _pattern(value: Any) -> Any:
    try:
        pattern_matches(value, "")
    except re.error as error:
        words = f"a regular expression for the end of a module's name ({error})"
        raise PydanticCustomError("ruled", "Input should be {words}", {"words": words}) from error
    return value


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a pattern matches the end of a module's full name, whole path parts."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


_Alpha = Annotated[
    float | str,
    ruled(
        f'a number from 0 to {LARGEST_ALPHA:g}, "auto" or "gptq"',
        lambda value: (
            value in ("auto", "gptq")
            if isinstance(value, str)
            else _within(value, 0, LARGEST_ALPHA)
        ),
        code="EPMQ-F28",
        remedy="From 1e7 on the result is plain GPTQ of the merge.",
    ),
]
_Share = Annotated[float, ruled("a number between 0 and 1", lambda value: _within(value, 0, 1))]
_Weight = Annotated[
    float,
    ruled(
        f"a number between {1 / LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}",
        lambda value: _within(value, 1 / LARGEST_WEIGHT, LARGEST_WEIGHT),
        remedy="Leave out an expert that should not count.",
    ),
]
_HeldOut = Annotated[
    float,
    ruled("a number above 0 and at most 0.5", lambda value: _within(value, 0, 0.5) and value > 0),
]
_Model = Annotated[
    str,
    ruled("a folder or a hub id", is_word),
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
]
_Count = Annotated[
    int, ruled("0 or a positive integer", lambda value: is_whole(value) and value >= 0)
]
_Names = Annotated[
    list[str], BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value)
]


class _Grid(Declared):
    """The host's options that it would stumble over once the work is done, or read otherwise."""

    bits: _one_of(BITS) = 4
    group_size: _one_of(GROUP_SIZES) = 128
    sym: bool | None = None
    desc_act: bool | None = None
    act_group_aware: bool | None = None
    static_groups: bool | None = None


class _Override(_Grid):
    """What the host reads of an override for some layers, apart from what is ours to set."""

    mse: Any = None
    fallback: Any = None
    hessian: Any = None


_Dynamic = dict[
    str,
    Annotated[
        _Override,
        ruled(
            'a mapping of options ("-:pattern": {} leaves layers out)',
            lambda value: isinstance(value, Mapping),
        ),
    ],
]


def _option(description: str, default: Any = dataclasses.MISSING, factory: Any = None) -> Any:
    """A field with its documentation."""
    metadata = {"description": description}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---- the configuration ---------------------------------------------------------------------------


@dataclass
class EPMQConfig(GPTQConfig):
    """Options of one E-PMQ run, on top of every option of GPTQModel's ``GPTQConfig``.

    What each option means stands beside it, and on the page "Options" of the documentation.

    In a mixture of experts, a routed module that fewer tokens reach than ``fallback.threshold``
    (the host's, 0.5 % of all tokens) keeps the merged weight as its target.

    ``damp_percent`` is not an option here: the anchor is the damping. The host's other fields keep
    their names and defaults (``sym=True, desc_act=False``: what vLLM serves); ``group_size=-1``
    turns ``act_group_aware`` off, which it rules out.

    Raises:
        EPMQInputError: an option is out of range, or a host feature cannot go with E-PMQ.

    Source: arXiv 2605.16882.
    """

    experts: dict[str, Any] = _option(
        "the models that were merged, by name. Each is a local safetensors folder, a hub id "
        "`org/name@revision`, a PEFT LoRA adapter (folder or hub id; its base is `base`, else what "
        'the adapter says; `"base+adapter"` names both), or a model in memory: a module, a PEFT '
        "model or a state dict, which is not copied. The order is the order in which they are "
        "folded. At least one.",
        factory=dict,
    )
    profile: Literal["best", "paper", "gptq"] = _option(
        "values for `alpha, eta, rho, anchor` and `bias_refit` where they are left out: "
        '`"best"` of our ablation (docs/method.md); `"paper"`: its algorithm and its constants, α '
        "0.01 for CLIP and T5, 1 for language models, 10 for merges made by WUDI; or "
        '`"gptq"`: GPTQ of the merge, with the same report, to compare with.',
        "best",
    )
    alpha: _Alpha | None = _option(
        "strength of the anchor to the merged weights, λ = alpha · tr(H) / d (eq. 13). Large "
        "values (1e7) give plain GPTQ of the merge; 0 is allowed only where every Gram has full "
        'rank. `"auto"` chooses one for every shared input by rows that are held out; `"gptq"` '
        "rounds the merge itself, with GPTQ's damping.",
        None,
    )
    eta: _Share | None = _option(
        "share of each expert's own activations in the target, 0 to 1: `W_i (η z + (1 − η) x)` "
        "with z from a full-precision pass of expert i over its own rows. 0 is the paper.",
        None,
    )
    rho: _Share | None = _option(
        "where a layer writes to the residual stream, share of the gap to the expert's stream that "
        "the target makes up for, 0 to 1. 0 is the paper.",
        None,
    )
    anchor: Literal["identity", "channel"] | None = _option(
        'what λ multiplies: `"identity"`, the paper\'s, or `"channel"`: each input channel by '
        "its own energy, which no scaling of the inputs changes.",
        None,
    )
    bias_refit: bool | None = _option(
        "fit the biases of layers that have one as well: after rounding they take up the mean of "
        "what is left.",
        None,
    )
    held_out: _HeldOut = _option(
        'share of every expert\'s rows that `alpha="auto"` chooses with; they count in the final '
        "target like all others.",
        0.125,
    )
    alpha_pattern: dict[Annotated[str, BeforeValidator(_pattern)], _Alpha] = _option(
        "other alphas for some linear layers: a regular expression that must match the end of the "
        'module\'s full name, whole path parts (`"mlp.down_proj"`, `"layers.0..*"`; PEFT\'s rule '
        "for its pattern options) → alpha. The first match wins.",
        factory=dict,
    )
    base: _Model | None = _option(
        "the model that the experts were fine-tuned from: folder or hub id. Needed by `data_free`, "
        "and by adapters that name none.",
        None,
    )
    weighting: Literal["raw", "token", "trace", "minmax"] = _option(
        'how much each expert counts: `"raw"` sums over its calibration tokens, as the paper does; '
        '`"token"`: as if all had equally many tokens; `"trace"`: as if all had the same tr(H_i) '
        'in every layer; `"minmax"`: more for the expert of which the least is kept (memory then '
        "grows with the experts).",
        "raw",
    )
    expert_weights: dict[str, _Weight] = _option(
        "a factor on top, for some experts (default 1; 1e-6 to 1e6).", factory=dict
    )
    data_free: _Names = _option(
        "experts that have no calibration rows: in place of their Gram goes that of their task "
        "vector. Not part of the paper.",
        factory=list,
    )
    allow_duplicates: bool = _option(
        "accept experts that are the same model under two names; each counts.", False
    )
    require_pinned: bool = _option(
        "refuse a hub id without a 40-digit commit as its revision.", False
    )
    on_bad_module: Literal["raise", "rtn"] = _option(
        "what happens where numbers cannot be trusted (non-finite activations, expert weights, "
        'target or scales, a curvature that is not positive definite): `"raise"` stops the run; '
        '`"rtn"` rounds that module\'s merged weight to nearest and records it. Non-finite '
        "*merged* weights always stop the run.",
        "raise",
    )
    regret_rows: _Count = _option(
        "calibration rows per expert and layer that the report's figures per expert are from, "
        "about (256); 0 for none. They are kept until the layer is rounded.",
        256,
    )
    save_statistics: bool = _option(
        "keep what the calibration says of every layer, expert by expert, with the checkpoint, so "
        "that it can be quantized anew without rows or forward passes; see docs/statistics.md. "
        "Half precision, in this run as well.",
        False,
    )

    def __post_init__(self) -> None:
        self.experts = _checked_experts(self.experts)
        self._fill_in()
        values = {name: getattr(self, name) for name in _OPTIONS.model_fields}
        for name, value in validated(_OPTIONS, values, ""):
            setattr(self, name, value)
        self.bits, self.group_size = int(self.bits), int(self.group_size)
        self._check_names()
        self._check_data_free()
        if self.group_size == -1 and self.act_group_aware is None:
            self.act_group_aware = False
        _check_dynamic(self.dynamic)
        self._check_damping()
        self._check_host_features()
        try:
            super().__post_init__()
            # Compiles every pattern, which it would otherwise do at the first layer.
            self.dynamic_get("")
        except EPMQInputError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise EPMQInputError(
                f"EPMQConfig: {str(error).rstrip('.')}.",
                code="EPMQ-O01",
                subject="EPMQConfig",
                remedy="GPTQModel's documentation of `GPTQConfig` says what it takes.",
            ) from error
        if self.format not in _FORMATS:
            names = "one of " + ", ".join(known.value for known in _FORMATS)
            raise bad_option("format", names, self.format)

    def _fill_in(self) -> None:
        """What the profile says of the options that were left out."""
        if not isinstance(self.profile, str) or self.profile not in PROFILES:
            raise bad_option("profile", f"one of {', '.join(PROFILES)}", self.profile)
        profile = PROFILES[self.profile]
        # Not fields: what the profile fills in is not written out as if it had been asked for.
        self.left_open = tuple(name for name in profile._fields if getattr(self, name) is None)
        for name in self.left_open:
            setattr(self, name, getattr(profile, name))

    def _check_names(self) -> None:
        for option in ("expert_weights", "data_free"):
            for name in getattr(self, option):
                if name not in self.experts:
                    raise EPMQInputError(
                        f"`{option}` names {name!r}, which is not one of the experts "
                        f"{list(self.experts)}.",
                        code="EPMQ-F21",
                        subject=f"`{option}`",
                        remedy="Use the names under `experts`.",
                    )

    def _check_data_free(self) -> None:
        self.data_free = list(dict.fromkeys(self.data_free))
        if len(self.data_free) == len(self.experts):
            raise bad_option(
                "data_free",
                "some of the experts",
                self.data_free,
                "Give calibration rows for at least one: activations must come from somewhere.",
                code="EPMQ-F22",
            )
        if self.data_free and self.save_statistics:
            cause = (
                "cannot go with `data_free`: a Gram made of a task vector is no sum over "
                "calibration rows"
            )
            remedy = "Give all experts rows, or leave out one of the two."
            raise conflict("save_statistics", cause, remedy)
        if self.data_free and self.base is None:
            cause = (
                "needs `base`: a task vector is an expert minus the model it was fine-tuned from"
            )
            raise conflict("data_free", cause, "Set `base` to that model's folder or hub id.")

    @property
    def targets_asked_for(self) -> bool:
        """Whether ``eta`` or ``rho`` was given, not left to the profile."""
        return not {"eta", "rho"} <= set(self.left_open)

    @property
    def runs_experts(self) -> bool:
        """Whether a target needs the experts' own activations."""
        return bool(self.eta or self.rho)

    @property
    def chooses_alpha(self) -> bool:
        """Whether some layer's α is chosen by held-out rows."""
        return "auto" in (self.alpha, *self.alpha_pattern.values())

    def _check_damping(self) -> None:
        if self.damp_percent not in (None, NUMERICAL_DAMP):
            cause = f"is not an option of EPMQConfig, got {self.damp_percent!r}: the anchor is the"
            remedy = "Set `alpha` (λ = alpha · tr(H)/d) instead."
            raise conflict("damp_percent", f"{cause} damping", remedy)
        if self.damp_auto_increment not in (None, 0, 0.0):
            cause = f"is not an option of EPMQConfig, got {self.damp_auto_increment!r}: damping is"
            remedy = "Leave it out; raise `alpha` where a layer needs it."
            raise conflict("damp_auto_increment", f"{cause} never raised behind your back", remedy)
        self.damp_percent, self.damp_auto_increment = NUMERICAL_DAMP, 0.0

    def _check_host_features(self) -> None:
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise conflict(name, f"cannot be used with EPMQConfig: {why}", "Leave it out.")

    def alpha_for(self, module: str) -> float | str:
        """The alpha of the linear layer with this full name; ``"auto"``, ``"gptq"`` are some."""
        for pattern, alpha in self.alpha_pattern.items():
            if pattern_matches(pattern, module):
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

    def settled_options(self) -> dict[str, Any]:
        """:meth:`to_options` with what the profile filled in, and without places.

        What statistics that are kept were made with: models and folders are named elsewhere.
        """
        options = self.to_options()
        # Written out even where they are the defaults of today.
        names = ("bits", "group_size", "sym", "desc_act", "weighting", *self.left_open)
        options |= {name: getattr(self, name) for name in names}
        for name in ("experts", "base", "profile", "epmq_config_version", *_OF_A_RUN):
            options.pop(name, None)
        return options

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
            if not option.init or option.name in (*_NOT_SERIALISED, *self.left_open):
                continue
            value = getattr(self, option.name)
            if value != _settled_default(option):
                options[option.name] = _plain(value, option.name)
        return options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EPMQConfig:
        """The inverse of :meth:`to_options`.

        Raises:
            EPMQInputError: an option that does not exist, or a file of another version.
        """
        if not isinstance(options, Mapping):
            raise bad_option("options", "a mapping", options)
        options = dict(options)
        version = options.pop("epmq_config_version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            remedy = "It was written by another version of epmq_gptq: use that one."
            rule = str(CONFIG_VERSION)
            raise bad_option("epmq_config_version", rule, version, remedy, "EPMQ-O04")
        known = [option.name for option in dataclasses.fields(cls) if option.init]
        for name in options:
            if name not in known:
                raise unknown_key(name, known, "", f"`{name}`")
        return cls(**options)

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> EPMQConfig:
        """From JSON text, or from a file where a ``Path`` is given."""
        return cls._parsed(text, parse_json)

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return write_yaml(self.to_options())

    @classmethod
    def from_yaml(cls, text: str | Path) -> EPMQConfig:
        """From YAML text, or from a file where a ``Path`` is given."""
        return cls._parsed(text, parse_yaml)

    @classmethod
    def _parsed(cls, text: str | Path, parse: Callable[[str], Any]) -> EPMQConfig:
        if isinstance(text, Path):
            return cls.from_options(read_data(text, f"the EPMQConfig `{text.name}`", parse))
        try:
            return cls.from_options(parse(text))
        except EPMQInputError as error:
            raise error.within("the EPMQConfig") from error


_OPTIONS = create_model(
    "EPMQConfig",
    __base__=_Grid,
    true_sequential=(bool, True),
    lm_head=(bool, False),
    **{
        name: (annotation, None)
        for name, annotation in inspect.get_annotations(EPMQConfig, eval_str=True).items()
    },
)


def _checked_experts(experts: Any) -> dict[str, str | InMemoryExpert]:
    """Name → folder, hub id, or a model in memory that is ready to be read."""
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
            rule = "a folder, a hub id, a model or a state dict"
            raise bad_option(f"experts.{name}", rule, source)
    return checked


def _check_dynamic(dynamic: Any) -> None:
    """Refuse an override that the host would pass over, or that cannot go with experts."""
    if dynamic is None:
        return
    for overrides in dynamic.values() if isinstance(dynamic, Mapping) else ():
        for name in ("alpha", "damp_percent"):
            if isinstance(overrides, Mapping) and name in overrides:
                cause = f"sets `{name}`, which EPMQConfig does not allow"
                raise conflict("dynamic", cause, "Use `alpha_pattern` for a module's anchor.")
    validated(_Dynamic, dynamic, "`dynamic`")


# ---- as plain data -------------------------------------------------------------------------------


def _settled_default(option: dataclasses.Field) -> Any:
    """What an option holds after ``__post_init__`` where the user said nothing."""
    if option.name in ("desc_act", "act_group_aware"):
        return option.name == "act_group_aware"
    if option.default is not dataclasses.MISSING:
        return option.default
    return None if option.default_factory is dataclasses.MISSING else option.default_factory()


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
