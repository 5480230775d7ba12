"""Is this text a JSON document of bounded size and depth, and does a field hold what it should?

Every document of an image is hostile until its digest and its shape are checked.  JSON is parsed with the rules
of Go's encoding/json, which all writers of images test against: keys match without regard to case (Microsoft once
wrote `rootfS`), of a key that comes twice the last wins, null means absent, unknown fields are ignored.  Depth is
counted before parsing, so that the parser's recursion is bounded.

Errors: ImageError naming the document and the field.
"""

import json
import re
from typing import Any

from ovlfs.errors import ImageError, printable

MAX_DEPTH = 64
"""Nesting of one document; real ones have about 6."""

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
"""Strings, also one without an end: so each byte is looked at once, whatever the document is."""


def parse_json(raw: bytes, where: str, limit: int) -> Any:
    """The value of a JSON document of at most `limit` bytes."""
    if len(raw) > limit:
        raise ImageError(f"{where}: is larger than {limit} bytes, the limit for this document")
    depth = 0
    for token in _TOKENS.finditer(raw):
        first = raw[token.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ImageError(f"{where} at byte {token.start()}: JSON is nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1
    try:
        # Environment variables and labels are bytes to the processes that get them: keep bytes that are not UTF-8.
        return json.loads(raw.decode("utf-8", "surrogateescape"), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ImageError(f"{where} at byte {error.pos}: is not JSON ({error.msg})") from error
    except ValueError as error:  # NaN, or a number of more than 4300 digits
        raise ImageError(f"{where}: is not JSON ({error})") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_object(raw: bytes, where: str, limit: int) -> "Object":
    """The same for a document that should be an object."""
    return Object.of(parse_json(raw, where, limit), where)


class Object:
    """A JSON object whose fields are asked for by name and kind."""

    __slots__ = ("_fields", "where")

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.where = where
        # The exact spelling wins over others, among others the last one.
        self._fields = {name.casefold(): value for name, value in fields.items()}
        self._fields.update({name: value for name, value in fields.items() if name == name.casefold()})

    @classmethod
    def of(cls, value: Any, where: str) -> "Object":
        """`value` as an object, or ImageError."""
        if not isinstance(value, dict):
            raise ImageError(f"{where}: should be a JSON object, not {_kind(value)}")
        return cls(value, where)

    def names(self) -> tuple[str, ...]:
        """The keys of this object, in lower case: for documents whose keys are lower-case names themselves."""
        return tuple(self._fields)

    def get(self, name: str) -> Any:
        """The raw value; None for null or absent."""
        return self._fields.get(name.casefold())

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ImageError(f"{self.where}: field '{name}' should be {_KINDS[kind]}, not {_kind(value)}")
        return value

    def text(self, name: str) -> str:
        """A string; "" if absent."""
        value: str = self._typed(name, str, "")
        return value

    def integer(self, name: str) -> int:
        """An integer; 0 if absent."""
        value: int = self._typed(name, int, 0)
        return value

    def boolean(self, name: str) -> bool:
        """A boolean; False if absent."""
        value: bool = self._typed(name, bool, False)
        return value

    def object(self, name: str) -> "Object":
        """An object; an empty one if absent."""
        return Object(self._typed(name, dict, {}), f"{self.where}: {name}")

    def keys(self, name: str) -> tuple[str, ...]:
        """The keys of an object, as spelled: how Go writes a set."""
        return tuple(self._typed(name, dict, {}))

    def items(self, name: str, limit: int) -> list[Any]:
        """A list of at most `limit` items; empty if absent."""
        value: list[Any] = self._typed(name, list, [])
        if len(value) > limit:
            raise ImageError(f"{self.where}: field '{name}' has {len(value)} items, the limit is {limit}")
        return value

    def objects(self, name: str, limit: int) -> "list[Object]":
        """A list of objects."""
        return [
            Object.of(item, f"{self.where}: {name}[{number}]") for number, item in enumerate(self.items(name, limit))
        ]

    def texts(self, name: str, limit: int = 65536) -> tuple[str, ...]:
        """A list of strings; null items are dropped."""
        items = self.items(name, limit)
        for item in items:
            if item is not None and not isinstance(item, str):
                raise ImageError(f"{self.where}: field '{name}' should hold strings, not {_kind(item)}")
        return tuple(item for item in items if item is not None)

    def words(self, name: str) -> tuple[str, ...]:
        """A command line: a list of strings, or one string, as configs before docker 1.10 have it."""
        value = self.get(name)
        return (value,) if isinstance(value, str) else self.texts(name)

    def mapping(self, name: str) -> dict[str, str]:
        """A map of strings to strings; null values become ""."""
        found: dict[str, Any] = self._typed(name, dict, {})
        for key, value in found.items():
            if value is not None and not isinstance(value, str):
                raise ImageError(
                    f"{self.where}: field '{name}' should hold strings, '{printable(key[:40])}' is {_kind(value)}"
                )
        return {key: value or "" for key, value in found.items()}


_KINDS = {str: "a string", int: "an integer", bool: "true or false", dict: "an object", list: "a list"}


def _kind(value: Any) -> str:
    return "null" if value is None else "a number" if isinstance(value, float) else _KINDS.get(type(value), "something")
