"""The recipe that a target stands for: a recipe itself, or a merged model.

Of a merged model its lineage says something, the user adds something, and a draft knows what is
missing.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..calibration.arguments import (
    DATA_FREE,
    check_experts_of,
    check_source,
    given_calibration,
    moved_source,
)
from ..calibration.sources import RowSource
from ..errors import EPMQInputError, EPMQWarning
from ..io.console import Reporter
from ..io.declared import conflict, is_word, shown
from ..io.hub import fetch, local_folder, parse_hub_id
from ..io.yaml_files import write_yaml
from ..merging.lineage.facts import Lineage, is_local, published, refusal
from ..merging.lineage.read import LINEAGE_FILES, read_lineage
from ..recipe import RECIPE_VERSION, Recipe

_MERGED = "the merged model"
_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Given:
    """What the user says on top of the lineage; paths are relative to the working folder.

    Attributes:
        experts: name → folder, hub id or ``base+adapter``; replaces or adds an expert.
        base: instead of the lineage's.
        calibration: expert → rows or whatever says where they are, or one source for all with
            ``expert_column``.
        quantize: options of EPMQConfig.
        dtype, seed: as in a recipe.
    """

    experts: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    calibration: Any = None
    quantize: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    seed: int | None = None


@dataclass
class Draft:
    """A recipe of which models or calibration may still be missing.

    Attributes:
        merged: folder, or hub id at the commit that was read.
        lineage: what the folder says; None where it says nothing and the user named the experts.
        experts: name → spec of those that are here or on a hub.
        absent: name → spec of those that are paths at which there is nothing.
        base: spec of the base, or None.
        calibration: the recipe's block: expert → source, or one source for all.
        notes: what the user should know.
    """

    merged: str
    lineage: Lineage | None
    experts: dict[str, str]
    absent: dict[str, str]
    base: str | None
    calibration: dict[str, Any]
    given: Given
    notes: list[str]

    # ---- what is missing -----------------------------------------------------------------------

    @property
    def uncalibrated(self) -> list[str]:
        """The experts without calibration, in their order."""
        if "expert_column" in self.calibration:  # one source, whose rows name their experts
            return []
        return [name for name in self._names if name not in self.calibration]

    @property
    def _names(self) -> list[str]:
        names = list(self.lineage.experts) if self.lineage else []
        return [n for n in dict.fromkeys([*names, *self.experts]) if n in self._known]

    @property
    def _known(self) -> dict[str, str]:
        return self.experts | self.absent

    def ask(self, question: Callable[[str, Callable[[str], Any]], Any]) -> None:
        """Get what is missing from a person.

        Args:
            question: (text, read) → what ``read`` makes of the first answer that it does not refuse
                with an EPMQInputError.
        """
        for name in list(self.absent):
            text = f"Folder or hub id of expert `{name}` (`{published(self.absent[name])}`)"
            self.experts[name] = question(text, partial(_check_place, name))
            del self.absent[name]
        for name in self.uncalibrated:
            text = f"Calibration of expert `{name}` (a file, {DATA_FREE}, or {{dataset: org/x, …}})"
            self.calibration[name] = question(text, partial(check_source, name))

    def check(self) -> None:
        """Refuse what is still missing, in one line.

        Raises:
            EPMQInputError: naming each missing thing and the option that gives it.
        """
        if self.absent:
            listed = ", ".join(f"`{n}` (`{published(s)}`)" for n, s in self.absent.items())
            options = " ".join(f"`--expert {name}=...`" for name in self.absent)
            raise refusal(
                _MERGED,
                f"`{published(self.merged)}` was made of models that are not on this machine: "
                f"{listed}",
                f"Say where they are: {options}.",
            )
        if self.uncalibrated:
            listed = ", ".join(f"`{name}`" for name in self.uncalibrated)
            options = " ".join(f"`--calibration {name}=FILE`" for name in self.uncalibrated)
            raise EPMQInputError(
                f"calibration is missing for {len(self.uncalibrated)} of the "
                f"{len(self._names)} experts: {listed}.",
                code="EPMQ-F21",
                subject="`--calibration`",
                remedy=f"Give rows of each expert's own task: {options}; for FILE see "
                "`epmq-gptq quantize --help`, and `--write-recipe FILE` writes down the rest.",
            )

    def described(self) -> list[tuple[str, str]]:
        """What was found, as lines of (kind, text)."""
        lines = [("merged", published(self.merged))]
        if self.lineage is not None:
            lines.append(("lineage", self.lineage.described()))
        if self.base is not None:
            lines.append(("base", published(self.base)))
        weights = self.lineage.weights if self.lineage else {}
        for name in self._names:
            weight = weights.get(name) if name not in self.given.experts else None
            told = "" if weight is None else f", weight {weight:g}"
            gone = ", not on this machine" if name in self.absent else ""
            lines.append(("expert", f"{name}: {published(self._known[name])}{told}{gone}"))
        return lines

    def check_weights(self, tell: Callable[[str], None]) -> None:
        """Refuse a folder that only bears the name of a model that was merged.

        Our own record knows models by the last part of their path, and `checkpoint-1000` is many.
        It has digests too: all weights of such folders are read, and the run's own record does not
        read them again.

        Args:
            tell: called with what is read next.

        Raises:
            EPMQInputError: naming the expert and the option that says where it is.
        """
        if self.lineage is None:
            return
        from ..io.checkpoints import open_checkpoint

        found = [
            (self.experts[name], digest, f"expert `{name}`", f"--expert {name}=...")
            for name, digest in self.lineage.digests.items()
            if name in self.experts and name not in self.given.experts
        ]
        if self.lineage.base_digest and self.base and self.given.base is None:
            found.append((self.base, self.lineage.base_digest, "the base", "--base ..."))
        for spec, digest, what, option in found:
            if not Path(spec).is_dir():
                continue  # a hub id, at the commit that was merged
            checkpoint, source = open_checkpoint(spec, what=what)
            tell(f"{what}: {source.name} against the merge's record")
            same = checkpoint.digest() == digest
            checkpoint.close()
            if not same:
                raise refusal(
                    what,
                    f"the folder `{source.name}` that was found holds other weights than the "
                    "model of that name that was merged",
                    f"Say where it is: `{option}`.",
                )

    # ---- the recipe ----------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        """The recipe that runs.

        Raises:
            EPMQInputError: something is missing, see :meth:`check`, or refused by :class:`Recipe`.
        """
        self.check()
        return Recipe.from_options(self._options(Path.cwd()), Path.cwd())

    def to_yaml(self, folder: Path) -> str:
        """The recipe as a file of ``folder``; what is missing is there as comments.

        Raises:
            EPMQInputError: rows are in memory.
        """
        options = self._options(folder)
        calibration = options.pop("calibration", {})
        lists = [each for each in calibration.values() if isinstance(each, list)]
        if any(type(item) is RowSource for each in lists for item in each):
            raise EPMQInputError(
                "`--write-recipe`: `calibration` has rows that are in no file.",
                code="EPMQ-O03",
                subject="`--write-recipe`",
                remedy="Say where the rows are, or leave `calibration` out.",
            )
        experts = options["experts"]
        lines = [
            "# Written by `epmq-gptq quantize --write-recipe`; `epmq-gptq quantize --help` has "
            "every key."
        ]
        head = {key: options.pop(key) for key in ("version", "merged", "experts")}
        lines.append(write_yaml(head))
        for name in self.absent:
            lines.append(f"# not on this machine: expert {name} ({experts[name]})\n")
        lines.append("calibration:\n")
        if calibration:
            lines.append("".join(f"  {line}\n" for line in write_yaml(calibration).splitlines()))
        for name in self.uncalibrated:
            lines.append(
                f"  # {name}: {{file: {name}.jsonl, samples: 128}}    # rows of its own task\n"
            )
        if options:
            lines.append(write_yaml(options))
        return lines[0] + "\n" + "".join(lines[1:])

    def _options(self, folder: Path) -> dict[str, Any]:
        quantize = dict(self.given.quantize)
        if self.base is not None:
            quantize.setdefault("base", _moved(self.base, folder))
        options = {
            "version": RECIPE_VERSION,
            "merged": _moved(self.merged, folder),
            "experts": {name: _moved(self._known[name], folder) for name in self._names},
            "calibration": {
                name: moved_source(each, folder) for name, each in self.calibration.items()
            },
            "quantize": quantize,
            "seed": self.given.seed,
            "dtype": self.given.dtype,
            "lineage": self.lineage.to_record() if self.lineage else None,
        }
        return {key: value for key, value in options.items() if value not in (None, {})}


def draft_of_merge(target: str, given: Given) -> Draft:
    """Read the lineage of a merged model and put what the user says on top.

    Args:
        target: folder, or hub id ``org/name[@revision]``.
        given: what the user says; its ``require_pinned`` holds for the target too.

    Raises:
        EPMQInputError: the model cannot be found, its lineage is not to be used, or an option is
            wrong.
    """
    given = _with_one_base(given)
    folder = local_folder(target, _MERGED)
    merged, name, places = target, target, []
    if folder is None:
        fetched = fetch(
            target,
            what=_MERGED,
            patterns=("config.json", *LINEAGE_FILES),
            require_pinned=given.quantize.get("require_pinned") is True,
        )
        folder, name = fetched.folder, fetched.repository
        merged = parse_hub_id(target).at(fetched.commit)
        if merged != target:
            _warn_unpinned(target, merged)
    else:
        # mergekit reads relative paths from where it is started, often the folder above.
        merged, name = str(folder.absolute()), folder.resolve().name
        places = [Path.cwd(), folder.resolve().parent]
    lineage = _lineage(folder, name, given)
    experts, absent, notes = {}, {}, list(lineage.notes) if lineage else []
    for expert, spec in (lineage.experts if lineage else {}).items():
        if expert not in given.experts:
            found = _located(spec, places)
            (absent if found is None else experts)[expert] = found or spec
    experts |= given.experts
    base = _base(lineage, given, places, notes)
    if given.base is not None:
        # A card lists the base among the models.
        for expert in [n for n, s in experts.items() if s == base and n not in given.experts]:
            del experts[expert]
            notes.append(f"`{expert}` is the base and no expert")
    draft = Draft(merged, lineage, experts, absent, base, {}, given, notes)
    if given.calibration is not None:
        check_experts_of(given.calibration, draft._names)
        draft.calibration = given.calibration
    return draft


def _with_one_base(given: Given) -> Given:
    """``--set base=`` is ``--base``."""
    options = dict(given.quantize)
    base = options.pop("base", None)
    if base is None or base == given.base:
        return given if base is None else replace(given, quantize=options)
    if given.base is not None or not is_word(base):
        raise EPMQInputError(
            f"`--set base` should be the one base, got {shown(base)} beside {shown(given.base)}.",
            code="EPMQ-O03",
            subject="`--set base`",
            remedy="Give `--base` alone.",
        )
    return replace(given, base=base, quantize=options)


def _warn_unpinned(target: str, merged: str) -> None:
    warnings.warn(
        EPMQWarning(
            f"{_MERGED}: `{target}` is not pinned; today it is `{merged}`.", code="EPMQ-F16"
        ),
        stacklevel=3,
    )


def _lineage(folder: Path, name: str, given: Given) -> Lineage | None:
    has_lineage = folder.is_dir() and any((folder / each).exists() for each in LINEAGE_FILES)
    if given.experts and not has_lineage:
        return None
    return read_lineage(folder, name)


def _base(
    lineage: Lineage | None, given: Given, places: Sequence[Path], notes: list[str]
) -> str | None:
    if given.base is not None or lineage is None or lineage.base is None:
        return given.base
    found = _located(lineage.base, places)
    if found is None:
        notes.append(
            f"the base, `{published(lineage.base)}`, is not on this machine and is left out "
            "(`--base` says where it is)"
        )
    return found


def _located(spec: str, places: Sequence[Path]) -> str | None:
    """A model's spec as it is found from here; None for a path at which there is nothing."""
    whole = _existing(spec, places)
    if whole is not None:
        return whole
    parts = []
    for part in spec.split("+"):
        found = _existing(part, places)
        if found is None and is_local(part):
            return None
        parts.append(found or part)
    return "+".join(parts)


