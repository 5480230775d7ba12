"""Which instructions does a Dockerfile have?

The text is cut into logical lines: a line that ends in the escape character goes on in the next one; lines that are
comments or empty are left out, also in the middle of a continued line; a here-document (`<<EOF`) takes the lines up to
its name.  Before everything else may stand directives (`# escape=`, `# syntax=`, `# check=`).  Each logical line is an
instruction: a name, `--flags`, and the rest, whose form (shell, JSON, words) depends on the name.

Spec: Dockerfile reference, "Format", "Parser directives", "Here-Documents"; BuildKit frontend/dockerfile/parser
(parser.go, line_parsers.go).  Why not a library: dockerfile-parse 2.0.1 takes the lines of a here-document for
instructions, does not know `# escape=` before a comment inside a continued line, nor ${x:+y}; `dockerfile` binds the Go
parser of 2018, which knows no here-documents, and needs a Go toolchain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ovlfs.build import words
from ovlfs.build.words import WordError
from ovlfs.errors import OvlfsError, printable

MAX_BYTES = 16 << 20
"""What a Dockerfile may have, here-documents included."""

FLAGS: dict[str, frozenset[str]] = {
    "ADD": frozenset(("chown", "chmod")),
    "ARG": frozenset(),
    "CMD": frozenset(),
    "COPY": frozenset(("from", "chown", "chmod")),
    "ENTRYPOINT": frozenset(),
    "ENV": frozenset(),
    "EXPOSE": frozenset(),
    "FROM": frozenset(("platform",)),
    "HEALTHCHECK": frozenset(("interval", "timeout", "start-period", "start-interval", "retries")),
    "LABEL": frozenset(),
    "MAINTAINER": frozenset(),
    "ONBUILD": frozenset(),
    "RUN": frozenset(("network",)),
    "SHELL": frozenset(),
    "STOPSIGNAL": frozenset(),
    "USER": frozenset(),
    "VOLUME": frozenset(),
    "WORKDIR": frozenset(),
}
"""The instructions, and the flags of each."""

_HEREDOCS = frozenset(("ADD", "COPY", "RUN"))
_NO_TRIGGER = {
    "ONBUILD": "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed",
    "FROM": "FROM isn't allowed as an ONBUILD trigger",
    "MAINTAINER": "MAINTAINER isn't allowed as an ONBUILD trigger",
}

_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*")
_DIRECTIVES = frozenset(("escape", "syntax", "check"))
_FLAG = re.compile(r"--([A-Za-z0-9-]+)(?:=(.*))?", re.DOTALL)
_HEREDOC = re.compile(r"(\d*)<<(-?)([^<]+)")


class DockerfileError(OvlfsError):
    """A Dockerfile that breaks a rule: `Dockerfile:LINE: the rule`."""

    def __init__(self, where: str, line: int, rule: str) -> None:
        super().__init__(f"{where}:{line}: {rule}" if line else f"{where}: {rule}")
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Heredoc:
    """`<<NAME`: the lines that follow.  `expand`: not quoted, so variables count; `chomp`: leading tabs go (`<<-`)."""

    name: str
    content: str
    expand: bool
    chomp: bool

    @property
    def text(self) -> str:
        """The content as it is meant."""
        if not self.chomp:
            return self.content
        return "".join(line.lstrip("\t") for line in self.content.splitlines(keepends=True))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        line: where it begins, from 1.
        name: in capitals.
        flags: by name, without the dashes.
        rest: what follows the flags, without spaces around it.
        original: the logical line.
        heredocs: in their order.
    """

    line: int
    name: str
    rest: str
    original: str
    flags: dict[str, str] = field(default_factory=dict)
    heredocs: tuple[Heredoc, ...] = ()

    def exec_form(self) -> list[str] | None:
        """The words of the JSON form; None: it is in the shell form."""
        return words.json_words(self.rest)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """The instructions; `where` is the file's name for messages, `escape` its escape character."""

    where: str
    instructions: tuple[Instruction, ...]
    escape: str = "\\"

    def error(self, instruction: Instruction, rule: str) -> DockerfileError:
        """What to raise about an instruction."""
        return DockerfileError(self.where, instruction.line, rule)


def parse(raw: bytes, where: str) -> Dockerfile:
    """The instructions of a Dockerfile.  Raises DockerfileError."""
    if len(raw) > MAX_BYTES:
        raise DockerfileError(where, 0, f"has more than {MAX_BYTES} bytes")
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DockerfileError(where, line, "should be UTF-8 text") from error
    if "\0" in text:
        raise DockerfileError(where, text[: text.index("\0")].count("\n") + 1, "holds a NUL character")
    return _Parser(text, where).dockerfile()


def parse_trigger(text: str, line: int, where: str, escape: str) -> Instruction:
    """The instruction of an ONBUILD.  Raises DockerfileError."""
    found = parse_instruction(text, line, where, escape)
    if found.name in _NO_TRIGGER:
        raise DockerfileError(where, line, _NO_TRIGGER[found.name])
    if found.name in _HEREDOCS and _heredocs_of(found.rest, escape):
        raise DockerfileError(where, line, "ONBUILD cannot keep a here-document")
    return found


