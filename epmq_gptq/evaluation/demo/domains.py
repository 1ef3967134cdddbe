"""The demo's text: what the experts are experts of, made from what is on every machine.

Two domains are read from Python's own standard library (`code`, `prose`), two are generated
(`arithmetic`, `sorting`). Every document and every problem belongs to exactly one of three splits,
chosen by a hash of its name, so train, calibration and evaluation never share one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import pkgutil
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from ...errors import EPMQInputError

DOMAINS = ("code", "prose", "arithmetic", "sorting")
GENERATED = ("arithmetic", "sorting")
SPLITS = ("train", "calibration", "evaluation")

# What each domain is asked at the end, so that a reader sees the checkpoint speak, and how many
# tokens it may answer.
ANSWER_TOKENS = {"code": 24, "prose": 24, "arithmetic": 4, "sorting": 6}
PROMPTS = {
    "code": "def __init__(self, name):\n    self.",
    "prose": "This function returns the",
    "arithmetic": "12+3=15\n51+7=58\n37+8=",
    "sorting": "sort:71352=12357\nsort:40918=",
}

# Left out: tables, generated files, tests and games; `this` and `antigravity` are jokes.
_SKIPPED = frozenset(
    "__phello__ antigravity distutils encodings ensurepip idlelib lib2to3 pydoc_data test tests "
    "this turtledemo".split()
)


@dataclass(frozen=True)
class Problem:
    """One generated question with its answer; only the answer is learned and scored."""

    prompt: str
    answer: str


def split_of(name: str) -> str:
    """The one split that ``name`` belongs to: 80 % train, 10 % calibration, 10 % evaluation."""
    bucket = hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 10
    return {8: "calibration", 9: "evaluation"}.get(bucket, "train")


# ---- text of the standard library ------------------------------------------------------------


def _module_sources() -> Iterator[tuple[str, str]]:
    """(module, source) over the standard library, through loaders: folder, zip and venv alike."""
    for top in sorted(sys.stdlib_module_names - _SKIPPED):
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            continue
        if spec is None:
            continue
        specs = [spec]
        for info in pkgutil.iter_modules(spec.submodule_search_locations or (), f"{top}."):
            if _SKIPPED.isdisjoint(info.name.split(".")):
                specs.append(info.module_finder.find_spec(info.name))
        for found in specs:
            get_source = getattr(getattr(found, "loader", None), "get_source", None)
            if get_source is None:
                continue
            try:
                source = get_source(found.name)
            except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
                continue
            if source:
                yield found.name, source


def _take_docstrings(tree: ast.Module) -> list[str]:
    """Remove the docstrings from ``tree`` and return them."""
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node, clean=True)
        if text is not None:
            docstrings.append(text)
            node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def _plain_code(tree: ast.Module, max_chars: int = 30_000) -> str:
    """The statements of ``tree`` in one style and without comments, whole, tables left out."""
    text = ""
    for statement in ast.fix_missing_locations(tree).body:
        block = ast.unparse(statement)
        if len(text) + len(block) > max_chars:
            break  # no single module shall fill the domain
        if all(len(line) <= 120 for line in block.splitlines()):
            text += block + "\n"
    return text


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of ``text`` that are English sentences, each on one line."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(block.split())
        wordy = sum(char.isalpha() or char == " " for char in line)
        if len(line) >= 60 and line[0].isupper() and line.isascii() and wordy >= 0.9 * len(line):
            found.append(line)
    return found


@lru_cache(maxsize=1)
def _library(max_chars: int) -> tuple[dict[str, str], dict[str, str]]:
    """(code, prose) documents by name, at most ``max_chars`` characters of each."""
    code: dict[str, str] = {}
    prose: dict[str, str] = {}
    sources = list(_module_sources())
    # Shuffled, so that the cap takes modules from all of the library and not only from A to C.
    random.Random(0).shuffle(sources)
    code_chars = 0
    for name, source in sources:
        if code_chars >= max_chars:
            break
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        docstrings = _take_docstrings(tree)
        text = _plain_code(tree)
        if len(text) >= 500:
            code[name] = text
            code_chars += len(text)
        paragraphs = [paragraph for text in docstrings for paragraph in _paragraphs(text)]
        if paragraphs:
            prose[name] = "\n".join(paragraphs) + "\n"
    try:  # the language reference that `help()` shows; some distributions leave it out
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for topic, text in sorted(topics.items()):
        paragraphs = _paragraphs(text)
        if paragraphs:
            prose[f"help:{topic}"] = "\n".join(paragraphs) + "\n"
    if len(code) < 10 or len(prose) < 10:
        raise EPMQInputError(
            f"only {len(code)} modules of Python's standard library have readable source, at least "
            "10 are needed.",
            code="EPMQ-F24",
            subject="`demo`",
            remedy="Run the demo with a Python that ships its `.py` files.",
        )
    return code, prose


def documents(domain: str, split: str, *, max_chars: int = 1_000_000) -> list[str]:
    """The documents of a text domain (``code`` or ``prose``) in ``split``, in a fixed order."""
    code, prose = _library(max_chars)
    chosen = {"code": code, "prose": prose}[domain]
    return [text for name, text in sorted(chosen.items()) if split_of(name) == split]


# ---- generated problems ----------------------------------------------------------------------


def _arithmetic(rng: random.Random) -> Problem:
    # One operand of one digit: what a million parameters can learn in half a minute.
    a, b = rng.randrange(10, 100), rng.randrange(10)
    return Problem(f"{a}+{b}=", str(a + b))


def _sorting(rng: random.Random) -> Problem:
    digits = [str(rng.randrange(10)) for _ in range(5)]
    return Problem(f"sort:{''.join(digits)}=", "".join(sorted(digits)))


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": _arithmetic,
    "sorting": _sorting,
}


def problems(domain: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of a generated domain; a question is in one split only."""
    make = _MAKERS[domain]
    rng = random.Random(f"{domain}:{split}:{seed}")
    while True:
        problem = make(rng)
        if split_of(problem.prompt) == split:
            yield problem
