"""What the models that a checkpoint was made from say of themselves: licence, language, task."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EPMQInputError
from ..io.folders import CARD_NAME, check_file
from ..io.hub import COMMIT, parse_hub_id
from ..io.yaml_files import parse_yaml

# Cards have a few thousand bytes.
_MAX_BYTES = 1_000_000
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_URL = re.compile(r"https://[\w.-]+(/[\w./%~+-]*)?", re.ASCII)


class Part(NamedTuple):
    """One model of a checkpoint's history.

    Attributes:
        role: "base", "merged" or "expert"; "adapter's base" for what an adapter stands on.
        name: the expert's name; "" for what is no expert.
        source: hub id, or the last part of a local path.
        revision: the commit of a hub id.
        sha256: of its weights.
    """

    role: str
    name: str
    source: str
    revision: str | None
    sha256: str

    @property
    def is_hub(self) -> bool:
        """Whether everybody can look it up: an id and a commit of a hub."""
        known = self.revision is not None and COMMIT.fullmatch(self.revision) is not None
        return known and parse_hub_id(self.source) is not None

    @property
    def label(self) -> str:
        """How errors and ``model.epmq_sources`` call it."""
        return {
            "base": "`base`",
            "merged": "merged model",
            "expert": f"expert `{self.name}`",
        }.get(self.role, f"base of expert `{self.name}`")


class Declared(NamedTuple):
    """What one model's card declares; None and () where it does not."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None


class Agreed(NamedTuple):
    """What all models declare alike, and why a licence is left out."""

    declared: Declared
    license_note: str


def parts_of(record: Mapping[str, Any]) -> list[Part]:
    """The models that a provenance names, in the order of a table: base, merged, experts."""
    found = [_part(record.get("base"), "base"), _part(record.get("merged"), "merged")]
    experts = record.get("experts")
    for expert in experts if isinstance(experts, list) else []:
        if isinstance(expert, Mapping):
            name = str(expert.get("name", "expert"))
            found.append(_part(expert, "expert", name))
            found.append(_part(expert.get("adapter_of"), "adapter's base", name))
    return [part for part in found if part is not None]


def _part(described: Any, role: str, name: str = "") -> Part | None:
    if not isinstance(described, Mapping):
        return None
    revision, sha256 = described.get("revision"), described.get("sha256")
    return Part(
        role,
        name,
        str(described.get("source", "")),
        revision if isinstance(revision, str) else None,
        sha256 if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
    )


def declared_by(part: Part, folders: Mapping[str, Path]) -> Declared | None:
    """What the card of one model declares; None where there is no card to read.

    Args:
        part: the model.
        folders: :attr:`Part.label` → its folder, as far as they are at hand. A model of a hub is
            also looked for in the hub's cache; nothing is fetched.
    """
    folder = folders.get(part.label)
    if folder is None and part.is_hub:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(part.source, CARD_NAME, revision=part.revision)
        folder = Path(file).parent if isinstance(file, str) else None
    if folder is None or not (folder / CARD_NAME).is_file():
        return None
    return read_declared(folder, part)


def read_declared(folder: Path, part: Part | None = None) -> Declared | None:
    """What ``README.md`` in ``folder`` declares; None where that cannot be read."""
    # Cards are prose of strangers: what is wrong with one must not cost a finished run.
    with contextlib.suppress(EPMQInputError, OSError, ValueError, RecursionError):
        file = check_file(folder, CARD_NAME, "the model card")
        if file.stat().st_size > _MAX_BYTES:
            return None
        front = _FRONT.search(file.read_text(encoding="utf-8-sig").replace("\r\n", "\n"))
        data = parse_yaml(front[1]) if front else {}
        return _declared(data, part) if isinstance(data, Mapping) else None
    return None


def _declared(data: Mapping[str, Any], part: Part | None) -> Declared:
    license = data.get("license")
    if isinstance(license, list) and len(license) == 1:
        license = license[0]
    language = data.get("language")
    languages = language if isinstance(language, list) else [language]
    # YAML reads the code of Norwegian as a truth value.
    languages = ["no" if each is False else each for each in languages]
    return Declared(
        _word(license),
        _word(data.get("license_name")),
        _link(data.get("license_link"), part),
        tuple(sorted({e for e in languages if isinstance(e, str) and _LANGUAGE.fullmatch(e)})),
        _word(data.get("pipeline_tag")),
    )


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _link(value: Any, part: Part | None) -> str | None:
    """A link that leads to the licence from elsewhere, too: one to a file becomes the hub's."""
    if not isinstance(value, str):
        return None
    if _URL.fullmatch(value):
        return value
    if part is not None and part.is_hub and _word(value):
        return f"https://huggingface.co/{part.source}/blob/{part.revision}/{value}"
    return None


def agreed(parts: list[Part], folders: Mapping[str, Path]) -> Agreed:
    """What all of a checkpoint's sources declare alike.

    The merged model needs no card of its own: it is made of the others. If it has one, it counts.
    """
    said = [(part, declared_by(part, folders)) for part in parts]
    said = [(part, each) for part, each in said if part.role != "merged" or _says(each)]
    known = [each for _, each in said if each is not None]
    silent = [part for part, each in said if each is None or each.license is None]
    licenses = {(e.license, e.license_name if e.license == "other" else None) for e in known}
    license, note = Declared(), ""
    if not said or silent:
        note = f"no licence is known for {', '.join(map(_called, silent)) or 'the sources'}"
    elif len(licenses) > 1:
        each_says = [f"{_called(part)} {each.license}" for part, each in said]
        note = "the sources differ: " + ", ".join(each_says)
    else:
        links = {each.license_link for each in known}
        license = known[0]._replace(license_link=links.pop() if len(links) == 1 else None)
    return Agreed(
        Declared(
            license.license,
            license.license_name,
            license.license_link,
            _same(said, lambda each: each.language) or (),
            _same(said, lambda each: each.pipeline_tag),
        ),
        note,
    )


def _says(declared: Declared | None) -> bool:
    return declared is not None and declared.license is not None


def _called(part: Part) -> str:
    whole = {"merged": "merged model", "adapter's base": f"base of {part.name}"}
    return part.name if part.role == "expert" else f"the {whole.get(part.role, part.role)}"


def _same(said: list[tuple[Part, Declared | None]], value: Callable[[Declared], Any]) -> Any:
    values = {value(each) if each is not None else None for _, each in said}
    return values.pop() if len(values) == 1 else None
