"""What does `ovlfs commit --change INSTRUCTION` do to a config?

What the instruction does in a Dockerfile (settings.py), with the config's own environment as its variables.  Only those
that change nothing but the config.

Spec: docker commit --change, podman commit --change (STOPSIGNAL); moby builder/dockerfile: BuildFromConfig().
"""

from collections.abc import Sequence
from typing import Any

from ovlfs.build import settings as config_of
from ovlfs.build.dockerfile import DockerfileError, parse_instruction, parse_trigger
from ovlfs.build.settings import Reading
from ovlfs.build.words import WordError
from ovlfs.errors import UsageError, printable

_ALLOWED = "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"


def changed(document: dict[str, Any], instructions: Sequence[str]) -> dict[str, Any]:
    """A config's `document`, changed; it stays as it is.  Raises UsageError naming the instruction and the rule."""
    found = document.get("config")
    settings: config_of.Settings = dict(found) if isinstance(found, dict) else {}
    cmd_set = False
    for typed in instructions:
        try:
            name = _change(settings, typed, cmd_set=cmd_set)
        except DockerfileError as error:
            raise UsageError(f"--change '{printable(typed[:100])}': {error.rule}") from error
        except WordError as error:
            raise UsageError(f"--change '{printable(typed[:100])}': {error}") from error
        cmd_set |= name == "CMD"
    return document | {"config": settings}


def _change(settings: config_of.Settings, typed: str, *, cmd_set: bool) -> str:
    if typed.strip().split(None, 1)[:1] == [] or typed.split(None, 1)[0].upper() not in _ALLOWED:
        raise WordError(f"should begin with one of {', '.join(_ALLOWED)}")
    if "\n" in typed.strip() or "\0" in typed:
        raise WordError("should be one line")
    reading = Reading(config_of.env_of(settings))
    instruction = parse_instruction(typed, 1, "", reading.escape)
    if instruction.name == "ONBUILD":
        parse_trigger(instruction.rest, 1, "", reading.escape)
    config_of.change(settings, instruction, reading, cmd_set=cmd_set)
    return instruction.name