def _existing(path: str, places: Sequence[Path]) -> str | None:
    for place in places:
        try:
            folder = place / Path(path).expanduser()
            if folder.is_dir():
                return str(folder)
        except (OSError, RuntimeError, ValueError):
            return None
    return None


def _check_place(name: str, answer: str) -> str:
    answer = answer.strip()
    parts = [answer] if _existing(answer, [Path()]) else answer.split("+")
    for part in parts:
        local_folder(part.strip(), f"expert `{name}`")
    return answer


# ---- a recipe or a merged model ----------------------------------------------------------------


def is_recipe(target: Any) -> bool:
    """Whether a target is a recipe; a folder or a hub id is a merged model."""
    if isinstance(target, (Recipe, Mapping)):
        return True
    try:
        path = Path(target).expanduser()
        return not path.is_dir() and (path.is_file() or path.suffix.lower() in _RECIPES)
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        return False


def read_target(target: Any, given: Given, reporter: Reporter) -> Recipe | Draft:
    """A recipe as it is given, or the draft of one that a merged model stands for.

    Args:
        target: a recipe, its file or its options; or folder or hub id of a merged model.
        given: what the user says of a merged model; of a recipe, options of ``quantize`` only.
        reporter: where to show what a merged model says of itself.

    Raises:
        EPMQInputError: the target cannot be read, or an option does not go with it.
    """
    if not is_recipe(target):
        return read_merge(str(target), given, reporter)
    _refuse_given(given)
    if isinstance(target, Recipe):
        recipe = copy.copy(target)
    elif isinstance(target, Mapping):
        options = dict(target)
        if "calibration" in options:
            options["calibration"] = given_calibration(options["calibration"])
        recipe = Recipe.from_options(options, Path.cwd())
    else:
        recipe = Recipe.from_file(Path(target).expanduser())
    recipe.quantize = {**recipe.quantize, **given.quantize}
    return recipe


