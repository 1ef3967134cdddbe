"""``EPMQConfig``: a ``GPTQConfig`` that also names the experts and the strength of the anchor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptqmodel.quantization.config import FORMAT, GPTQConfig

from .config_checks import (
    BITS,
    GROUP_SIZES,
    LARGEST_WEIGHT,
    check_alpha,
    check_dynamic,
    check_experts,
    check_grid,
    check_pattern,
    number,
    pattern_matches,
)
from .config_files import CONFIG_VERSION, known_options, options_of, parsed
from .errors import EPMQInputError
from .io.declared import bad_option, is_count
from .io.yaml_files import parse_json, parse_yaml, write_yaml
from .method.target import ANCHORS
from .method.weighting import WEIGHTINGS
from .profiles import PROFILES

__all__ = ["BITS", "CONFIG_VERSION", "GROUP_SIZES", "NUMERICAL_DAMP", "EPMQConfig"]

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


@dataclass
class EPMQConfig(GPTQConfig):
    """Options of one E-PMQ run, on top of every option of GPTQModel's ``GPTQConfig``.

    Args:
        experts: the models that were merged, by name. Each is a local safetensors folder, a hub id
            ``org/name@revision``, a PEFT LoRA adapter (folder or hub id; its base is ``base``, else
            what the adapter says; ``"base+adapter"`` names both), or a model in memory: a module, a
            PEFT model or a state dict, which is not copied. The order is the order in which they
            are folded. At least one.
        profile: values for ``alpha, eta, rho, anchor`` and ``bias_refit`` where they are left out:
            ``"best"`` of our ablation (docs/method.md); ``"paper"``: its algorithm and its
            constants, α 0.01 for CLIP and T5, 1 for language models, 10 for merges made by WUDI; or
            ``"gptq"``: GPTQ of the merge, with the same report, to compare with.
        alpha: strength of the anchor to the merged weights, λ = alpha · tr(H) / d (eq. 13). Large
            values (1e7) give plain GPTQ of the merge; 0 is allowed only where every Gram has full
            rank. ``"auto"`` chooses one for every shared input by rows that are held out;
            ``"gptq"`` rounds the merge itself, with GPTQ's damping.
        eta: share of each expert's own activations in the target, 0 to 1: ``W_i (η z + (1 − η) x)``
            with z from a full-precision pass of expert i over its own rows. 0 is the paper.
        rho: where a layer writes to the residual stream, share of the gap to the expert's stream
            that the target makes up for, 0 to 1. 0 is the paper.
        anchor: what λ multiplies: ``"identity"``, the paper's, or ``"channel"``: each input channel
            by its own energy, which no scaling of the inputs changes.
        bias_refit: fit the biases of layers that have one as well: after rounding they take up the
            mean of what is left.
        held_out: share of every expert's rows that ``alpha="auto"`` chooses with; they count in the
            final target like all others.
        alpha_pattern: other alphas for some linear layers: a regular expression that must match the
            end of the module's full name, whole path parts (``"mlp.down_proj"``, ``"layers.0..*"``;
            PEFT's rule for its pattern options) → alpha. The first match wins.
        base: the model that the experts were fine-tuned from: folder or hub id. Needed by
            ``data_free``, and by adapters that name none.
        weighting: how much each expert counts: ``"raw"`` sums over its calibration tokens, as the
            paper does; ``"token"``: as if all had equally many tokens; ``"trace"``: as if all had
            the same tr(H_i) in every layer; ``"minmax"``: more for the expert of which the least
            is kept (memory then grows with the experts). See
            :class:`~epmq_gptq.method.weighting.Weighting`.
        expert_weights: a factor on top, for some experts (default 1; 1e-6 to 1e6).
        data_free: experts that have no calibration rows: in place of their Gram goes that of their
            task vector, see :func:`~epmq_gptq.method.deltas.data_free_gram`. Not part of the paper.
        allow_duplicates: accept experts that are the same model under two names; each counts.
        require_pinned: refuse a hub id without a 40-digit commit as its revision.
        on_bad_module: what happens where numbers cannot be trusted (non-finite activations, expert
            weights, target or scales, a curvature that is not positive definite): ``"raise"`` stops
            the run; ``"rtn"`` rounds that module's merged weight to nearest and records it.
            Non-finite *merged* weights always stop the run.
        regret_rows: calibration rows per expert and layer that the report's figures per expert are
            from, about (256); 0 for none. They are kept until the layer is rounded.
        save_statistics: keep what the calibration says of every layer, expert by expert, with the
            checkpoint, so that it can be quantized anew without rows or forward passes; see
            docs/statistics.md. Half precision, in this run as well.

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
    profile: str = field(default="best", metadata={"choices": list(PROFILES)})
    alpha: float | str | None = field(default=None)
    eta: float | None = field(default=None)
    rho: float | None = field(default=None)
    anchor: str | None = field(default=None, metadata={"choices": list(ANCHORS)})
    bias_refit: bool | None = field(default=None)
    held_out: float = field(default=0.125)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base: str | None = field(default=None)
    weighting: str = field(default="raw", metadata={"choices": list(WEIGHTINGS)})
    expert_weights: dict[str, float] = field(default_factory=dict)
    data_free: list[str] = field(default_factory=list)
    allow_duplicates: bool = field(default=False)
    require_pinned: bool = field(default=False)
    on_bad_module: str = field(default="raise", metadata={"choices": ["raise", "rtn"]})
    regret_rows: int = field(default=256)
    save_statistics: bool = field(default=False)

    def __post_init__(self) -> None:
        self.experts = check_experts(self.experts)
        self._check_target()
        if not isinstance(self.alpha_pattern, Mapping):
            raise bad_option(
                "alpha_pattern", "a mapping of module patterns to alphas", self.alpha_pattern
            )
        self.alpha_pattern = {
            check_pattern(pattern): check_alpha(value, f"alpha_pattern[{pattern!r}]", auto=True)
            for pattern, value in self.alpha_pattern.items()
        }
        self._check_choices()
        self._check_weighting()
        check_grid(vars(self))
        self.bits, self.group_size = int(self.bits), int(self.group_size)
        if self.group_size == -1 and self.act_group_aware is None:
            self.act_group_aware = False
        check_dynamic(self.dynamic)
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

    def _check_target(self) -> None:
        if self.profile not in PROFILES:
            raise bad_option("profile", f"one of {', '.join(PROFILES)}", self.profile)
        profile = PROFILES[self.profile]
        # Not fields: what the profile fills in is not written out as if it had been asked for.
        self.left_open = tuple(name for name in profile._fields if getattr(self, name) is None)
        for name in self.left_open:
            setattr(self, name, getattr(profile, name))
        if self.alpha is not None:
            self.alpha = check_alpha(self.alpha, "alpha", auto=True)
        for name in ("eta", "rho"):
            value = number(getattr(self, name), name)
            if value > 1:
                raise bad_option(name, "between 0 and 1", value)
            setattr(self, name, value)
        if self.anchor not in ANCHORS:
            raise bad_option("anchor", f"one of {', '.join(ANCHORS)}", self.anchor)
        if not isinstance(self.bias_refit, bool):
            raise bad_option("bias_refit", "True or False", self.bias_refit)
        self.held_out = number(self.held_out, "held_out")
        if not 0 < self.held_out <= 0.5:
            raise bad_option("held_out", "above 0 and at most 0.5", self.held_out)

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

    def _check_choices(self) -> None:
        if self.on_bad_module not in ("raise", "rtn"):
            raise bad_option("on_bad_module", '"raise" or "rtn"', self.on_bad_module)
        if self.base is not None and (
            not isinstance(self.base, (str, Path)) or not str(self.base).strip()
        ):
            raise bad_option("base", "a folder or a hub id", self.base)
        self.base = None if self.base is None else str(self.base)
        for name in ("allow_duplicates", "require_pinned", "save_statistics"):
            if not isinstance(getattr(self, name), bool):
                raise bad_option(name, "True or False", getattr(self, name))
        if self.regret_rows != 0 and not is_count(self.regret_rows):
            raise bad_option("regret_rows", "0 or a positive integer", self.regret_rows)

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
            weights[name] = number(value, option)
            if weights[name] <= 0:
                raise bad_option(
                    option, "above 0", value, "Leave out an expert that should not count."
                )
            if not 1 / LARGEST_WEIGHT <= weights[name] <= LARGEST_WEIGHT:
                raise bad_option(
                    option, f"between {1 / LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}", value
                )
        self.expert_weights = weights
        if isinstance(self.data_free, str) or not isinstance(self.data_free, (list, tuple)):
            raise bad_option("data_free", "a list of experts' names", self.data_free)
        for name in self.data_free:
            self._check_known(name, "data_free")
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
            raise EPMQInputError(
                "`save_statistics` cannot go with `data_free`: a Gram made of a task vector is no "
                "sum over calibration rows.",
                code="EPMQ-O03",
                subject="`save_statistics`",
                remedy="Give all experts rows, or leave out one of the two.",
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
        if not isinstance(name, str) or name not in self.experts:
            raise EPMQInputError(
                f"`{option}` names {name!r}, which is not one of the experts {list(self.experts)}.",
                code="EPMQ-F21",
                subject=f"`{option}`",
                remedy="Use the names under `experts`.",
            )

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
        return options_of(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EPMQConfig:
        """The inverse of :meth:`to_options`.

        Raises:
            EPMQInputError: an option that does not exist, or a file of another version.
        """
        return cls(**known_options(cls, options))

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> EPMQConfig:
        """From JSON text, or from a file where a ``Path`` is given."""
        return cls.from_options(parsed(parse_json, text, "JSON"))

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return write_yaml(self.to_options())

    @classmethod
    def from_yaml(cls, text: str | Path) -> EPMQConfig:
        """From YAML text, or from a file where a ``Path`` is given."""
        return cls.from_options(parsed(parse_yaml, text, "YAML"))
