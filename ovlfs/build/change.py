"""What does `ovlfs commit --change INSTRUCTION` do to a config?

What the instruction does in a Dockerfile (settings.py), with the config's own environment as its variables.  Only those
that change nothing but the config.

Spec: docker commit --change, podman commit --change (STOPSIGNAL); moby builder/dockerfile: BuildFromConfig().
"""

from collections.abc import Sequence
from typing import Any

from ovlfs.build import settings as config_of
from ovlfs.build.dockerfile import DockerfileError, Instruction, parse_instruction, parse_trigger
from ovlfs.build.settings import Reading
from ovlfs.build.words import WordError
from ovlfs.errors import UsageError, printable

_ALLOWED = "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"


def parsed(instructions: Sequence[str]) -> list[Instruction]:
    """The instructions.  Raises UsageError naming the one that cannot be, and the rule."""
    return [_parse(typed) for typed in instructions]


def changed(document: dict[str, Any], instructions: Sequence[Instruction]) -> dict[str, Any]:
    """A config's `document`, changed; it stays as it is.  Raises UsageError naming the instruction and the rule."""
    found = document.get("config")
    settings: config_of.Settings = dict(found) if isinstance(found, dict) else {}
    cmd_set = False
    for instruction in instructions:
        try:
            config_of.change(settings, instruction, Reading(config_of.env_of(settings)), cmd_set=cmd_set)
        except WordError as error:
            raise _error(instruction.original, str(error)) from error
        cmd_set |= instruction.name == "CMD"
    return document | {"config": settings}


def _parse(typed: str) -> Instruction:
    word = typed.split(None, 1)[:1]
    if not word or word[0].upper() not in _ALLOWED:
        raise _error(typed, f"should begin with one of {', '.join(_ALLOWED)}")
    if "\n" in typed.strip() or "\0" in typed:
        raise _error(typed, "should be one line")
    try:
        instruction = parse_instruction(typed, 1, "", "\\")
        if instruction.name == "ONBUILD":
            parse_trigger(instruction.rest, 1, "", "\\")
    except DockerfileError as error:
        raise _error(typed, error.rule) from error
    return instruction


def _error(typed: str, rule: str) -> UsageError:
    return UsageError(f"--change '{printable(typed[:100])}': {rule}")