def read_merge(target: str, given: Given, reporter: Reporter) -> Draft:
    """What is known of a merged model, shown line by line."""
    draft = draft_of_merge(target, given)
    for name, text in draft.described():
        reporter.step(name, text)
    for note in draft.notes:
        reporter.note(note)
    return draft


def complete_recipe(target: Any, given: Given, reporter: Reporter) -> Recipe:
    """The recipe that ``target`` stands for; asks on a terminal for what is missing.

    Raises:
        EPMQInputError: as :func:`read_target`, or something is missing and nobody can be asked.
    """
    read = read_target(target, given, reporter)
    if isinstance(read, Recipe):
        return read
    if reporter.asks:
        read.ask(partial(_ask, reporter))
    recipe = read.recipe()
    read.check_weights(lambda what: reporter.step("verify", what))
    return recipe


def _ask(reporter: Reporter, text: str, read: Callable[[str], Any]) -> Any:
    while True:
        try:
            return read(reporter.ask(text))
        except EPMQInputError as error:
            reporter.error(str(error), error.code)


def _refuse_given(given: Given) -> None:
    """Refuse options that a recipe has keys for."""
    options = {
        "--calibration": given.calibration,
        "--expert": given.experts or None,
        "--base": given.base,
        "--dtype": given.dtype,
        "--seed": given.seed,
    }
    for option, value in options.items():
        if value is not None:
            raise of_merged_model(option, "Write it in the recipe.")


def of_merged_model(option: str, remedy: str) -> EPMQInputError:
    """The error of an option that a recipe has no use for."""
    return conflict(option, "goes with a merged model, and the target is a recipe", remedy)


# ---- writing -----------------------------------------------------------------------------------


def _moved(spec: str, folder: Path) -> str:
    """A spec as a file of ``folder`` writes it: what lies in it relative, hub ids as they are."""
    whole = _existing(spec, [Path()])
    if "+" in spec and whole is None:
        return "+".join(_moved(part.strip(), folder) for part in spec.split("+"))
    if whole is None:
        return spec
    path, folder = Path(whole).absolute(), folder.absolute()
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)
