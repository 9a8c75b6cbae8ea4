# SPDX-License-Identifier: GPL-3.0-only
"""Lists warnings and errors of the source that docs/troubleshooting.md does not have.

    python -m tests.documents.messages

A message is one of these: the text of a ``log.warning`` or ``log.error``; the text of an
exception whose name ends with Error, or of a helper that makes such an exception; a
sentence that a function returns. The symptom of a message is the text before the remedy.
Variable parts are written as ``…``.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

VARIABLE = "…"
FEWEST_LETTERS = 8
"""Minimum number of letters of a symptom. A shorter symptom is only a frame around
another message."""
FEWEST_WORDS = 5
"""Minimum number of words of a returned string that counts as a sentence."""
FEWEST_WORDS_FOR_HELPERS = 3
"""Minimum number of words of a message, as an argument of a helper that makes an error."""


class Message(NamedTuple):
    """A text for operators, with its place in the source."""

    path: Path
    line: int
    text: str
    """The text, with ``…`` for its variable parts."""

    @property
    def symptom(self) -> str:
        """The part of the text before the remedy or the reason."""
        for end in re.finditer(r": |; |, | \(", self.text):
            if _letters(self.text[: end.start()]) >= FEWEST_LETTERS:
                return _trimmed(self.text[: end.start()])
        return _trimmed(self.text)

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: `{self.text}`"


def messages(package: Path = ROOT / "tcpexporter") -> list[Message]:
    """Return all messages of a package, in the order of its files."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    helpers = {name for tree in trees.values() for name in _makers_of_errors(tree)}
    found = [
        Message(path, node.lineno, _template(node))
        for path, tree in trees.items()
        for node in [*_message_texts(tree, helpers), *_returned(tree)]
    ]
    return [each for each in found if _letters(each.symptom) >= FEWEST_LETTERS]


def missing(page: str) -> list[Message]:
    """Return the messages whose symptom is not in the text of a page."""
    flat = _flat(page)
    return [each for each in messages() if _flat(each.symptom) not in flat]


def stale(page: str) -> list[str]:
    """Return the texts that a page quotes as messages, but that no message has."""
    symptoms = [_flat(each.symptom) for each in messages()]
    quoted = re.findall(r"(?m)^\| `([^`]+)` \|", page)
    return [
        each for each in quoted if not any(symptom in _flat(each) for symptom in symptoms)
    ]


def _makers_of_errors(tree: ast.Module) -> Iterator[str]:
    """Yield the names of functions that return an exception made from a sentence."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(
            isinstance(node, ast.Return) and node.value and _makes_an_error(node.value)
            for node in ast.walk(function)
        ):
            yield function.name


def _message_texts(tree: ast.Module, helpers: set[str]) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name in ("warning", "error", "_warn_once") or _makes_an_error(node):
            yield from filter(_is_text, node.args)
        elif name in helpers:
            yield from (
                each
                for each in node.args
                if _is_text(each) and _words(each) >= FEWEST_WORDS_FOR_HELPERS
            )
        yield from (each.value for each in node.keywords if each.arg == "without")


def _returned(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield sentences that functions return or yield, and templates in dictionaries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            texts = [each for each in node.values if VARIABLE in _template(each)]
        elif isinstance(node, (ast.Return, ast.Yield)) and node.value:
            texts = [node.value]
        else:
            texts = []
        for text in texts:
            if _is_text(text) and _words(text) >= FEWEST_WORDS and _is_one_sentence(text):
                yield text


def _makes_an_error(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and bool(
        re.fullmatch("(?!ModuleNotFound)[A-Z][A-Za-z]+Error", _name(node.func))
    )


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _words(node: ast.expr) -> int:
    return len(re.findall(r"\w+", _template(node)))


def _is_one_sentence(node: ast.expr) -> bool:
    """Return whether it can be a message: neither HTML nor several sentences."""
    return not re.search(r"^<|\. [A-Z]", _template(node))


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else VARIABLE
            for part in node.values
        )
    else:
        text = str(node.value) if isinstance(node, ast.Constant) else ""
    return re.sub(r"%[sd]|%\(\w+\)s|\{\w*\}", VARIABLE, text)


def _trimmed(symptom: str) -> str:
    """Return the symptom without variable parts at both ends."""
    begun = re.sub(rf"^(\W*{VARIABLE})+[\s:]*", "", symptom)
    return re.sub(rf"[\s:,;(]*({VARIABLE}\W*)+$", "", begun).strip()


def _letters(text: str) -> int:
    return len(re.findall("[A-Za-z]", text))


def _flat(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def main() -> None:
    page = PAGE.read_text()
    for each in missing(page):
        sys.stdout.write(f"missing: {each}\n")
    for quoted in stale(page):
        sys.stdout.write(f"stale: `{quoted}`\n")


if __name__ == "__main__":
    main()
