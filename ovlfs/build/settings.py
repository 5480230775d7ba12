"""What does an instruction change in the config, and what does it write into the history?

Most instructions make no layer: they change one field of the config that RUN steps and containers use, and leave a line
`/bin/sh -c #(nop)  CMD ["bash"]` in the history.  Both are exactly what docker's classic builder writes (with the
quoting of Go's %q and %v), so that an image built here and one built there differ in nothing but times and ids.

Spec: Dockerfile reference; moby builder/dockerfile/dispatchers.go; image-spec config.md.
"""

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovlfs.build import words
from ovlfs.build.dockerfile import Instruction
from ovlfs.build.words import WordError
from ovlfs.errors import ImageError
from ovlfs.run.process import DEFAULT_PATH, parse_signal

Settings = dict[str, Any]
"""The "config" object of an image config, as JSON has it."""

DEFAULT_SHELL = ("/bin/sh", "-c")

_MAX_PORTS = 65535
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)")
_UNITS_NS = {
    "ns": 1,
    "us": 1000,
    "µs": 1000,
    "μs": 1000,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """How words are read at this place: the variables that can be seen, and the escape character."""

    variables: Mapping[str, str]
    escape: str = "\\"

    def word(self, text: str) -> str:
        """Variables replaced and quotes removed, as one word."""
        return words.expand(text, self.variables, self.escape)

    def words(self, text: str) -> list[str]:
        """The same as words."""
        return words.expand_words(text, self.variables, self.escape)

    def pairs(self, instruction: Instruction) -> list[tuple[str, str]]:
        """The pairs of ENV and LABEL."""
        return [(self.word(name), self.word(value)) for name, value in name_values(instruction, self.escape)]


def env_of(settings: Settings) -> dict[str, str]:
    """The environment that the config describes."""
    return dict(one.partition("=")[::2] for one in settings.get("Env") or ())


def shell_of(settings: Settings) -> list[str]:
    """What SHELL has set."""
    return list(settings.get("Shell") or DEFAULT_SHELL)


def begin(settings: Settings) -> Settings:
    """The config of a stage, from that of its base: triggers taken off, a PATH if there is none.

    moby: dispatchState.beginStage(), setDefaultPath().
    """
    begun = dict(settings)
    begun.pop("OnBuild", None)
    if "PATH" not in env_of(begun):
        begun["Env"] = [*(begun.get("Env") or ()), f"PATH={DEFAULT_PATH}"]
    return begun


def nop(settings: Settings, comment: str) -> str:
    """The history line of an instruction that only changes the config; COPY, ADD and WORKDIR have one space."""
    space = "" if comment.partition(" ")[0] in ("ADD", "COPY", "WORKDIR") else " "
    return " ".join((*shell_of(settings), f"#(nop) {space}{comment}"))


def command_words(settings: Settings, instruction: Instruction) -> list[str]:
    """The words of CMD, ENTRYPOINT and RUN; the shell form goes through SHELL."""
    found = instruction.exec_form()
    if found is not None:
        return found
    return [*shell_of(settings), *([instruction.rest] if instruction.rest else [])]


def change(settings: Settings, instruction: Instruction, reading: Reading, *, cmd_set: bool) -> str:
    """Change the config in place, and return the comment for the history.

    `cmd_set`: there was a CMD before in this stage, so an ENTRYPOINT leaves it alone.  Raises WordError with the rule
    that is broken.  Not for what does more than that: FROM, ARG, MAINTAINER, RUN, COPY, ADD.
    """
    comment = _CHANGES[instruction.name](settings, instruction, reading)
    if instruction.name == "ENTRYPOINT" and not cmd_set:
        settings["Cmd"] = None
    return comment


def name_values(instruction: Instruction, escape: str) -> list[tuple[str, str]]:
    """The pairs of ENV and LABEL, not expanded: `a=b c=d`, or the old form `a the rest of the line`."""
    found = words.split_raw(instruction.rest, escape)
    if "=" not in found[0]:
        name, *value = instruction.rest.split(None, 1)
        if not value:
            raise WordError(f"{instruction.name} must have two arguments")
        return [(name, value[0])]
    pairs = []
    for word in found:
        name, equals, text = word.partition("=")
        if not equals:
            raise WordError(f"can't find = in {quote(word)}: it must be of the form name=value")
        if not name:
            raise WordError(f"{instruction.name} names can not be blank")
        pairs.append((name, text))
    return pairs


# ---- one for each instruction ----------------------------------------------------------------------------------------


def _env(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    """An old variable keeps its place."""
    comment = "ENV"
    env = list(settings.get("Env") or ())
    for name, value in reading.pairs(instruction):
        new = f"{name}={value}"
        comment += " " + new
        for number, old in enumerate(env):
            if old.partition("=")[0] == name:
                env[number] = new
                break
        else:
            env.append(new)
    settings["Env"] = env
    return comment


def _label(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    pairs = reading.pairs(instruction)
    settings["Labels"] = dict(settings.get("Labels") or {}) | dict(pairs)
    return "LABEL" + "".join(f" {name}={value}" for name, value in pairs)


def _cmd(settings: Settings, instruction: Instruction, _: Reading) -> str:
    settings["Cmd"] = command_words(settings, instruction)
    return f"CMD {quote_all(settings['Cmd'])}"


def _entrypoint(settings: Settings, instruction: Instruction, _: Reading) -> str:
    found = command_words(settings, instruction) if instruction.rest else []
    settings["Entrypoint"] = found or None
    return f"ENTRYPOINT {quote_all(found)}"


def _expose(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    specs = sorted(reading.words(instruction.rest))
    ports = dict(settings.get("ExposedPorts") or {})
    for spec in specs:
        for port in _ports(spec):
            ports.setdefault(port, {})
    settings["ExposedPorts"] = ports
    return "EXPOSE " + " ".join(specs)


def _ports(spec: str) -> list[str]:
    """`80`, `80/udp`, `8000-8010`; the host's side of `ip:host:container` does not matter here."""
    text, _, protocol = spec.partition("/")
    protocol = protocol.lower() or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise WordError(f"invalid proto: {quote(protocol)}")
    first, dash, last = text.rpartition(":")[2].partition("-")
    last = last if dash else first
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and len(first + last) <= 10):
        raise WordError(f"invalid containerPort: {quote(spec)}")
    if not int(first) <= int(last) <= _MAX_PORTS:
        raise WordError(f"invalid range specified for the container port: {quote(spec)}")
    return [f"{port}/{protocol}" for port in range(int(first), int(last) + 1)]


def _volume(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    found = instruction.exec_form()
    paths = [reading.word(path).strip() for path in (instruction.rest.split() if found is None else found)]
    if not paths:
        raise WordError("VOLUME requires at least one argument")
    if "" in paths:
        raise WordError("VOLUME specified can not be an empty string")
    settings["Volumes"] = dict(settings.get("Volumes") or {}) | {path: {} for path in paths}
    return f"VOLUME [{' '.join(paths)}]"


def _user(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    settings["User"] = reading.word(instruction.rest)
    return f"USER {settings['User']}"


def _workdir(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    wanted = reading.word(instruction.rest)
    if not wanted:
        raise WordError("WORKDIR: cannot normalize nothing")
    if not wanted.startswith("/"):
        wanted = posixpath.normpath(posixpath.join("/", settings.get("WorkingDir") or "", wanted))
    settings["WorkingDir"] = wanted
    return f"WORKDIR {wanted}"


def _stopsignal(settings: Settings, instruction: Instruction, reading: Reading) -> str:
    signal = reading.word(instruction.rest)
    try:
        parse_signal(signal)
    except ImageError:
        raise WordError(f"Invalid signal: {quote(signal)}") from None
    settings["StopSignal"] = signal
    return f"STOPSIGNAL {signal}"


def _onbuild(settings: Settings, instruction: Instruction, _: Reading) -> str:
    settings["OnBuild"] = [*(settings.get("OnBuild") or ()), instruction.rest]
    return f"ONBUILD {instruction.rest}"


def _shell(settings: Settings, instruction: Instruction, _: Reading) -> str:
    found = instruction.exec_form()
    if not found:
        raise WordError("SHELL requires the arguments to be in JSON form")
    settings["Shell"] = found
    return f"SHELL [{' '.join(found)}]"


def _healthcheck(settings: Settings, instruction: Instruction, _: Reading) -> str:
    kind, *rest = instruction.rest.split(None, 1)
    inner = Instruction(instruction.line, kind.upper(), rest[0] if rest else "", instruction.original)
    check: dict[str, Any]
    match inner.name:
        case "NONE":
            if inner.rest or instruction.flags:
                raise WordError("HEALTHCHECK NONE takes no arguments")
            check = {"Test": ["NONE"]}
        case "CMD":
            found = inner.exec_form()
            test = ["CMD", *found] if found is not None else ["CMD-SHELL", inner.rest]
            if not inner.rest or test == ["CMD"]:
                raise WordError("missing command after HEALTHCHECK CMD")
            check = {"Test": test}
        case _:
            raise WordError(f"unknown type {quote(kind)} in HEALTHCHECK (try CMD)")
    shown = []
    for flag, field in (
        ("interval", "Interval"),
        ("timeout", "Timeout"),
        ("start-period", "StartPeriod"),
        ("start-interval", "StartInterval"),
    ):
        nanoseconds = _duration(flag, instruction.flags[flag]) if flag in instruction.flags else 0
        if nanoseconds:
            check[field] = nanoseconds
        if nanoseconds or field != "StartInterval":
            shown.append(f'"{format_duration(nanoseconds)}"')
    retries = instruction.flags.get("retries", "0")
    if not (retries.isascii() and retries.isdigit()) or ("retries" in instruction.flags and int(retries) < 1):
        raise WordError(f"--retries must be at least 1 (not {quote(retries)})")
    if int(retries) > (1 << 31) - 1:
        raise WordError("--retries is too large")
    if int(retries):
        check["Retries"] = int(retries)
    settings["Healthcheck"] = check
    return f"HEALTHCHECK &{{{quote_all(check['Test'])} {' '.join(shown)} {_quoted_rune(int(retries))}}}"


_CHANGES: dict[str, Callable[[Settings, Instruction, Reading], str]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "VOLUME": _volume,
    "USER": _user,
    "WORKDIR": _workdir,
    "STOPSIGNAL": _stopsignal,
    "SHELL": _shell,
    "HEALTHCHECK": _healthcheck,
}


# ---- Go's spelling ---------------------------------------------------------------------------------------------------


def quote(text: str) -> str:
    """Go: strconv.Quote()."""
    short = {'"': '\\"', "\\": "\\\\", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    short["\v"] = "\\v"
    return '"' + "".join(short.get(char) or (char if char.isprintable() else _escaped(char)) for char in text) + '"'


def quote_all(found: list[str]) -> str:
    """Go: %q of a slice."""
    return f"[{' '.join(map(quote, found))}]"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _quoted_rune(code: int) -> str:
    """Go: %q of an integer."""
    if not 0 <= code <= 0x10FFFF:
        code = 0xFFFD
    return "'" + quote(chr(code))[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"


def _duration(flag: str, text: str) -> int:
    """Go: time.ParseDuration(), in nanoseconds; at least a millisecond, or 0."""
    pieces = _DURATION.findall(text)
    if text == "0":
        return 0
    if not pieces or "".join(pieces) != text:
        raise WordError(f"--{flag}: invalid duration {quote(text)}")
    total = 0
    for piece in pieces:
        unit = piece.lstrip("0123456789.")
        total += round(float(piece[: -len(unit)]) * _UNITS_NS[unit])
    if total and total < _UNITS_NS["ms"]:
        raise WordError(f"interval --{flag} cannot be less than 1ms")
    if total >= 1 << 63:
        raise WordError(f"--{flag}: invalid duration {quote(text)}")
    return total


def format_duration(nanoseconds: int) -> str:
    """Go: Duration.String()."""
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < _UNITS_NS["s"]:
        return f"{_trimmed(nanoseconds, _UNITS_NS['ms'])}ms"
    minutes, rest = divmod(nanoseconds, _UNITS_NS["m"])
    hours, minutes = divmod(minutes, 60)
    shown = f"{_trimmed(rest, _UNITS_NS['s'])}s"
    if hours or minutes:
        shown = f"{minutes}m{shown}"
    return f"{hours}h{shown}" if hours else shown


def _trimmed(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    if not rest:
        return str(whole)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0")
    return f"{whole}.{digits}"
