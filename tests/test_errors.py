"""One family of errors: every one has a code, an object, a cause and a remedy, in one line."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import epmq_gptq
from epmq_gptq import errors
from epmq_gptq.errors import (
    CODES,
    RESERVED,
    EPMQDeviceError,
    EPMQError,
    EPMQHostError,
    EPMQInputError,
    EPMQNumericalError,
    EPMQStopped,
    EPMQWarning,
)

FAMILY = (
    *(EPMQError, EPMQInputError, EPMQNumericalError),
    *(EPMQStopped, EPMQHostError, EPMQDeviceError),
)
PACKAGE = Path(epmq_gptq.__file__).parent
SOURCES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}

PARTS = dict(code="EPMQ-F08", subject="expert `math`", remedy="Save it again.")


# ---- what every place that raises says -----------------------------------------------------------


def calls(file: Path) -> Iterator[ast.Call]:
    """Every construction of an error of the family."""
    names = {kind.__name__ for kind in FAMILY}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in names:
                yield node


def texts(node: ast.expr) -> Iterator[str]:
    """What an argument can be, as far as the source says; names and calls are not followed."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        last = node.values[-1]
        # `f"{place}: {cause}"` passes on what another place has said, full stop included.
        passed_on = isinstance(last, ast.FormattedValue) and ast.unparse(last.value) == "cause"
        yield "…" + (last.value if isinstance(last, ast.Constant) else "." if passed_on else "…")
    elif isinstance(node, ast.IfExp):
        yield from (*texts(node.body), *texts(node.orelse))
    elif isinstance(node, ast.BoolOp):
        yield from (text for value in node.values for text in texts(value))
    elif isinstance(node, ast.BinOp):
        yield from texts(node.right)


def faults(call: ast.Call) -> Iterator[str]:
    """What is missing in one construction."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    parts = {"cause": call.args[0] if call.args else given.get("cause")}
    parts |= {part: given.get(part) for part in ("code", "subject", "remedy")}
    for part, value in parts.items():
        if value is None:
            yield f"line {call.lineno}: no {part}"
            continue
        for text in texts(value):
            if not text:
                yield f"line {call.lineno}: empty {part}"
            if part in ("cause", "remedy") and not text.endswith((".", "?")):
                yield f"line {call.lineno}: {part} without a full stop: {text[-30:]}"
            if part == "code" and text not in CODES:
                yield f"line {call.lineno}: unknown code {text}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_error_is_complete(name):
    found = [fault for call in calls(SOURCES[name]) for fault in faults(call)]
    assert not found, f"{name}: " + "; ".join(found)


def test_no_part_can_be_left_out():
    parameters = inspect.signature(EPMQError).parameters
    assert [name for name, part in parameters.items() if part.default is not part.empty] == []


def test_the_family_has_no_members_elsewhere():
    bases = {kind.__name__ for kind in FAMILY}
    for name, file in SOURCES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            # The host's error for the same thing is a base of one as well.
            if isinstance(node, ast.ClassDef) and node.name != "Stopped" and name != "errors.py":
                assert not bases & {getattr(base, "id", "") for base in node.bases}, name


def test_every_code_is_used_or_reserved():
    used: set[str] = set()
    for name, file in SOURCES.items():
        if name in ("cli.py", "commands/explain.py"):  # they speak of codes
            continue
        text = file.read_text(encoding="utf-8")
        if name == "errors.py":  # its own table is no use
            text = text.replace(text[text.index("CODES:") : text.index("class EPMQError")], "")
        used |= set(re.findall(r"EPMQ-[A-Z]\d\d", text))
    assert used <= set(CODES), used - set(CODES)
    assert not used & RESERVED, f"used now: {sorted(used & RESERVED)}"
    assert set(CODES) - used == RESERVED, f"unused: {sorted(set(CODES) - used - RESERVED)}"


def test_codes_are_alike():
    for code, meaning in CODES.items():
        assert re.fullmatch(r"EPMQ-[FOHNSP]\d\d", code)
        assert meaning and meaning[0].islower() and not meaning.endswith(".")
    assert list(CODES) == list(dict.fromkeys(CODES)) and set(CODES) >= RESERVED


# ---- the classes ---------------------------------------------------------------------------------


def of(kind: type[EPMQError], **changed: str) -> EPMQError:
    own = {"module": "model.q_proj", "expert": "math"} if kind is EPMQNumericalError else {}
    return kind("tensor `w` is NaN.", **(PARTS | changed), **own)


@pytest.mark.parametrize("kind", FAMILY)
def test_an_error_is_cause_and_remedy_in_one_line(kind):
    error = of(kind)
    assert str(error) == "tensor `w` is NaN. Save it again."
    assert error.to_dict() == {"cause": "tensor `w` is NaN.", **PARTS}
    assert isinstance(error, EPMQError)


@pytest.mark.parametrize("kind", FAMILY)
def test_line_breaks_and_control_characters_cannot_get_in(kind):
    error = kind(
        "tensor `a\nb\r\n\x1b[2J\u2028\ud800` is NaN:\n  why.",
        **(PARTS | {"subject": "`a\nb`", "remedy": "Save\nit."}),
    )
    assert str(error) == r"tensor `a b \x1b[2J \ud800` is NaN: why. Save it."
    assert error.subject == "`a b`" and len(str(error).splitlines()) == 1
    str(error).encode()


def test_an_error_is_also_of_pythons_own_kind():
    assert issubclass(EPMQInputError, ValueError)
    assert issubclass(EPMQNumericalError, ArithmeticError)
    assert issubclass(EPMQHostError, RuntimeError)


@pytest.mark.parametrize("kind", FAMILY)
def test_within_names_the_place_and_keeps_the_rest(kind):
    error = of(kind)
    error.__notes__ = ["seen in a test"]
    inner = error.within("`merge`")
    assert type(inner) is kind and inner is not error
    assert inner.cause == "`merge`: tensor `w` is NaN."
    assert str(inner) == "`merge`: tensor `w` is NaN. Save it again."
    assert vars(inner) == vars(error) | {"cause": inner.cause}
    assert error.cause == "tensor `w` is NaN."


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy]
    + [
        lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ],
)
def test_a_copy_keeps_every_field(kind, again):
    error = of(kind)
    other = again(error)
    assert type(other) is kind and other is not error
    assert vars(other) == vars(error) and other.args == error.args and str(other) == str(error)


def test_a_code_that_is_not_in_the_table_is_our_mistake():
    with pytest.raises(AssertionError, match="EPMQ-F99"):
        of(EPMQError, code="EPMQ-F99")


def test_the_package_exports_the_family():
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert {kind for kind in kinds if issubclass(kind, EPMQError)} == set(FAMILY)
    assert all(getattr(epmq_gptq, kind.__name__) is kind for kind in FAMILY)


def test_a_warning_has_a_code_and_is_one_line():
    warning = EPMQWarning("expert `a\nb` has\n12 tokens.", code="EPMQ-F23")
    assert (str(warning), warning.code) == ("expert `a b` has 12 tokens.", "EPMQ-F23")
    with pytest.raises(AssertionError, match="EPMQ-F99"):
        EPMQWarning("x.", code="EPMQ-F99")
