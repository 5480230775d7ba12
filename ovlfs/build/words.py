"""How are the words of an instruction read: quotes, escapes and variables?

As a POSIX shell does, without commands and arithmetic.  'single quotes' are literal; "double quotes" keep spaces and
expand variables; the escape character (backslash, unless `# escape=` says backtick) takes the meaning from what
follows.  $NAME and ${NAME} are variables; ${NAME:-word} and ${NAME:+word} (and without the colon: unset only) choose,
${NAME:?text} fails.  A variable that is not set is empty.

Spec: Dockerfile reference, "Environment replacement"; BuildKit frontend/dockerfile/shell/lex.go.
Differences: the pattern forms (${NAME#...}, %, /) are refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ovlfs.errors import OvlfsError, printable

_SPECIAL = frozenset("@*#?-$!0123456789")
_MODIFIERS = frozenset("-+?")
MAX_EXPANDED = 1 << 20
"""Characters that the variables of one instruction may grow to: `ENV a=$a$a` doubles each time."""


class WordError(OvlfsError):
    """Words that cannot be read; the caller adds the line."""


def expand(text: str, variables: Mapping[str, str], escape: str) -> str:
    """`text` as one word: quotes removed, variables replaced, spaces kept."""
    return "".join(_Lexer(text, variables, escape).words(split=False))


def expand_words(text: str, variables: Mapping[str, str], escape: str) -> list[str]:
    """`text` as words: also the value of a variable outside of quotes is split at spaces."""
    return _Lexer(text, variables, escape).words(split=True)


def expand_text(text: str, variables: Mapping[str, str], escape: str) -> str:
    """The text of a here-document: variables replaced, quotes kept; an escape counts before a dollar or another one."""
    return _Lexer(text, variables, escape).document()


def split_raw(text: str, escape: str) -> list[str]:
    """`text` cut at the spaces that are neither quoted nor escaped; quotes and escapes stay.

    BuildKit: line_parsers.go, parseWords().
    """
    words: list[str] = []
    word, started, quote = "", False, ""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char.isspace() and not quote:
            if started:
                words.append(word)
            word, started = "", False
            continue
        started = True
        if char == escape and quote != "'":
            word += char + text[at : at + 1]
            at += 1
            continue
        if char == quote:
            quote = ""
        elif char in "'\"" and not quote:
            quote = char
        word += char
    if started:
        words.append(word)
    return words


def json_words(text: str) -> list[str] | None:
    """The exec form: a JSON array of strings.  None: `text` is none, so it is the shell form.

    Raises WordError for an array of something else, as docker does.
    """
    if not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list):
        return None
    if not all(isinstance(word, str) for word in found):
        raise WordError("in the exec form every word should be a string in double quotes")
    return found


@dataclass(slots=True)
class _Lexer:
    """One pass over a text."""

    text: str
    variables: Mapping[str, str]
    escape: str
    at: int = 0
    finished: list[str] = field(default_factory=list)
    word: list[str] | None = None
    length: int = 0

    def words(self, *, split: bool) -> list[str]:
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "'":
                self.put(self.single_quoted())
            elif char == '"':
                self.put(self.double_quoted())
            elif char == "$":
                self.put_value(self.dollar(), split=split)
            elif char == self.escape:
                self.at += 2
                self.put(self.text[self.at - 1 : self.at])
            elif split and char.isspace():
                self.at += 1
                self.end_word()
            else:
                self.at += 1
                self.put(char)
        self.end_word()
        return self.finished

    def put(self, piece: str) -> None:
        """A piece of the current word, which may be empty: '' is a word."""
        self.length += len(piece)
        if self.length > MAX_EXPANDED:
            raise WordError(f"its variables expand to more than {MAX_EXPANDED} characters")
        if self.word is None:
            self.word = []
        self.word.append(piece)

    def put_value(self, value: str, *, split: bool) -> None:
        if not split:
            self.put(value)
            return
        pieces = value.split()
        if not pieces:
            return
        if value[0].isspace():
            self.end_word()
        for number, piece in enumerate(pieces):
            if number:
                self.end_word()
            self.put(piece)
        if value[-1].isspace():
            self.end_word()

    def end_word(self) -> None:
        if self.word is not None:
            self.finished.append("".join(self.word))
        self.word = None

    def document(self) -> str:
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "$":
                self.put(self.dollar())
                continue
            self.at += 1
            if char == self.escape and self.text[self.at : self.at + 1] in ("$", self.escape):
                char = self.text[self.at]
                self.at += 1
            self.put(char)
        return "".join(self.word or ())

    def single_quoted(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise WordError("unexpected end of statement while looking for matching single-quote")
        quoted = self.text[self.at + 1 : end]
        self.at = end + 1
        return quoted

    def double_quoted(self) -> str:
        out: list[str] = []
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return "".join(out)
            if char == "$":
                out.append(self.dollar())
                continue
            self.at += 1
            if char == self.escape and self.text[self.at : self.at + 1] in ('"', "$", self.escape):
                char = self.text[self.at]
                self.at += 1
            out.append(char)
        raise WordError("unexpected end of statement while looking for matching double-quote")

    def dollar(self) -> str:
        """$NAME, ${...}, or a dollar that stands for itself."""
        self.at += 1
        if self.text[self.at : self.at + 1] != "{":
            name = self.name()
            return self.variables.get(name, "") if name else "$"
        self.at += 1
        name = self.name()
        if not name:
            raise WordError(f"bad substitution '{printable(self.text[self.at - 2 : self.at + 20])}'")
        rest = self.text[self.at : self.at + 2]
        if rest[:1] == "}":
            self.at += 1
            return self.variables.get(name, "")
        colon = rest[:1] == ":"
        modifier = rest[1:] if colon else rest[:1]
        if modifier not in _MODIFIERS or not modifier:
            raise WordError(f"unsupported modifier '{printable(rest)}' in substitution of {name}")
        self.at += len(modifier) + colon
        word = self.until_brace()
        value = self.variables.get(name)
        is_set = value is not None and not (colon and value == "")
        if modifier == "+":
            return word if is_set else ""
        if is_set:
            return value or ""
        if modifier == "-":
            return word
        raise WordError(f"{name}: {printable(word) or 'is not allowed to be unset'}")

    def name(self) -> str:
        """BuildKit: processName(): letters, digits and _, or one special character."""
        start = self.at
        text = self.text
        if text[start : start + 1] in _SPECIAL and start < len(text):
            self.at += 1
            return text[start : self.at]
        while self.at < len(text) and (text[self.at].isascii() and (text[self.at].isalnum() or text[self.at] == "_")):
            self.at += 1
        return text[start : self.at]

    def until_brace(self) -> str:
        """The word of a ${NAME:-word}, itself expanded."""
        out: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "}":
                self.at += 1
                return "".join(out)
            if char == "'":
                out.append(self.single_quoted())
            elif char == '"':
                out.append(self.double_quoted())
            elif char == "$":
                out.append(self.dollar())
            elif char == self.escape:
                self.at += 2
                out.append(self.text[self.at - 1 : self.at])
            else:
                self.at += 1
                out.append(char)
        raise WordError("unexpected end of statement while looking for matching }")
