"""Which objects of which layers make up one name of the merged tree?

The rule: layers are asked from the top down.  A whiteout ends the search, a non-directory wins and ends it, a
directory merges with the directories below it until one is opaque.  A `redirect` says under which name (or path
from the layers' root) to go on below, a `metacopy` file says that its data is the file found below.

This is the readable reference of native/merge.c, which gives the same answers; tests/model holds the two equal.
Kernel: fs/overlayfs/namei.c: ovl_lookup(), ovl_lookup_layer(), ovl_lookup_single(), ovl_check_redirect();
readdir.c: ovl_dir_read_merged().

Who wants to see a lookup (ovlfs.explain) gives it a listener, and is told of each layer's answer and the rule that it
falls under (`Answer`), and of what was not asked (`Unasked`).

Differences, on purpose: metacopy and redirect are followed without an option (the kernel needs metacopy=on,
redirect_dir=follow); a directory that a tar only implies takes its attributes from below (layer/base.py).
"""

import enum
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ovlfs.events import Event, Listener
from ovlfs.ids import Name
from ovlfs.layer.base import Entry, Layer, Ref, What

MAX_REDIRECT_BYTES = 4096
"""A longer overlay.redirect than a path can be is damage (EUCLEAN)."""

Layers = Sequence[Layer | None]
"""A stack: index 0 is the upperdir (None: a read-only stack), 1 the topmost lower layer, and so on down."""


class Source(NamedTuple):
    """One inode of one layer: `layer` indexes the stack."""

    layer: int
    ref: Ref


@dataclass(frozen=True, slots=True)
class Found:
    """What a name is in the merged tree.

    Attributes:
        is_dir: whether it is a directory.
        sources: top first.  A directory: all that merge.  Anything else: the one that has the metadata and, behind
            it where that one is a metacopy, the one that has the data.
        attributes: the source whose attributes are shown (not sources[0] for a directory that a tar only implies).
        metacopy: sources[0] has metadata only, its data is in sources[-1].
        redirect: sources[0] carries overlay.redirect: it was moved.
    """

    is_dir: bool
    sources: tuple[Source, ...]
    attributes: Source
    metacopy: bool = False
    redirect: bytes | None = None


class Rule(enum.Enum):
    """What a layer's answer to a lookup means.  The value says it for people."""

    ABSENT = "keep looking below"
    WHITEOUT = "whiteout: stop here, nothing below shows"
    FILE = "non-directory: stop here"
    METACOPY = "metadata only: keep looking below for the data"
    DATA = "its data: stop here"
    PASSED_OVER = "metadata only, too: passed over"
    MERGED = "merged, keep looking below"
    OPAQUE = "merged, opaque: stop here"
    NO_DIRECTORY = "non-directory below a directory: hidden, stop here"
    NO_DATA = "directory where data should be: hidden, stop here"
    ON_THE_WAY = "on the way of a redirect"
    OPAQUE_ON_THE_WAY = "opaque, on the way of a redirect: this layer is the last"
    IN_THE_WAY = "non-directory on the way of a redirect: stop here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Event):
    """One layer was asked, and said something.

    Attributes:
        source: the directory that was asked; `path` is what it was asked for: a name, or a path from the layer's root.
        entry: what it said (what a hard link to the layers below leads to; `link` is then its path there).
        at: the object.
        below: what will be asked for below, when the entry is redirected.
    """

    source: Source
    entry: Entry | None
    at: Source
    rule: Rule
    link: bytes = b""
    below: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unasked(Event):
    """Directories that were not asked for `path`, because layer `by` stopped the search, or redirected it elsewhere."""

    sources: tuple[Source, ...]
    by: int
    redirected: bool


@dataclass(slots=True)
class _Lookup:
    """The state of one lookup: the kernel's struct ovl_lookup_data."""

    name: bytes  # one name, or an absolute path from the layers' root after a redirect
    tell: Listener | None = None
    is_dir: bool = False
    stop: bool = False
    metacopy: bool = False
    redirect: bytes | None = None
    found: list[tuple[Source, Entry]] = field(default_factory=list)


