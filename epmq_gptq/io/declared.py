"""Data from outside, declared as pydantic models, and the one error that a mistake in it becomes.

Declare what a file or a block of options holds, and let :func:`validated` read it:

    class MergeStep(Declared):
        method: Word = Field(description="merge method")
        weights: dict[str, float] = Field({}, description="how much each model counts")
        pad: Literal["left", "right"] = Field("left", description="where rows are filled up")

    step = validated(MergeStep, data, "`merge`")

``data`` that does not fit raises an ``EPMQInputError`` that names the key, the rule and what was
got: "`merge`: `pad` should be one of left, right, got 'top'."; for an unknown key the nearest known
one is the remedy. The codes are EPMQ-O01 (wrong value), O02 (unknown key) and O03 (missing key);
pass ``code="EPMQ-F53"`` and a ``remedy`` for files that no user wrote by hand. A ``Declared`` that
is made by a call, ``MergeStep(pad="top")``, raises the same error.

A rule that concerns several fields is a ``model_validator(mode="after")`` that raises an
``EPMQInputError`` of its own; its code is kept. For files of other programs that may hold more keys
than we read, set ``model_config = ConfigDict(extra="ignore")``, or use a plain ``BaseModel``.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from ..errors import EPMQInputError

T = TypeVar("T")


class Declared(BaseModel):
    """A block of data: no unknown key, no silent conversion, no value changed afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise input_error(type(self), error, type(self).__name__, data) from error

    # As of pydantic's own `__init__`: what it reads from a mapping does not come through here.
    __init__.__pydantic_base_init__ = True

    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what a file of this block would say."""
        fields = type(self).model_fields
        defaults = {k: f.get_default(call_default_factory=True) for k, f in fields.items()}
        # Types first: an array that is compared with None gives an array.
        return {
            name: value
            for name, value in self
            if type(value) is not type(defaults[name]) or value != defaults[name]
        }


def ruled(
    words: str, holds: Callable[[Any], bool], *, code: str = "EPMQ-O01", remedy: str = ""
) -> BeforeValidator:
    """A check for ``Annotated``: a value for which ``holds`` is false "should be {words}"."""
    facts = {"words": words, "code": code, "remedy": remedy}

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("ruled", "Input should be {words}", facts)
        return value

    return BeforeValidator(check)


def is_word(value: Any) -> bool:
    """A string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: Any) -> bool:
    """An int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A positive int; a bool is none."""
    return is_whole(value) and value > 0


Word = Annotated[str, ruled("a non-empty string", is_word)]
Whole = Annotated[int, ruled("an integer", is_whole)]
Count = Annotated[int, ruled("a positive integer", is_count)]


def validated(
    model: type[T],
    data: Any,
    what: str,
    *,
    code: str | None = None,
    remedy: str | None = None,
) -> T:
    """``data`` as an instance of ``model``: a pydantic model, or any type that pydantic can check.

    Args:
        model: what the data should be.
        data: plain data, as YAML or JSON gives it.
        what: how errors call the data, for example "`merge`" or "`epmq_report.json`"; "" where the
            keys say enough.
        code: of every error, in place of those for options.
        remedy: of every error, in place of what follows from the mistake.

    Raises:
        EPMQInputError: the data does not fit.
    """
    data = dict(data) if isinstance(data, Mapping) else data
    try:
        return _adapter(model).validate_python(data)
    except ValidationError as error:
        raise input_error(model, error, what, data, code=code, remedy=remedy) from error


@functools.cache
def _adapter(model: Any) -> TypeAdapter:
    return TypeAdapter(model)


# ---- errors --------------------------------------------------------------------------------------