class _Parser:
    """One pass over the lines."""

    def __init__(self, text: str, where: str) -> None:
        self.lines = text.split("\n")
        if self.lines[-1] == "":
            self.lines.pop()
        self.where = where
        self.at = 0
        self.escape = "\\"

    def dockerfile(self) -> Dockerfile:
        self.directives()
        # BuildKit: the escape character, alone in front of it, does not continue a line.
        escape = re.escape(self.escape)
        self.continued = re.compile(rf"(?:(?<!{escape}){escape})[ \t]*$")
        instructions: list[Instruction] = []
        while (found := self.logical_line()) is not None:
            line, text = found
            instruction = parse_instruction(text, line, self.where, self.escape)
            inner = instruction
            if instruction.name == "ONBUILD":
                inner = parse_trigger(instruction.rest, line, self.where, self.escape)
            if inner.name in _HEREDOCS and inner is instruction:
                instruction = self.with_heredocs(instruction)
            instructions.append(instruction)
        self.check_order(instructions)
        return Dockerfile(self.where, tuple(instructions), self.escape)

    def directives(self) -> None:
        seen: set[str] = set()
        for number, line in enumerate(self.lines, 1):
            match = _DIRECTIVE.fullmatch(line.strip())
            if match is None or match[1].lower() not in _DIRECTIVES:
                return
            name, value = match[1].lower(), match[2]
            if name in seen:
                raise DockerfileError(self.where, number, f"only one {name} parser directive can be used")
            seen.add(name)
            if name == "escape":
                if value not in ("\\", "`"):
                    raise DockerfileError(
                        self.where, number, f"invalid escape token '{printable(value[:20])}' does not match ` or \\"
                    )
                self.escape = value

    def logical_line(self) -> tuple[int, str] | None:
        """The next instruction's text and the number of its first line."""
        while self.at < len(self.lines):
            first = self.at
            text, ended = self.cut(self.lines[self.at].lstrip())
            self.at += 1
            if text.startswith("#") or (ended and not text.strip()):
                continue
            while not ended and self.at < len(self.lines):
                line = self.lines[self.at]
                self.at += 1
                if line.lstrip().startswith("#") or not line.strip():
                    continue
                more, ended = self.cut(line)
                text += more
            if text.strip():
                return first + 1, text.strip()
        return None

    def cut(self, line: str) -> tuple[str, bool]:
        """The line without its continuation, and whether it ends here."""
        line = line.rstrip("\r")
        if line.startswith("#"):
            return line, True
        found = self.continued.search(line)
        return (line, True) if found is None else (line[: found.start()], False)

    def with_heredocs(self, instruction: Instruction) -> Instruction:
        heredocs = []
        for name, expand, chomp in _heredocs_of(instruction.rest, self.escape):
            lines = []
            while True:
                if self.at >= len(self.lines):
                    raise DockerfileError(self.where, instruction.line, f"unterminated heredoc '{printable(name)}'")
                line = self.lines[self.at]
                self.at += 1
                bare = line.rstrip("\r")
                if (bare.lstrip("\t") if chomp else bare) == name:
                    break
                lines.append(line + "\n")
            heredocs.append(Heredoc(name, "".join(lines), expand, chomp))
        return Instruction(
            instruction.line,
            instruction.name,
            instruction.rest,
            instruction.original,
            instruction.flags,
            tuple(heredocs),
        )

    def check_order(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if instruction.name == "FROM":
                return
            if instruction.name != "ARG":
                raise DockerfileError(
                    self.where, instruction.line, f"no build stage in current context: {instruction.name} before FROM"
                )
        raise DockerfileError(self.where, 0, "has no FROM, so there is nothing to build")


def parse_instruction(text: str, line: int, where: str, escape: str) -> Instruction:
    """The instruction of one logical line.  Raises DockerfileError."""
    name, _, rest = text.strip().partition(" ")
    if "\t" in name:
        name, _, rest = text.strip().partition("\t")
    name = name.upper()
    allowed = FLAGS.get(name)
    if allowed is None:
        raise DockerfileError(where, line, f"unknown instruction: {printable(name[:100])}")
    flags, rest = _flags(name, rest.lstrip(), allowed, line, where, escape)
    if not rest and name not in ("CMD", "ENTRYPOINT", "RUN"):
        raise DockerfileError(where, line, f"{name} requires at least one argument")
    found = Instruction(line, name, rest, text.strip(), flags)
    try:
        found.exec_form()
        words.split_raw(rest, escape)
    except WordError as error:
        raise DockerfileError(where, line, f"{name}: {error}") from error
    return found


def _flags(
    name: str, rest: str, allowed: frozenset[str], line: int, where: str, escape: str
) -> tuple[dict[str, str], str]:
    """The flags in front of the arguments, and the arguments.  BuildKit: extractBuilderFlags()."""
    flags: dict[str, str] = {}
    while rest.startswith("--"):
        word = next(iter(words.split_raw(rest, escape)))
        rest = rest[rest.index(word) + len(word) :].lstrip()
        if word == "--":
            break
        match = _FLAG.fullmatch(word)
        flag = match[1] if match else word
        if match is None or flag not in allowed:
            known = ", ".join(f"--{one}" for one in sorted(allowed)) or "none"
            raise DockerfileError(where, line, f"{name}: unknown flag {printable(word[:100])} (there are: {known})")
        if match[2] is None:
            raise DockerfileError(where, line, f"{name}: missing a value on flag --{flag}")
        if flag in flags:
            raise DockerfileError(where, line, f"{name}: duplicate flag --{flag}")
        flags[flag] = match[2]
    return flags, rest.strip()


def _heredocs_of(rest: str, escape: str) -> list[tuple[str, bool, bool]]:
    """(name, expand, chomp) of each here-document that the words of a line announce."""
    if "<<" not in rest or rest.startswith("["):
        return []
    found = []
    for word in words.split_raw(rest, escape):
        match = _HEREDOC.fullmatch(word)
        if match is None:
            continue
        try:
            name = words.expand(match[3], {}, escape)
        except WordError:
            continue
        if name:
            found.append((name, name == match[3], match[2] == "-"))
    return found


def is_heredoc_word(word: str) -> bool:
    """Whether a word of an instruction stands for a here-document."""
    return _HEREDOC.fullmatch(word) is not None