def lookup(layers: Layers, sources: Sequence[Source], name: Name, tell: Listener | None = None) -> Found | None:
    """Find `name` in the merged directory made of `sources` (top first), and tell `tell` how.

    Returns:
        None when the merged tree has no such name.

    Raises:
        OSError: EUCLEAN for a damaged redirect, EIO for metadata whose data is nowhere below; a layer's own errors.
    """
    look = _Lookup(name, tell)
    queue = list(sources)
    while queue and not look.stop:
        source = queue.pop(0)
        asked = look.name
        entry, at = _lookup_layer(layers, source, look)
        if tell is not None and queue and (look.stop or look.name != asked):
            redirected = look.name != asked
            tell(Unasked("not asked", asked, sources=tuple(queue), by=source.layer, redirected=redirected))
        if asked[:1] != b"/" and look.name[:1] == b"/":
            # An absolute redirect: from here on the search starts at the roots of the layers below this one.
            queue = roots(layers, source.layer + 1)
        if entry is None:
            continue
        if look.found and look.found[0][1].metacopy and entry.metacopy:
            continue  # a metacopy of a metacopy: only the top's metadata and the bottom's data count
        look.found.append((at, entry))
    if len(look.found) == 1 and look.found[0][1].metacopy and look.name[:1] == b"/":
        data = _in_data_layers(layers, look.name, tell)
        if data is not None:
            look.found.append((data, Entry(What.OTHER, data.ref)))
    return _conclude(look)


def _in_data_layers(layers: Layers, path: bytes, tell: Listener | None) -> Source | None:
    """The regular file `path` of the topmost data-only layer that has it.  Kernel: ovl_lookup_data_layers()."""
    for number, layer in enumerate(layers):
        if layer is None or not layer.data_only:
            continue
        found = _regular_file(layer, path[1:])
        source = Source(number, layer.root)
        at = source if found is None else Source(number, found.ref)
        if tell is not None:
            rule = Rule.ABSENT if found is None else Rule.DATA
            tell(Answer("lookup", path, rule.value, source=source, entry=found, at=at, rule=rule))
        if found is not None:
            return at
    return None


def _regular_file(layer: Layer, path: bytes) -> Entry | None:
    entry: Entry | None = Entry(What.DIRECTORY, layer.root)
    for part in path.split(b"/"):
        if entry is None or entry.what is not What.DIRECTORY:
            return None
        entry = layer.lookup(entry.ref, Name(part))
    if entry is None or entry.what is not What.OTHER or not stat.S_ISREG(layer.attr(entry.ref).mode):
        return None
    return entry


def _conclude(look: _Lookup) -> Found | None:
    if not look.found:
        return None
    found = tuple(source for source, _ in look.found)
    top = look.found[0][1]
    if look.is_dir:
        attributes = next((source for source, entry in look.found if not entry.implied), found[0])
        return Found(True, found, attributes, redirect=top.redirect)
    if top.metacopy and len(found) < 2:
        raise OSError(errno.EIO, "metadata-only file without a data file below", os.fsdecode(look.name))
    return Found(False, found, found[0], top.metacopy, top.redirect)


def _lookup_layer(layers: Layers, source: Source, look: _Lookup) -> tuple[Entry | None, Source]:
    """Kernel: ovl_lookup_layer(): one name below `source`, or a whole path below the layer's root."""
    if look.name[:1] != b"/":
        return _lookup_single(layers, source, look, Name(look.name), b"", b"")
    layer = layers[source.layer]
    assert layer is not None
    at = Source(source.layer, layer.root)
    parts = look.name[1:].split(b"/")
    entry: Entry | None = None
    for index, part in enumerate(parts):
        prefix = b"/" + b"".join(p + b"/" for p in parts[:index])
        post = b"".join(b"/" + p for p in parts[index + 1 :])
        entry, at = _lookup_single(layers, at, look, Name(part), prefix, post)
        if entry is None:
            return None, at
    return entry, at


def _lookup_single(
    layers: Layers, source: Source, look: _Lookup, name: Name, prefix: bytes, post: bytes
) -> tuple[Entry | None, Source]:
    """Kernel: ovl_lookup_single().  `post` is what follows in a path: non-empty means not the last component."""
    layer = layers[source.layer]
    assert layer is not None
    entry = layer.lookup(source.ref, name)
    at = source if entry is None else Source(source.layer, entry.ref)
    link = b""
    if entry is not None and entry.what is What.LINK_BELOW:
        link = entry.target
        entry, at = _link_below(layers, source.layer, entry)
    rule = _apply(look, entry, last=not post)
    asked = look.name
    if entry is not None and entry.redirect is not None and rule not in _USELESS:
        _check_redirect(look, entry.redirect, prefix, post)
    if look.tell is not None:
        below = look.name if look.name != asked else b""
        path = prefix + name
        look.tell(
            Answer("lookup", path, rule.value, source=source, entry=entry, at=at, rule=rule, link=link, below=below)
        )
    return None if rule in _USELESS else entry, at


_USELESS = frozenset((Rule.ABSENT, Rule.WHITEOUT, Rule.NO_DIRECTORY, Rule.NO_DATA, Rule.IN_THE_WAY))
"""With these a layer adds nothing to what is found."""


