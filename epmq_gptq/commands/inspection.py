"""``epmq-gptq inspect``: everything that is wrong with a recipe or a merge, without running it.

A run stops at the first thing that is wrong. Here every step that fails becomes a finding, and the
steps that do not need it go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks.check import check_verify
from ..checks.findings import Finding, Preflight
from ..errors import EPMQError
from ..host import loading

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .draft import Draft

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is inspected.

    Attributes:
        merged: folder or hub id.
        experts: name → folder, hub id or ``base+adapter``.
        options: of EPMQConfig, without the experts.
        dtype: of the computation, as in a recipe.
        read_rows: reads the calibration rows, or None where there are none yet.
        findings: what is known already.
    """

    merged: str
    experts: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    read_rows: Callable[[], Mapping[str, Any]] | None = None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Subject:
        """A recipe; where it merges first, the base (or the first expert) stands for the merge."""
        options = dict(recipe.quantize)
        if recipe.data_free:
            options["data_free"] = recipe.data_free
        if isinstance(options.get("base"), str):
            options["base"] = recipe.source(options["base"])
        findings = ()
        merged = recipe.merged
        if merged is None:
            merged = recipe.merge.base or next(iter(recipe.experts.values()))
            name = "base" if recipe.merge.base else "first expert"
            findings = (
                *_method(recipe),
                Finding(
                    "note",
                    "EPMQ-F18",
                    "`merge`",
                    f"the merge is not made yet: its {name} stands in for it here.",
                ),
            )

        def read() -> Mapping[str, Any]:
            from .run_recipe import recipe_rows

            return recipe_rows(recipe)

        return cls(
            recipe.source(merged),
            {name: recipe.source(spec) for name, spec in recipe.experts.items()},
            options,
            recipe.dtype,
            read,
            findings,
        )

    @classmethod
    def of_draft(cls, draft: Draft) -> Subject:
        """A merged model and its lineage; what is missing is a finding."""
        if not draft.absent and not draft.uncalibrated:
            return cls.of_recipe(draft.recipe())
        findings = [
            Finding(
                "error",
                "EPMQ-F35",
                f"expert `{name}`",
                f"expert `{name}` is not on this machine.",
                f"Say where it is: `--expert {name}=...`.",
            )
            for name in draft.absent
        ]
        if draft.uncalibrated:
            names = ", ".join(f"`{name}`" for name in draft.uncalibrated)
            findings.append(
                Finding(
                    "warning",
                    "EPMQ-F21",
                    "`--calibration`",
                    f"calibration is not given for {names}: coverage, memory and time are unknown.",
                    "A run needs rows of each expert's own task.",
                )
            )
        options = dict(draft.given.quantize)
        if draft.base is not None:
            options.setdefault("base", draft.base)
        return cls(draft.merged, draft.experts, options, draft.given.dtype, None, tuple(findings))


def _method(recipe: Recipe) -> Iterator[Finding]:
    """What a run would refuse before it merges."""
    from .run_recipe import check_method

    try:
        check_method(recipe)
    except EPMQError as error:
        yield Finding.from_error(error)


class _Attempts:
    """Runs steps, and keeps as findings what they raise."""

    def __init__(self, findings: tuple[Finding, ...]):
        self.findings = list(findings)

    def __call__(self, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except EPMQError as error:
            self.findings.append(Finding.from_error(error))
            return None


def inspect(subject: Subject, *, verify: str = "sample", device: str | None = None) -> Preflight:
    """Look at everything that a run would use; imports GPTQModel, loads no weights of the host's.

    Args:
        subject: what to look at.
        verify: ``"headers"``, ``"sample"`` or ``"full"``, see ``preflight``.
        device: that the run would take; None for a GPU where there is one.

    Raises:
        EPMQInputError: ``verify`` or the device is refused.
    """
    check_verify(verify)
    from .. import EPMQConfig
    from ..host.door import merged_folder

    device = loading.choose_device(device)
    attempt = _Attempts(subject.findings)
    rows = attempt(subject.read_rows) if subject.read_rows is not None else None
    options = {**subject.options, "experts": dict(subject.experts)}
    config = attempt(lambda: EPMQConfig.from_options(options))
    pinned = subject.options.get("require_pinned") is True
    folder = attempt(lambda: merged_folder(subject.merged, require_pinned=pinned))
    experts = _experts(subject, pinned, attempt)
    is_asked = config is not None
    if not is_asked and subject.experts:
        config = attempt(lambda: EPMQConfig(experts=dict(subject.experts)))
    result = Preflight(verify=verify)
    if folder is not None and config is not None:
        result = _compare(folder, config, experts, rows, subject.dtype, verify, device, attempt)
        if not is_asked:
            _forget_options(result)
    result.add(attempt.findings)
    experts.close()
    return result


def _forget_options(result: Preflight) -> None:
    """Leave out what was said of default options, because those that were asked for are refused."""
    result.serving, result.estimates = {}, {}
    result.findings = [each for each in result.findings if each.code != "EPMQ-F33"]


def _experts(subject: Subject, pinned: bool, attempt: _Attempts) -> Any:
    """Those experts that can be opened."""
    from ..experts.experts import Experts

    base = subject.options.get("base")
    if base is not None and attempt(lambda: Experts({}, base=base, require_pinned=pinned)) is None:
        base = None
    usable = {}
    for name, spec in subject.experts.items():
        one = {name: spec}
        opened = attempt(lambda one=one: Experts(one, base=base, require_pinned=pinned))
        if opened is not None:
            opened.close()
            usable[name] = spec
    return Experts(usable, base=base, require_pinned=pinned)


def _compare(
    folder: Path,
    config: Any,
    experts: Any,
    rows: Mapping[str, Any] | None,
    dtype: str | None,
    verify: str,
    device: str,
    attempt: _Attempts,
) -> Preflight:
    from ..calibration.batches import input_rules
    from ..checks.check import Wanted, preflight
    from ..host.model_linears import check_architecture, quantizable_linears
    from ..io.checkpoints import Checkpoint

    model = attempt(lambda: loading.load_merged(folder, config, dtype, device))
    if model is None:
        return Preflight(verify=verify)
    linears = attempt(lambda: check_architecture(model) or list(quantizable_linears(model)))
    if linears is None:
        return Preflight(verify=verify)
    tokens = None
    if rows is not None:
        encoded = attempt(lambda: input_rules(model).encode(rows))
        tokens = None if encoded is None else encoded.tokens
    merged = Checkpoint(folder, what="the merged model")
    used = next(model.model.parameters()).dtype.itemsize
    try:
        return preflight(
            Wanted.of(config),
            merged,
            experts,
            linears,
            tokens,
            verify=verify,
            device=device,
            dtype_bytes=used,
        )
    finally:
        merged.close()
