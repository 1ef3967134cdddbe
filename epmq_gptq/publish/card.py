"""The model card: what a checkpoint says of itself on a hub, in Markdown with metadata.

Paths are never in it, names of local folders only if asked for. Its text is in ``card.md.j2``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.declared import bad_option
from ..io.folders import CARD_NAME
from ..io.output import write_whole
from .card_facts import Source, card_facts, mapping, read_source
from .card_sources import Declared, read_declared
from .markdown import code, plain

_TOOL = "epmq_gptq"
_TEMPLATE = Path(__file__).parent / "card.md.j2"
# What stands in the examples for a name that is not known yet.
_PLACEHOLDER = "path/or/hub-id"
# The last line of a card of ours. The digest is of all above it: who edits a card owns it.
_MARKER = re.compile(r"^<!-- epmq_gptq card ([0-9a-f]{64}) -->\n?\Z", re.MULTILINE)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_TASKS = {
    "CLIPModel": "zero-shot-image-classification",
    "CLIPVisionModel": "image-feature-extraction",
    "CLIPVisionModelWithProjection": "image-feature-extraction",
}


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    title: str | None = None,
    license: str | None = None,
    include_names: bool = False,
    sources: Mapping[str, Path] | None = None,
) -> str:
    """The card of a checkpoint that E-PMQ made; nothing is written.

    Args:
        folder: of the checkpoint.
        repo_id: the hub id that the examples name.
        title: default: the experts' names.
        license: a hub's identifier, instead of what all sources declare.
        include_names: also give the folder names of models that are on no hub.
        sources: folders of the merged model, the base and the experts, as ``model.epmq_sources``
            names them: their cards say licence, language and task. Without, models of a hub are
            looked for in its cache, and what an earlier card of ours says is kept.

    Raises:
        EPMQInputError: the folder is no such checkpoint, or an option cannot be used.
    """
    folder = Path(folder)
    if repo_id is not None:
        check_repo_id(repo_id)
    if license is not None and _LICENSE.fullmatch(license) is None:
        raise bad_option("license", "an identifier of a hub, such as apache-2.0", license)
    source = read_source(folder, sources or {})
    agreed = source.sources
    known = _kept(agreed.declared, None if sources else folder, agreed.license_note)
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(
        ModelCardData(**metadata(source, known, license)),
        template_path=str(_TEMPLATE),
        facts=card_facts(source, title, repo_id, include_names),
        model=repo_id or _PLACEHOLDER,
        plain=plain,
        code=code,
        listed=lambda names: ", ".join(map(plain, names)),
    )
    body = str(card).rstrip("\n") + "\n"
    return f"{body}\n<!-- {_TOOL} card {_digest(body)} -->\n"


def write_card(folder: str | Path, *, overwrite: bool = False, **options: Any) -> str:
    """Write :func:`model_card` as the folder's ``README.md``, all of it or nothing.

    Args:
        folder: of the checkpoint.
        overwrite: also replace a card that we did not write, or that was edited since.
        options: of :func:`model_card`.

    Returns:
        The card.

    Raises:
        EPMQInputError: as :func:`model_card`; or somebody else's card is there; or the folder
            cannot be written.
    """
    folder = Path(folder)
    text = model_card(folder, **options)
    file = folder / CARD_NAME
    if (file.exists() or file.is_symlink()) and not overwrite and not is_ours(folder):
        raise EPMQInputError(
            f"`{CARD_NAME}` is there already, and was not written by epmq_gptq or edited since.",
            code="EPMQ-F45",
            subject=f"`{CARD_NAME}`",
            remedy="Look at the new one with `--dry-run`; replace it with `overwrite=True` or "
            "`--overwrite`.",
        )
    write_whole(file, text)
    return text


def is_ours(folder: Path) -> bool:
    """Whether the folder's card is one that we wrote and nobody has edited since."""
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    marker = _MARKER.search(text)
    return marker is not None and marker[1] == _digest(text[: marker.start()].removesuffix("\n"))


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        EPMQInputError: that.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("no string")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise bad_option(
            "repo_id",
            "`org/name` of letters, digits, `-`, `_` and `.`, 96 at most",
            repo_id,
            code="EPMQ-P03",
        ) from error


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _kept(now: Declared, folder: Path | None, note: str) -> Declared:
    """What is declared, completed by an earlier card where the sources are no longer at hand."""
    if folder is None or not is_ours(folder):
        return now
    before = read_declared(folder) or Declared()
    # Sources that differ stay without a licence, whatever an earlier card says.
    licensed = now if now.license or "differ" in note else before
    return Declared(
        licensed.license,
        licensed.license_name,
        licensed.license_link,
        now.language or before.language,
        now.pipeline_tag or before.pipeline_tag,
    )


# ---- metadata ----------------------------------------------------------------------------------


def metadata(source: Source, known: Declared, license: str | None) -> dict[str, Any]:
    """The YAML block, by the rules of the hub's documentation (docs/hub/model-cards.md there).

    A quantization of a merged model that is on the hub is one of that model. Of any other merge
    the models that went in are the base models, and the relation is ``merge``.
    """
    models = [part.source for part in source.parts if part.role == "merged" and part.is_hub]
    relation = "quantized"
    if not models:
        models = [part.source for part in source.parts if part.is_hub]
        relation = "merge"
    serves = mapping(source.engines.get("transformers")).get("verdict") != "no"
    bits = source.bits
    data: dict[str, Any] = {
        "license": license or known.license,
        "license_name": None if license else known.license_name,
        "license_link": None if license else known.license_link,
        "language": list(known.language) or None,
        "library_name": "transformers" if serves else "gptqmodel",
        "pipeline_tag": known.pipeline_tag or _task(source),
        "base_model": list(dict.fromkeys(models)) or None,
        "base_model_relation": relation if models else None,
        "tags": ["gptq", "gptqmodel", "epmq", "quantized", "merge", *(f"{b}-bit" for b in bits)],
        "quantization": {
            "quant_method": "gptq",
            "targets": "E-PMQ",
            "bits": bits[0] if len(bits) == 1 else bits,
            "group_size": source.facts.export.group_size,
            "sym": source.facts.export.sym,
            "desc_act": source.facts.export.desc_act,
        },
    }
    return {key: value for key, value in data.items() if value is not None}


def _task(source: Source) -> str | None:
    name = source.facts.architecture
    if name in _TASKS:
        return _TASKS[name]
    # The hub has no task for T5 as such; its models say translation, summarization and so on.
    return "text-generation" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
