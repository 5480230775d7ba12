"""Why does this path look as it does?

The lookup is made again, component by component, by the code that answers the mount's own requests (layer/merge.py),
with a listener that hears what each layer says and which rule decides.  What lies hidden below is found the same way:
the layers that were not asked are asked, as if those above were not there.  Nothing here knows a rule of overlayfs.

Symlinks on the way are followed inside the root, as chroot(2) would; one at the very end is explained itself.

The answer is plain data (dicts and lists of strings and numbers, names made printable), as `--json` prints it; its
keys are described in cli/explain.py, and text.py makes it readable.  In a daemon this runs in the mount's own thread,
between two requests, so it is the truth of one moment.  It changes nothing, and MAX_ANSWERS bounds it.

Kernel: fs/overlayfs/namei.c: ovl_lookup(); fs/namei.c: link_path_walk() for the walk itself.
"""

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ovlfs.errors import OvlfsError, printable
from ovlfs.events import Event
from ovlfs.explain.layers import kind_of
from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer import merge
from ovlfs.layer.base import Attr, Layer, What
from ovlfs.layer.directory import NAME_MAX, DirLayer
from ovlfs.layer.merge import Answer, Found, Rule, Source, Unasked
from ovlfs.layer.open import ImageLayer
from ovlfs.layer.tree import Inode, resolve_name
from ovlfs.overlay import namei
from ovlfs.overlay.plan import plan
from ovlfs.overlay.stack import Stack

MAX_SYMLINKS = 40
"""Kernel: MAXSYMLINKS."""
PATH_MAX = 4095
MAX_ANSWERS = 50_000
"""Of layers, in one explanation.  A hostile image could make it long otherwise: many symlinks, each a long path."""