def input_error(
    model: Any,
    error: ValidationError,
    what: str,
    data: Any,
    *,
    code: str | None = None,
    remedy: str | None = None,
) -> EPMQInputError:
    """The first mistake of a ``ValidationError``: an unknown key, else a missing one, else a value.

    Arguments are those of :func:`validated`.
    """
    found = error.errors(include_url=False)
    first = min(found, key=lambda each: _KEY_ERRORS.get(each["type"], 2))
    own = first.get("ctx", {}).get("error")
    path = _path(first, data)
    if isinstance(own, EPMQInputError):
        named = not path or own.cause.startswith(f"`{_dotted(path)}")
        own = own if named else own.within(f"`{_dotted(path)}`")
        return own.within(what) if what else own
    if first["type"] in _KEY_ERRORS:
        block = _fields(model, path[:-1])
        place = f"{what}: `{_dotted(path[:-1])}`" if path[:-1] else what
        key = str(path[-1])[:80]
        if first["type"] == "missing":
            return EPMQInputError(
                f"{place}: `{key}` is missing.",
                code=code or "EPMQ-O03",
                subject=what,
                remedy=remedy or _give(block.get(path[-1])),
            )
        return unknown_key(key, block, place, what, code=code, remedy=remedy)
    # The branches of a union fail one by one; the one that went deepest is what was meant.
    branches = [each for each in found if each["loc"][:1] == first["loc"][:1]]
    first = max(branches, key=lambda each: len(_path(each, data)))
    path = _path(first, data)
    rules = [_rule(each) for each in found if _path(each, data) == path]
    rule = " or ".join(dict.fromkeys(rules))
    if path:
        facts = first.get("ctx", {})
        remedy, code = remedy or facts.get("remedy", ""), code or facts.get("code", "EPMQ-O01")
        wrong = bad_option(_dotted(path), rule, first["input"], remedy, code)
        return wrong.within(what) if what else wrong
    known = ", ".join(_fields(model, ()))
    return EPMQInputError(
        f"{what} should be {rule}, got {shown(first['input'])}.",
        code=code or "EPMQ-O01",
        subject=what,
        remedy=remedy or (f"Its keys are {known}." if known else "Correct it."),
    )


def unknown_key(
    key: str,
    known: Iterable[str],
    place: str,
    subject: str,
    *,
    code: str | None = None,
    remedy: str | None = None,
) -> EPMQInputError:
    """The error of a key that is none of ``known``, with the one that was probably meant."""
    known = list(known)
    meant = closest(key, known)
    hint = f"Did you mean `{meant}`?" if meant else f"Known: {', '.join(known)}."
    return EPMQInputError(
        f"{place + ': ' if place else ''}`{str(key)[:80]}` is not an option.",
        code=code or "EPMQ-O02",
        subject=subject,
        remedy=remedy or hint,
    )


def bad_option(
    option: str, rule: str, got: Any, remedy: str = "", code: str = "EPMQ-O01"
) -> EPMQInputError:
    """The error of an option whose value is none of those it may have."""
    return EPMQInputError(
        f"`{option}` should be {rule}, got {shown(got)}.",
        code=code,
        subject=f"`{option}`",
        remedy=remedy or f"Set `{option}` to such a value.",
    )


def conflict(option: str, cause: str, remedy: str) -> EPMQInputError:
    """The error of an option that cannot go with, or that needs, another one."""
    return EPMQInputError(
        f"`{option}` {cause}.", code="EPMQ-O03", subject=f"`{option}`", remedy=remedy
    )


def closest(key: Any, known: Iterable[str]) -> str | None:
    """The known key that ``key`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(str(key), list(known), n=1)), None)


def shown(value: Any) -> str:
    """A value for an error, however large it is: YAML's aliases can make it so from a few bytes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 2
    return short.repr(value)


# Of pydantic's errors those that are about a key, in the order in which they are reported.
_KEY_ERRORS = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}
# pydantic's words, where ours are plainer.
_RULES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
}


def _rule(each: Mapping[str, Any]) -> str:
    if each["type"] == "literal_error":
        return "one of " + each["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    return _RULES.get(each["type"]) or each["msg"].removeprefix("Input should be ")


def _path(each: Mapping[str, Any], data: Any) -> tuple[Any, ...]:
    """Where in the data a mistake is: pydantic's path without the branches of unions."""
    path = []
    for part in each["loc"]:
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, (list, tuple)) and is_whole(part) and part < len(data):
            data = data[part]
        elif each["type"] not in _KEY_ERRORS or part != each["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _dotted(path: Iterable[Any]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if is_whole(part) else f".{str(part)[:80]}"
    return text.removeprefix(".")


def _give(field: Any) -> str:
    description = getattr(field, "description", None)
    return f"Give it: {description.rstrip('.')}." if description else "Give it."


def _fields(model: Any, path: Iterable[Any]) -> dict[str, Any]:
    """The fields of the block at ``path``, by the keys that they have in the data."""
    blocks = list(_models(model))
    for part in path:
        fields = [field for block in blocks for field in [_by_key(block).get(part)]]
        inner = [each for field in fields if field for each in _models(field.annotation)]
        blocks = inner or blocks  # the index of a list, or the key of a mapping of blocks
    return {key: field for block in blocks for key, field in _by_key(block).items()}


def _by_key(block: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in block.model_fields.items()}


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
