"""How do the instructions of a Dockerfile become an image, one after the other?

A stage begins with FROM: nothing, an image, or an earlier stage.  Each instruction then is a step: it changes the
config, or makes a layer, or both, and adds a line to the history; the document of the image is complete after every
step, so each has an image id.  A step whose key the cache knows is not done again.  The last stage, or the one that
--target names, is the image.

Source: moby builder/dockerfile/evaluator.go, dispatchers.go (the classic builder builds every stage up to the target).
Differences: what RUN writes below a VOLUME stays, and a VOLUME makes no directory (BuildKit does the same); the notes
about containers that no longer exist (`container`, `container_config`, `docker_version`, config.Image) are not written.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ovlfs.build import settings as config_of
from ovlfs.build import transfer, trees, words
from ovlfs.build.cache import Cache, Record, step_key
from ovlfs.build.copying import Rules, make_directories
from ovlfs.build.dockerfile import Dockerfile, DockerfileError, Instruction, is_heredoc_word, parse_trigger
from ovlfs.build.ignore import Ignore
from ovlfs.build.running import Command, Runner
from ovlfs.build.scope import Arguments
from ovlfs.build.settings import Reading
from ovlfs.build.trees import Source
from ovlfs.build.words import WordError
from ovlfs.build.workshop import Workshop
from ovlfs.errors import OvlfsError, printable
from ovlfs.ids import DiffId, Digest
from ovlfs.image import new_config
from ovlfs.image.config import parse_config
from ovlfs.image.digest import sha256
from ovlfs.image.image import LayerBlob, open_image
from ovlfs.image.platform import Platform, host_platform, parse_platform
from ovlfs.overlay.stack import Stack
from ovlfs.run.process import check_platform

_STAGE_NAME = re.compile(r"[a-z][a-z0-9_.-]*")
_TRANSPORT = re.compile(r"(?:oci-archive|docker-archive|oci|dir):")
_NETWORKS = {"default": True, "host": True, "none": False}


@dataclass(frozen=True, slots=True)
class Request:
    """What shall be built.

    Attributes:
        context: the directory, absolute.
        target: a stage's name or number; None: the last.
        platform: of base images that are there for several; None: this machine's.
        no_cache: do every step.
    """

    dockerfile: Dockerfile
    context: bytes
    ignore: Ignore = field(default_factory=Ignore)
    build_args: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    platform: Platform | None = None
    no_cache: bool = False
    chroot: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """An image: its config's bytes, and its layers, bottom first."""

    config: bytes
    layers: tuple[LayerBlob, ...]

    @property
    def image_id(self) -> Digest:
        """The digest of the config."""
        return sha256(self.config)


@dataclass(slots=True)
class Stage:
    """A stage as far as it is built.

    Attributes:
        document: the image's config.
        layers: bottom first.
        author: MAINTAINER's.
        cmd_set: it has had a CMD: an ENTRYPOINT then leaves that alone.
    """

    name: str
    where: str
    document: dict[str, Any]
    layers: list[LayerBlob]
    author: str = ""
    cmd_set: bool = False

    @property
    def settings(self) -> config_of.Settings:
        """The "config" object."""
        found: config_of.Settings = self.document["config"]
        return found

    @property
    def raw(self) -> bytes:
        """The document's bytes."""
        return new_config.dump(self.document)

    def state(self) -> list[Any]:
        """What the result of the next step depends on."""
        platform = [self.document.get(key) for key in ("os", "architecture", "variant")]
        return [self.layers[-1].chain_id if self.layers else None, self.settings, self.author, *platform]


@dataclass(frozen=True, slots=True)
class _Change:
    """What a step does: a new config, a line in the history, and what makes the layer (None: it has none)."""

    settings: config_of.Settings
    created_by: str
    depends_on: tuple[Any, ...] = ()
    make: Callable[[], DiffId | None] | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """What one step sees, and what is closed after it."""

    variables: Mapping[str, str]
    closing: contextlib.ExitStack