_HIDDEN_ITSELF = frozenset((Rule.NO_DIRECTORY, Rule.NO_DATA, Rule.PASSED_OVER))
"""The rules by which an object that a layer has does not show."""

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Hidden:
    """Something that layers have under a name (or path), and that does not show because of `by`."""

    name: bytes
    sources: tuple[Source, ...]
    is_dir: bool
    by: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the walk is: an object of the merged tree, and what is hidden under the same name."""

    path: bytes
    found: Found
    hidden: tuple[_Hidden, ...] = ()


class TooMuchError(OSError):
    """The path leads through more than MAX_ANSWERS answers."""

    def __init__(self) -> None:
        super().__init__(errno.ELOOP, f"the path leads through more than {MAX_ANSWERS} answers of layers")


def answer(stack: Stack, request: Facts) -> Facts:
    """What a mount answers to `ovlfs explain` (fuse/control.py).  Raises OvlfsError: that is no request."""
    path = request.get("path")
    if not isinstance(path, str):
        raise OvlfsError("'path' is a string")
    return explain(stack, os.fsencode(path))


def explain(stack: Stack, path: bytes) -> Facts:
    """Everything about one path of a stack.

    Never raises for what the tree itself would answer an errno for: that is in `error`.
    """
    return _Explaining(stack, path).run()


@dataclass(slots=True)
class _Heard:
    """What a lookup has told."""

    answers: list[Answer] = field(default_factory=list)
    unasked: list[Unasked] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Answer):
            self.answers.append(event)
        elif isinstance(event, Unasked):
            self.unasked.append(event)


class _Explaining:
    def __init__(self, stack: Stack, path: bytes) -> None:
        self.stack = stack
        self.layers = stack.layers
        self.asked = path
        self.steps: list[Facts] = []
        self.notes: list[str] = []
        self.error: OSError | None = None
        self.missing = ""
        self._answers_left = MAX_ANSWERS
        root = merge.root(self.layers)
        self.trail = [_Place(b"", root)]
        self.hidden: tuple[_Hidden, ...] = ()
        self.target: bytes | None = None  # where the walk has come to, also where nothing is

    def run(self) -> Facts:
        """Walk, and put the facts together."""
        if self.stack.cut:
            top = self.stack.name_of(max(n for n, layer in enumerate(self.layers) if layer and not layer.data_only))
            self.notes.append(f"the root of {top} is opaque: {_count(self.stack.cut, 'layer')} below it never shows")
        try:
            self._walk()
        except OSError as error:
            if error.errno is None:
                raise
            self.error = error
        place = self.trail[-1] if self.error is None and self.target is None else None
        resolved = self.target if self.target is not None else self.trail[-1].path
        return {
            "path": "/" + printable(self.asked.strip(b"/")),
            "resolved": "/" + printable(resolved),
            "error": None if self.error is None else errno.errorcode.get(self.error.errno or 0, "EIO"),
            "reason": self.missing or ("" if self.error is None else _reason(self.error)),
            "object": None if place is None else self._object(place),
            "steps": self.steps,
            "hidden": [self._hidden_facts(one) for one in (self.hidden if place is None else place.hidden)],
            "write": self._write(place),
            "layers": [self._layer(number) for number, layer in enumerate(self.layers) if layer is not None],
            "notes": self.notes,
        }

    # ---- the walk

    def _walk(self) -> None:
        if len(self.asked) > PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        todo = self.asked.split(b"/")[::-1]
        links = 0
        if not any(todo):
            self.steps.append(self._root_step())
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            here = self.trail[-1]
            if not here.found.is_dir:
                self.target, self.hidden = here.path, here.hidden
                self._follow_hidden([name, *todo[::-1]])
                self.missing = f"/{printable(here.path)} is no directory"
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if name == b"..":
                del self.trail[max(1, len(self.trail) - 1) :]
                continue
            if len(name) > NAME_MAX:
                self.target = self._joined(here.path, [name, *todo[::-1]])
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            place = self._step(here, Name(name))
            if place is None:
                self._follow_hidden(todo[::-1])
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            link = self._readlink(place) if any(todo) or self.asked.endswith(b"/") else None
            if link is None:
                self.trail.append(place)
                continue
            links += 1
            if links > MAX_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            self.steps[-1]["follows"] = printable(link)
            if link.startswith(b"/"):
                del self.trail[1:]
            todo += link.split(b"/")[::-1]
        if self.asked.endswith(b"/") and not self.trail[-1].found.is_dir:
            self.missing = f"/{printable(self.trail[-1].path)} is no directory"
            self.target = self.trail[-1].path
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _joined(self, directory: bytes, names: Sequence[bytes]) -> bytes:
        return b"/".join([*([directory] if directory else []), *(name for name in names if name not in (b"", b"."))])

    def _step(self, directory: _Place, name: Name) -> _Place | None:
        """One component: what each layer says of it.  None: the merged tree has no such name."""
        heard = _Heard()
        path = self._joined(directory.path, [name])
        found, failure = None, None
        try:
            found = merge.lookup(self.layers, directory.found.sources, name, heard)
        except OSError as error:
            failure = error
        self._spend(heard)
        self.steps.append(self._step_facts(path, name, heard, found))
        if failure is not None:
            self.target = path
            raise failure
        self.hidden = (*self._hidden_by(heard), *self._hidden_children(directory.hidden, name))
        if found is None:
            self.target = path
            self.missing = self._why_missing(heard, path)
            return None
        return _Place(path, found, self.hidden)

    def _why_missing(self, heard: _Heard, path: bytes) -> str:
        where = "" if path == self.asked.strip(b"/") else f"/{printable(path)} is "
        for answer in heard.answers:
            if answer.rule is Rule.WHITEOUT:
                return f"{where}whited out in {self.stack.name_of(answer.source.layer)}"
        if self.hidden:
            return f"{where}hidden by {self.hidden[0].by}"
        return f"no layer has /{printable(path)}" if where else "no layer has it"

    def _follow_hidden(self, rest: Sequence[bytes]) -> None:
        """Where nothing shows, what would have been at the end of the path in the layers that are hidden."""
        names = [name for name in rest if name not in (b"", b".")]
        self.target = self._joined(self.target or b"", names)
        for name in names:
            followed = name != b".." and len(name) <= NAME_MAX
            self.hidden = self._hidden_children(self.hidden, Name(name)) if followed else ()

    # ---- what is hidden

    def _hidden_by(self, heard: _Heard) -> list[_Hidden]:
        """What layers have of a name beside what shows."""
        hidden: list[_Hidden] = []
        above = next((answer for answer in heard.answers if answer.rule in (Rule.MERGED, Rule.METACOPY)), None)
        if above is not None:
            by = f"the {self._entry_text(above)} in {self.stack.name_of(above.source.layer)}"
            hidden += _hidden_themselves(heard, by)
        for unasked in heard.unasked:
            hidden += self._below(unasked.sources, unasked.path, self._cover(heard, unasked))
        return hidden

    def _hidden_children(self, directories: Sequence[_Hidden], name: Name) -> tuple[_Hidden, ...]:
        """What is under a name in hidden directories."""
        return tuple(below for one in directories if one.is_dir for below in self._below(one.sources, name, one.by))

    def _below(self, sources: tuple[Source, ...], name: bytes, by: str) -> list[_Hidden]:
        """All that directories which were not asked have under a name, layer by layer."""
        hidden: list[_Hidden] = []
        todo = [(sources, name, by)]
        while todo:
            sources, name, by = todo.pop()
            heard = _Heard()
            try:
                found = merge.lookup(self.layers, sources, Name(name), heard)
            except OSError as error:
                self.notes.append(f"hidden below, {printable(name)}: {_reason(error)}")
                found = None
            self._spend(heard)
            if found is not None:
                hidden.append(_Hidden(name, found.sources, found.is_dir, by))
            hidden += _hidden_themselves(heard, by)
            todo += [(one.sources, one.path, self._cover(heard, one)) for one in heard.unasked]
        return hidden

    def _cover(self, heard: _Heard, unasked: Unasked) -> str:
        """Because of what directories were not asked."""
        layer = self.stack.name_of(unasked.by)
        if unasked.redirected:
            return f"the redirect in {layer}"
        answer = next(one for one in reversed(heard.answers) if one.source.layer == unasked.by)
        return f"the {self._entry_text(answer)} in {layer}"

    def _entry_text(self, answer: Answer) -> str:
        """What covers something, in a few words."""
        entry = answer.entry
        if entry is None:
            return "absence"
        if entry.what is What.WHITEOUT:
            return "whiteout"
        if entry.what is What.DIRECTORY:
            return f"{'opaque ' if entry.opaque else ''}directory {printable(answer.path.strip(b'/'))}"
        return _kind(self._attr(answer.at))

    def _spend(self, heard: _Heard) -> None:
        self._answers_left -= len(heard.answers)
        if self._answers_left < 0:
            raise TooMuchError

    # ---- facts

    def _layer_object(self, number: int) -> Layer:
        layer = self.layers[number]
        assert layer is not None
        return layer

    def _attr(self, source: Source) -> Attr:
        return self._layer_object(source.layer).attr(source.ref)

    def _readlink(self, place: _Place) -> bytes | None:
        """The target of a symlink, None for anything else."""
        source = place.found.attributes
        if place.found.is_dir or not stat.S_ISLNK(self._attr(source).mode):
            return None
        return self._layer_object(source.layer).readlink(source.ref)

    def _layer(self, number: int) -> Facts:
        layer = self._layer_object(number)
        facts: Facts = {"layer": number, "name": self.stack.name_of(number), "data_only": layer.data_only}
        if isinstance(layer, ImageLayer):
            return facts | {
                "where": printable(layer.where),
                "diff_id": layer.blob.diff_id,
                "created_by": printable(layer.blob.created_by),
            }
        where = printable(layer.path) if isinstance(layer, DirLayer) else ""
        return facts | {"where": where, "diff_id": None, "created_by": ""}

    def _root_step(self) -> Facts:
        found = merge.root(self.layers)
        return {
            "name": "/",
            "path": "/",
            "found": True,
            "follows": None,
            "answers": [
                {
                    "layer": source.layer,
                    "asked": "/",
                    "says": "directory",
                    "rule": "OPAQUE" if self._layer_object(source.layer).root_opaque else "MERGED",
                    "because": "the roots are merged",
                    "room": "merge",
                    "size": None,
                    "redirect": None,
                }
                for source in found.sources
            ],
            "not_asked": [],
        }

    def _step_facts(self, path: bytes, name: bytes, heard: _Heard, found: Found | None) -> Facts:
        return {
            "name": printable(name),
            "path": "/" + printable(path),
            "found": found is not None,
            "follows": None,
            "answers": [self._answer(answer) for answer in heard.answers],
            "not_asked": [
                {
                    "layers": [source.layer for source in one.sources],
                    "asked": printable(one.path),
                    "by": one.by,
                    "redirected": one.redirected,
                }
                for one in heard.unasked
            ],
        }

    def _answer(self, answer: Answer) -> Facts:
        says, size = self._says(answer)
        return {
            "layer": answer.source.layer,
            "asked": printable(answer.path),
            "says": says,
            "rule": answer.rule.name,
            "because": answer.rule.value,
            "room": "merge",
            "size": size,
            "redirect": printable(answer.below) if answer.below else None,
        }

    def _says(self, answer: Answer) -> tuple[str, int | None]:
        entry = answer.entry
        if entry is None:
            return "absent", None
        if entry.what is What.WHITEOUT:
            return "whiteout", None
        if entry.what is What.DIRECTORY:
            implied = ", only implied by its paths" if entry.implied else ""
            return ("opaque directory" if entry.opaque else "directory") + implied, None
        attr = self._attr(answer.at)
        says = "metadata of a file (metacopy)" if entry.metacopy else _kind(attr)
        if answer.link:
            says = f"hard link to /{printable(answer.link)} in {self.stack.name_of(answer.at.layer)}, a {says}"
        return says, attr.size if stat.S_ISREG(attr.mode) else None

    def _object(self, place: _Place) -> Facts:
        """What the path is."""
        found = place.found
        attr = self._attr(found.attributes)
        kind = _kind(attr)
        target = self._readlink(place)
        return {
            "kind": kind,
            "from": [source.layer for source in found.sources],
            "attributes_from": found.attributes.layer,
            "data_from": found.sources[-1].layer if not found.is_dir else None,
            "metacopy": found.metacopy,
            "mode": f"{stat.S_IMODE(attr.mode):04o}",
            "uid": attr.uid,
            "gid": attr.gid,
            "size": attr.size if kind == "regular file" else None,
            "target": None if target is None else printable(target),
            "device": [os.major(attr.rdev), os.minor(attr.rdev)] if "device" in kind else None,
            "other_names": self._other_names(place),
        }

    def _other_names(self, place: _Place) -> list[str]:
        """The other paths of the inode in the layer that has it: it is a hard link."""
        source = place.found.attributes
        if place.found.is_dir or self._attr(source).nlink < 2:
            return []
        ours = source.ref if isinstance(source.ref, bytes) else place.path
        paths = self._layer_object(source.layer).links(source.ref)
        return ["/" + printable(path) for path in paths[:1000] if path != ours]

    def _hidden_facts(self, hidden: _Hidden) -> Facts:
        attrs = [self._attr(source) for source in hidden.sources]
        return {
            "layers": [source.layer for source in hidden.sources],
            "path": "/" + printable(self._path_in_layer(hidden.sources[0], hidden.name)),
            "kind": _kind(attrs[0]),
            "size": attrs[0].size if stat.S_ISREG(attrs[0].mode) else None,
            "by": hidden.by,
        }

    def _path_in_layer(self, source: Source, name: bytes) -> bytes:
        """The path of an object; of several hard links, one that has the name."""
        if isinstance(source.ref, bytes):
            return source.ref
        last = name.rpartition(b"/")[2]
        paths = self._layer_object(source.layer).links(source.ref)
        return next((path for path in paths if path.rpartition(b"/")[2] == last), paths[0])

    # ---- what a write would do

    def _write(self, place: _Place | None) -> Facts | None:
        """What opening for writing would do; where there is nothing, what making it would."""
        creates = self.error is not None and self.error.errno == errno.ENOENT
        if creates and self.target is not None and self.target.rpartition(b"/")[0] == self.trail[-1].path:
            place = self.trail[-1]
        if place is None:
            return None
        inode = self._live(place)
        if inode is None:
            return None
        try:
            would = plan(self.stack, inode)
        except OSError as error:
            self.notes.append(f"it could not be copied up now: {_reason(error)}")  # the layer's data cannot be had
            return None
        if creates:
            answers = self.steps[-1]["answers"]
            directories = [*would.directories, *([] if would.in_place else [place.path])]
            return {
                "creates": True,
                "read_only": self.stack.upper is None,
                "upper": printable(self.target or b""),
                "directories": [printable(path) for path in directories],
                "over_whiteout": any(one["layer"] == 0 and one["rule"] == "WHITEOUT" for one in answers),
            }
        return {
            "creates": False,
            "read_only": self.stack.upper is None,
            "in_place": would.in_place,
            "upper": printable(place.path),
            "directories": [printable(path) for path in would.directories],
            "completes": would.completes,
            "steps": list(would.steps),
            "size_bytes": would.size_bytes,
            "data_bytes": would.data_bytes,
            "metadata_alone": would.metadata_alone,
            "names": [printable(path) for path in would.names],
        }

    def _live(self, place: _Place) -> Inode | None:
        """The same object in the live tree, which answers the mount's requests.  It must say what was explained."""
        tree = self.stack.tree
        if not place.path:
            return tree.get(ROOT_NODEID)
        inode = namei.walk(self.stack, place.path)
        parent, _, name = place.path.rpartition(b"/")
        above = self.trail[-2].found.sources
        told = resolve_name(self.layers, above, Name(name), parent)
        if inode is None or told is None or not _agree(inode, told):
            self.notes.append("the mount remembers something else: was a layer changed behind its back?")
            return None
        return inode


def _hidden_themselves(heard: _Heard, by: str) -> list[_Hidden]:
    """What layers have, and what does not show though they were asked."""
    return [
        _Hidden(answer.path, (answer.at,), answer.entry.what is What.DIRECTORY, by)
        for answer in heard.answers
        if answer.rule in _HIDDEN_ITSELF and answer.entry is not None
    ]


def _agree(live: Inode, told: Inode) -> bool:
    if (live.upper, live.metacopy, live.is_dir) != (told.upper, told.metacopy, told.is_dir):
        return False
    return live.lower == told.lower if told.is_dir else told.upper or live.ino == told.ino


def _kind(attr: Attr) -> str:
    return "regular file" if stat.S_ISREG(attr.mode) else kind_of(attr.mode)


def _reason(error: OSError) -> str:
    where = "" if error.filename is None else f" ({printable(error.filename)})"
    return f"{error.strerror or error}{where}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
