"""``EPMQConfig`` as plain data, and read back from a file of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import EPMQInputError
from .experts.in_memory import InMemoryExpert
from .io.declared import bad_option, closest

CONFIG_VERSION = 1

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


def options_of(config: Any) -> dict[str, Any]:
    """Every option of a configuration that differs from its default, as plain data."""
    options: dict[str, Any] = {"epmq_config_version": CONFIG_VERSION}
    for option in dataclasses.fields(config):
        if not option.init or option.name in (*_NOT_SERIALISED, *config.left_open):
            continue
        value = getattr(config, option.name)
        if value != _normalised_default(option):
            options[option.name] = _plain(value, option.name)
    return options


def known_options(cls: type, options: Any) -> dict[str, Any]:
    """What :func:`options_of` gave, as arguments of ``cls``.

    Raises:
        EPMQInputError: no mapping, an option that does not exist, or a file of another version.
    """
    if not isinstance(options, Mapping):
        raise bad_option("options", "a mapping", options)
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
    return options


def parsed(load: Callable[[str], Any], text: str | Path, kind: str) -> Mapping[str, Any]:
    """The options of a text, or of a file where a ``Path`` is given."""
    try:
        data = load(text.read_text(encoding="utf-8") if isinstance(text, Path) else text)
    except (OSError, ValueError) as error:
        if isinstance(error, EPMQInputError):
            raise error.within("the EPMQConfig") from error
        # The reason alone: the message of an OSError holds the whole path.
        place = f" `{text.name}`" if isinstance(text, Path) else ""
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise EPMQInputError(
            f"the EPMQConfig{place} is not readable as {kind}: {reason}.",
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