class Builder:
    """One build.  `tell` gets the lines that the classic builder prints."""

    def __init__(self, request: Request, workshop: Workshop, tell: Callable[[str], None]) -> None:
        self.request = request
        self.workshop = workshop
        self.tell = tell
        self.file = request.dockerfile
        self.cache = Cache(workshop.store)
        self.arguments = Arguments(request.build_args, request.platform or host_platform())
        self.stages: list[Stage] = []
        self._closing = contextlib.ExitStack()
        self._opened_context: Source | None = None
        self._runner = Runner(workshop, self._closing, chroot=request.chroot, quiet=request.quiet)

    def build(self) -> Built:
        """Build.

        Raises:
            DockerfileError: `Dockerfile:LINE: the rule`, for whatever went wrong in a step.
        """
        instructions = self._chosen()
        with self._closing:
            for number, instruction in enumerate(instructions, 1):
                self.tell(f"Step {number}/{len(instructions)} : {_shown(instruction.original)}")
                with self._at(instruction):
                    self._instruction(instruction)
        for name in self.arguments.unused():
            self.tell(f"[Warning] build-arg {printable(name)} was not consumed")
        stage = self.stages[-1]
        return Built(stage.raw, tuple(stage.layers))

    def _chosen(self) -> tuple[Instruction, ...]:
        """The instructions up to the end of the target stage."""
        instructions = self.file.instructions
        target = self.request.target
        if target is None:
            return instructions
        begins = [at for at, one in enumerate(instructions) if one.name == "FROM"]
        for number, at in enumerate(begins):
            if target.lower() in (str(number), _stage_name(instructions[at])):
                return instructions[: begins[number + 1]] if number + 1 < len(begins) else instructions
        raise DockerfileError(self.file.where, 0, f"target stage '{printable(target[:100])}' could not be found")

    @contextlib.contextmanager
    def _at(self, instruction: Instruction) -> Iterator[None]:
        """What goes wrong in the block names the line of the instruction."""
        try:
            yield
        except DockerfileError:
            raise
        except OvlfsError as error:
            raise self.file.error(instruction, f"{instruction.name}: {error}") from error
        except OSError as error:
            where = "" if error.filename is None else f"{printable(error.filename)}: "
            raise self.file.error(instruction, f"{instruction.name}: {where}{error.strerror or error}") from error

    # ---- instructions ------------------------------------------------------------------------------------------------

    def _instruction(self, instruction: Instruction) -> None:
        if instruction.name == "FROM":
            self._from(instruction)
            return
        if not self.stages:
            for name, default in self._arg_pairs(instruction, self.arguments.for_from()):
                self.arguments.declare_global(name, default)
            return
        self._step(instruction)

    def _step(self, instruction: Instruction) -> None:
        """One step of the current stage: from the cache, or done."""
        stage = self.stages[-1]
        variables = self.arguments.visible(config_of.env_of(stage.settings))
        with contextlib.ExitStack() as closing:
            change = self._change(instruction, stage, Scope(variables, closing))
            depends_on = change.depends_on or (change.created_by,)
            key = step_key(stage.state(), instruction.name, *depends_on)
            record = None if self.request.no_cache else self.cache.find(key)
            if record is not None:
                self.tell(" ---> Using cache")
            else:
                diff_id = None if change.make is None else change.make()
                record = Record(new_config.timestamp(), diff_id)
                self.cache.keep(key, record)
        stage.layers = self.workshop.on_top(stage.layers, record.diff_id, change.created_by)
        stage.document = new_config.extended(
            stage.document | {"config": change.settings},
            [layer.diff_id for layer in stage.layers],
            created=record.created,
            created_by=change.created_by,
            author=stage.author,
            empty_layer=record.diff_id is None,
        )
        self._tell_id(stage)

    def _tell_id(self, stage: Stage) -> None:
        self.tell(f" ---> {sha256(stage.raw).partition(':')[2][:12]}")

    def _change(self, instruction: Instruction, stage: Stage, scope: Scope) -> _Change:
        """What an instruction does.  The config is changed in a copy."""
        settings = dict(stage.settings)
        reading = Reading(scope.variables, self.file.escape)
        match instruction.name:
            case "RUN":
                return self._run(instruction, stage, settings)
            case "COPY" | "ADD":
                return self._copy(instruction, stage, settings, reading, scope)
            case "ARG":
                pairs_of_arg = self._arg_pairs(instruction, scope.variables)
                for name, default in pairs_of_arg:
                    self.arguments.declare(name, default)
                shown = [name if default is None else f"{name}={default}" for name, default in pairs_of_arg]
                comment = f"ARG {' '.join(shown)}"
            case "MAINTAINER":
                stage.author = instruction.rest
                comment = f"MAINTAINER {instruction.rest}"
            case _:
                comment = config_of.change(settings, instruction, reading, cmd_set=stage.cmd_set)
        stage.cmd_set |= instruction.name == "CMD"
        created_by = config_of.nop(settings, comment)
        if instruction.name == "WORKDIR":
            return _Change(settings, created_by, (comment,), lambda: self._make_workdir(stage, settings["WorkingDir"]))
        return _Change(settings, created_by)

    def _arg_pairs(self, instruction: Instruction, visible: Mapping[str, str]) -> list[tuple[str, str | None]]:
        pairs: list[tuple[str, str | None]] = []
        for word in words.split_raw(instruction.rest, self.file.escape):
            name, equals, value = word.partition("=")
            if not name:
                raise WordError("ARG names can not be blank")
            escape = self.file.escape
            pairs.append(
                (words.expand(name, visible, escape), words.expand(value, visible, escape) if equals else None)
            )
        return pairs

    # ---- FROM --------------------------------------------------------------------------------------------------------

    def _from(self, instruction: Instruction) -> None:
        name = _stage_name(instruction)
        variables = self.arguments.for_from()
        found = instruction.rest.split()
        if len(found) not in (1, 3) or (len(found) == 3 and found[1].lower() != "as"):
            raise WordError("requires either one or three arguments: FROM BASE [AS NAME]")
        if name and not _STAGE_NAME.fullmatch(name):
            raise WordError(
                f"invalid name for build stage: '{printable(name[:100])}', it should begin with a letter and have only "
                "letters, digits and _.-"
            )
        base = words.expand(found[0], variables, self.file.escape)
        if not base:
            raise WordError(f"base name ({printable(found[0])}) should not be blank")
        platform = self.request.platform
        if "platform" in instruction.flags:
            wanted = words.expand(instruction.flags["platform"], variables, self.file.escape)
            platform = parse_platform(wanted) if wanted else platform
        self.arguments.begin_stage()
        document, layers = self._base(base, platform)
        stage = Stage(name, printable(base), document, list(layers))
        settings = stage.document.get("config") or {}
        triggers = tuple(settings.get("OnBuild") or ())
        stage.document = stage.document | {"config": config_of.begin(settings)}
        self.stages.append(stage)
        if base == "scratch":
            self.tell(" ---> ")
        else:
            self._tell_id(stage)
        if triggers:
            self.tell(f"# Executing {len(triggers)} build trigger{'s' if len(triggers) > 1 else ''}")
        for trigger in triggers:
            inner = parse_trigger(trigger, instruction.line, self.file.where, self.file.escape)
            with self._at(inner):
                self._step(inner)

    def _base(self, base: str, platform: Platform | None) -> tuple[dict[str, Any], tuple[LayerBlob, ...]]:
        earlier = self._stage_called(base)
        if earlier is not None:
            return dict(earlier.document), tuple(earlier.layers)
        if base == "scratch":
            own = platform or host_platform()
            document = {"architecture": own.architecture, "os": own.os}
            return document | ({"variant": own.variant} if own.variant else {}), ()
        image = open_image(self._reference(base), platform=platform, store=self.workshop.store)
        if image.directory is not None:
            raise WordError(f"{printable(base)}: is a directory, not an image; take FROM scratch and COPY it")
        return new_config.document_of(image.config), image.layers

    def _reference(self, typed: str) -> bytes:
        """The image of FROM and --from: a path, relative to the context."""
        transport = _TRANSPORT.match(typed)
        path = typed[transport.end() :] if transport else typed
        return os.path.join(self.request.context, os.fsencode(path))

    def _stage_called(self, name: str) -> Stage | None:
        return next((stage for stage in reversed(self.stages) if stage.name and stage.name == name.lower()), None)

    # ---- WORKDIR -----------------------------------------------------------------------------------------------------

    def _make_workdir(self, stage: Stage, path: str) -> DiffId | None:
        def make(stack: Stack) -> None:
            found = trees.resolve(stack, os.fsencode(path))
            if not make_directories(stack, found, (0, 0)).is_dir:
                raise WordError(f"{printable(path)}: is there already, and is no directory")

        return self._layer(stage, make)

    def _layer(self, stage: Stage, make: Callable[[Stack], None]) -> DiffId | None:
        """A layer made without a mount."""
        with self.workshop.upper(stage.layers) as upper, self.workshop.opened(upper, fresh=True) as stack:
            make(stack)
            return self._written(stack)

    def _written(self, stack: Stack) -> DiffId | None:
        diff_id, skipped = self.workshop.layer_of(stack)
        for path in skipped[:10]:
            self.tell(f"[Warning] /{printable(path)}: a socket cannot be in a layer, it is left out")
        return diff_id

    # ---- RUN ---------------------------------------------------------------------------------------------------------

    def _run(self, instruction: Instruction, stage: Stage, settings: config_of.Settings) -> _Change:
        network = instruction.flags.get("network", "default")
        if network not in _NETWORKS:
            raise WordError(f"--network={printable(network[:40])} should be default, host or none")
        argv, script = _run_words(instruction, settings, self.file.escape)
        if not argv or not instruction.rest:
            raise WordError("requires a command")
        env, told = self.arguments.for_run(config_of.env_of(settings))
        created_by = " ".join([f"|{len(told)}", *told, *argv] if told else argv)

        def make() -> DiffId | None:
            config = parse_config(stage.raw, stage.where)
            check_platform(config, stage.where)
            self._runner.enter()
            pairs = tuple(f"{name}={value}" for name, value in env.items())
            command = Command(tuple(argv), pairs, script, _NETWORKS[network])
            with self.workshop.upper(stage.layers) as upper:
                with self.workshop.opened(upper, fresh=True):
                    pass
                code = self._runner.run(upper, config, command)
                if code:
                    line = printable(" ".join(argv))
                    raise WordError(f"the command '{line[:500]}' returned a non-zero code: {code}")
                with self.workshop.opened(upper, fresh=False) as stack:
                    return self._written(stack)

        return _Change(settings, created_by, (argv, script, told, network), make)

    # ---- COPY, ADD ---------------------------------------------------------------------------------------------------

    def _copy(
        self, instruction: Instruction, stage: Stage, settings: config_of.Settings, reading: Reading, scope: Scope
    ) -> _Change:
        found = instruction.exec_form()
        raw = words.split_raw(instruction.rest, self.file.escape) if found is None else found
        typed = transfer.read_words(instruction, raw, reading.word)
        has_from = "from" in instruction.flags
        source = self._source(instruction.flags["from"], scope) if has_from else self._context()
        keep_owners = has_from and not typed.chown
        missing = "" if has_from else "file not found in build context or excluded by .dockerignore: "
        heredocs = iter(instruction.heredocs)
        items: list[transfer.Item] = []
        for word in typed.sources:
            if instruction.heredocs and is_heredoc_word(word):
                heredoc = next(heredocs)
                text = words.expand_text(heredoc.text, scope.variables, self.file.escape)
                content = text if heredoc.expand else heredoc.text
                directory = transfer.heredoc_directory(heredoc, content, self.workshop.room(scope.closing))
                inline = scope.closing.enter_context(trees.context(directory, Ignore()))
                items += transfer.find_items(inline, heredoc.name, owners=False, missing="")
            else:
                items += transfer.find_items(source, word, owners=keep_owners, missing=missing)
        if not items:
            raise WordError("no source files were specified")
        dest = transfer.destination(typed, settings.get("WorkingDir") or "/", len(items), instruction.name)
        digest = transfer.summary([item.digest for item in items])
        chown = f"--chown={typed.chown}" if typed.chown else ""
        # Docker's spelling, with nothing between owner and digest.
        comment = f"{instruction.name} {chown}{digest} in {typed.dest} "

        def copy(stack: Stack) -> None:
            owner = None if keep_owners else (0, 0)
            if typed.chown:
                owner = transfer.owner_of(typed.chown, stack)
            unpack = self.workshop.store if instruction.name == "ADD" else None
            skipped = transfer.transfer(stack, items, dest, Rules(owner, typed.permissions), unpack=unpack)
            if skipped:
                self.tell(f"[Warning] {skipped} extended attributes could not be set here, they are left out")

        depends_on = (dest, chown, typed.permissions, [(item.digest, os.fsdecode(item.name)) for item in items])
        return _Change(settings, config_of.nop(settings, comment), depends_on, lambda: self._layer(stage, copy))

    def _context(self) -> Source:
        """The build context, opened once."""
        if self._opened_context is None:
            self._opened_context = self._closing.enter_context(trees.context(self.request.context, self.request.ignore))
        return self._opened_context

    def _source(self, name: str, scope: Scope) -> Source:
        """What --from names: a stage, by name or number, or an image."""
        stage = self._stage_called(name)
        if stage is self.stages[-1]:
            raise WordError(f"--from={printable(name)}: a stage cannot copy from itself")
        if stage is None and name.isascii() and name.isdigit():
            number = name.lstrip("0") or "0"
            if len(number) > 9 or int(number) >= len(self.stages) - 1:
                raise WordError(f"--from={printable(name[:40])}: there is no such earlier stage")
            stage = self.stages[int(number)]
        if stage is not None:
            layers = tuple(stage.layers)
        else:
            _, layers = self._base(name, self.request.platform)
        if not layers:
            raise WordError(f"--from={printable(name)}: there is nothing in it")
        return scope.closing.enter_context(trees.image_tree(layers, self.workshop.store))


def _shown(line: str) -> str:
    """A line of the Dockerfile on the terminal: its backslashes are its own."""
    return printable(line).replace("\\\\", "\\")


def _stage_name(instruction: Instruction) -> str:
    """The name that a FROM gives, in small letters; "" for none."""
    found = instruction.rest.split()
    return found[2].lower() if len(found) == 3 and found[1].lower() == "as" else ""


def _run_words(instruction: Instruction, settings: config_of.Settings, escape: str) -> tuple[list[str], str | None]:
    """What a RUN executes, and the script if it is one.

    BuildKit: dispatchRun(): a here-document alone is the command (or a program, if it begins with #!); in any other
    place the shell gets it as it was written.
    """
    if not instruction.heredocs:
        return config_of.command_words(settings, instruction), None
    shell = config_of.shell_of(settings)
    first = instruction.heredocs[0]
    if len(words.split_raw(instruction.rest, escape)) == 1:
        return [*shell, first.text], first.text if first.text.startswith("#!") else None
    whole = instruction.rest + "".join(f"\n{one.content}{one.name}" for one in instruction.heredocs)
    return [*shell, whole], None