def _apply(look: _Lookup, entry: Entry | None, *, last: bool) -> Rule:
    """What one layer's answer means, and whether the search stops with it.

    `last`: the name is what is looked for, not a directory on the way of a redirect.
    """
    if entry is None:
        return Rule.ABSENT
    if entry.what is What.WHITEOUT:
        look.stop = True
        return Rule.WHITEOUT
    if entry.what is What.OTHER:
        if not last or look.is_dir:
            look.stop = True  # a file where a directory is needed hides what is below
            return Rule.NO_DIRECTORY if last else Rule.IN_THE_WAY
        follows_metacopy = look.metacopy
        look.stop = not entry.metacopy
        look.metacopy = entry.metacopy
        if entry.metacopy:
            return Rule.PASSED_OVER if follows_metacopy else Rule.METACOPY
        return Rule.DATA if follows_metacopy else Rule.FILE
    if last and look.metacopy:
        look.stop = True  # data of a metacopy must be a file
        return Rule.NO_DATA
    if last:
        look.is_dir = True
    if entry.opaque:
        look.stop = True
    if not last:
        return Rule.OPAQUE_ON_THE_WAY if entry.opaque else Rule.ON_THE_WAY
    return Rule.OPAQUE if entry.opaque else Rule.MERGED


def _check_redirect(look: _Lookup, redirect: bytes, prefix: bytes, post: bytes) -> None:
    """Kernel: ovl_check_redirect(): the name to go on with below."""
    if len(redirect) > MAX_REDIRECT_BYTES or not redirect:
        raise OSError(errno.EUCLEAN, "overlay.redirect of an impossible length")
    if redirect[:1] == b"/":
        if any(part in (b"", b".", b"..") for part in redirect[1:].split(b"/")):
            raise OSError(errno.EUCLEAN, "overlay.redirect is not a clean path")
        # An opaque ancestor on an absolute path stops the search, an absolute redirect further down resumes it.
        look.stop = False
        look.name = redirect + post
    else:
        if b"/" in redirect or redirect in (b".", b".."):
            raise OSError(errno.EUCLEAN, "overlay.redirect is not one name")
        look.name = prefix + redirect + post


def _link_below(layers: Layers, number: int, entry: Entry) -> tuple[Entry, Source]:
    """Follow a tar's hard link to a path of the layers below; without one, the same layer's later entry."""
    below = resolve(layers, roots(layers, number + 1), entry.target)
    if below is not None and not below.is_dir:
        return Entry(What.OTHER, below.sources[0].ref, metacopy=below.metacopy), below.sources[0]
    if entry.ref:  # 0 would be the root, which no link can be
        return Entry(What.OTHER, entry.ref), Source(number, entry.ref)
    raise OSError(errno.EIO, "hard link to a path that no layer below has", os.fsdecode(entry.target))


def resolve(layers: Layers, sources: Sequence[Source], path: bytes) -> Found | None:
    """Find a path of several names (no `..`, symlinks are not followed) below merged directories."""
    found: Found | None = None
    for part in path.split(b"/"):
        if found is not None:
            if not found.is_dir:
                return None
            sources = found.sources
        found = lookup(layers, sources, Name(part))
        if found is None:
            return None
    return found


def roots(layers: Layers, first: int) -> list[Source]:
    """The root directories of the stack from layer `first` downwards, to the first opaque one."""
    found: list[Source] = []
    for number, layer in enumerate(layers):
        if layer is not None and number >= first and not layer.data_only:
            found.append(Source(number, layer.root))
            if layer.root_opaque:
                break
    return found


def root(layers: Layers) -> Found:
    """The root directory of the whole stack."""
    sources = tuple(roots(layers, 0))
    described = (s for s in sources if (layer := layers[s.layer]) is not None and not layer.is_implied(s.ref))
    return Found(True, sources, next(described, sources[0]))


def names(layers: Layers, sources: Sequence[Source]) -> dict[Name, int]:
    """The names that the merged directory made of `sources` lists, each with the topmost layer that has it.

    Kernel: readdir.c: ovl_dir_read_merged(), ovl_fill_merge().  A name can still turn out absent when looked up
    (a whiteout that only a lookup can see), so callers look each one up before they show it.
    """
    decided: dict[Name, int] = {}
    hidden: set[Name] = set()
    for source in sources:
        layer = layers[source.layer]
        assert layer is not None
        fresh: list[Name] = []
        for name, what in layer.list(source.ref):
            if name in decided or name in hidden:
                continue
            if what is What.WHITEOUT:
                fresh.append(name)
            else:
                decided[name] = source.layer
        hidden.update(fresh)  # after the layer: its whiteouts hide what is below it, never its own names
    return decided
