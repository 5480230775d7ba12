"""Which files of the context does .dockerignore leave out?

One pattern a line, in the words of Go's filepath.Match, with `**` for any number of directories; `#` in front is a
comment, `!` in front takes files back in.  A pattern fits a path if it fits the path itself or one of its parents, and
of all patterns that fit the last one decides.

Spec: docker build reference, ".dockerignore files"; moby/patternmatcher: MatchesOrParentMatches(), Pattern.compile().
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ovlfs.errors import OvlfsError, printable

MAX_BYTES = 1 << 20


class PatternError(OvlfsError):
    """A pattern that makes no sense."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    expression: re.Pattern[str]
    negated: bool


class Ignore:
    """The patterns of one .dockerignore, and one path that is left out whatever they say (the image being written)."""

    def __init__(self, patterns: Sequence[_Pattern] = (), output: str | None = None) -> None:
        self._patterns = patterns
        self._output = output
        self.has_exceptions = any(pattern.negated for pattern in patterns)

    def __bool__(self) -> bool:
        return bool(self._patterns) or self._output is not None

    def without(self, output: str) -> "Ignore":
        """The same, with one more path left out."""
        return Ignore(self._patterns, output)

    def ignored(self, path: str) -> bool:
        """Whether the file or directory `path` (relative to the context, without `./`) is left out."""
        if self._output is not None and (path + "/").startswith(self._output + "/"):
            return True
        parts = path.split("/")
        paths = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        out = False
        for pattern in self._patterns:
            # A pattern that would not change the answer need not be looked at (patternmatcher does the same).
            if pattern.negated == out and any(pattern.expression.fullmatch(one) for one in paths):
                out = not pattern.negated
        return out


def parse_ignore(raw: bytes, where: str) -> Ignore:
    """The patterns of a .dockerignore.  Raises PatternError, naming `where` and the line."""
    if len(raw) > MAX_BYTES:
        raise PatternError(f"{where}: has more than {MAX_BYTES} bytes")
    patterns = []
    text = raw.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("#"):
            continue
        pattern = line.strip()
        negated = pattern.startswith("!")
        pattern = pattern[1:].strip() if negated else pattern
        if not pattern:
            if negated:
                raise PatternError(f"{where}:{number}: illegal exclusion pattern: '!'")
            continue
        clean = posixpath.normpath(pattern)
        # `/foo` and `foo` are the same; `/` is the context itself, whose root cannot be left out.
        clean = clean.lstrip("/") if len(clean) > 1 else clean
        try:
            patterns.append(_Pattern(_compile(clean), negated))
        except (PatternError, re.error) as error:
            raise PatternError(f"{where}:{number}: syntax error in pattern '{printable(pattern[:200])}'") from error
    return Ignore(patterns)


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Go's filepath.Match: `*` and `?` stay within a component, `[a-z]` and `[^a-z]` are classes.

    Raises PatternError.
    """
    try:
        return _compile(pattern, doublestar=False)
    except (PatternError, re.error) as error:
        raise PatternError(f"syntax error in pattern '{printable(pattern[:200])}'") from error


def _compile(pattern: str, *, doublestar: bool = True) -> re.Pattern[str]:
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            if doublestar and pattern[at : at + 1] == "*":
                at += 1
                if pattern[at : at + 1] == "/":
                    at += 1
                out.append(".*" if at >= len(pattern) else "(?:.*/)?")
            else:
                out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[":
            piece, at = _class(pattern, at)
            out.append(piece)
        elif char == "\\":
            if at >= len(pattern):
                raise PatternError("an escape at the end")
            out.append(re.escape(pattern[at]))
            at += 1
        else:
            out.append(re.escape(char))
    return re.compile("".join(out), re.DOTALL)


def _class(pattern: str, at: int) -> tuple[str, int]:
    """A [...] from behind its bracket, and the place behind it.  Go: match.go, matchChunk()."""
    negated = pattern[at : at + 1] == "^"
    at += negated
    items: list[str] = []
    while True:
        if at >= len(pattern):
            raise PatternError("a class without its end")
        if pattern[at] == "]" and items:
            break
        low, at = _member(pattern, at)
        high = low
        if pattern[at : at + 1] == "-":
            high, at = _member(pattern, at + 1)
        if low > high:
            raise PatternError("a class whose range is upside down")
        items.append(f"{re.escape(low)}-{re.escape(high)}")
    return f"(?!/)[{'^' if negated else ''}{''.join(items)}]", at + 1


def _member(pattern: str, at: int) -> tuple[str, int]:
    if pattern[at : at + 1] == "\\":
        at += 1
    char = pattern[at : at + 1]
    if not char or (char in "-]" and pattern[at - 1] != "\\"):
        raise PatternError("a class with nothing in it")
    return char, at + 1
