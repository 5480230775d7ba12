"""Which variables does an instruction see?

ENV is in the config; ARG lives from its line to the end of the stage, takes its value from --build-arg, else from its
default, else from an ARG in front of the first FROM, and gives way to an ENV of the same name.  FROM sees only the ARGs
in front of it, and the platform's.  The proxy variables need no ARG.  RUN has both kinds in its environment, but only
ENV stays in the image.

Spec: Dockerfile reference, "Scope", "Predefined ARGs", "Automatic platform ARGs in the global scope"; moby
builder/dockerfile/buildargs.go.
"""

from collections.abc import Mapping

from ovlfs.image.platform import Platform

_PROXIES = frozenset(
    name
    for word in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (word, word.lower())
)


class Arguments:
    """The ARGs of a build: what the user gave, what is global, and what the current stage has declared."""

    def __init__(self, given: Mapping[str, str], platform: Platform) -> None:
        self._given = dict(given)
        self._global: dict[str, str | None] = {}
        self._platform = {
            f"{where}{what}": value
            for where in ("TARGET", "BUILD")
            for what, value in (
                ("PLATFORM", str(platform)),
                ("OS", platform.os),
                ("ARCH", platform.architecture),
                ("VARIANT", platform.variant),
            )
        }
        self._stage: dict[str, str | None] = {}
        self._used: set[str] = set()

    def declare_global(self, name: str, default: str | None) -> None:
        """An ARG in front of the first FROM."""
        self._global[name] = default
        self._used.add(name)

    def begin_stage(self) -> None:
        """A FROM: the ARGs of the stage before are gone."""
        self._stage = {}

    def declare(self, name: str, default: str | None) -> None:
        """An ARG of the stage."""
        self._stage[name] = default
        self._used.add(name)

    def for_from(self) -> dict[str, str]:
        """What FROM, and an ARG in front of it, sees."""
        found = dict(self._platform)
        for name, default in self._global.items():
            value = self._given.get(name, default)
            if value is not None:
                found[name] = value
        return found

    def visible(self, env: Mapping[str, str]) -> dict[str, str]:
        """What an instruction of the stage sees: its ENV, and the ARGs that no ENV hides."""
        found = self._declared()
        for name in _PROXIES & self._given.keys():
            found[name] = self._given[name]
        return found | dict(env)

    def for_run(self, env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """What RUN has beside ENV, and those of it that belong to the step (`A=b`, sorted): not the proxies."""
        declared = {name: value for name, value in self._declared().items() if name not in env}
        proxies = {name: self._given[name] for name in _PROXIES & self._given.keys() if name not in env}
        return proxies | declared, sorted(f"{name}={value}" for name, value in declared.items())

    def _declared(self) -> dict[str, str]:
        found = {}
        for name, default in self._stage.items():
            value = self._given.get(name, default)
            if value is None:
                value = self._global.get(name)
            if value is None and name in self._platform:
                value = self._platform[name]
            if value is not None:
                found[name] = value
        return found

    def unused(self) -> list[str]:
        """The --build-args that no ARG has asked for."""
        return sorted(self._given.keys() - self._used - _PROXIES)
