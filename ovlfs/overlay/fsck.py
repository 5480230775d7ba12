"""What is wrong with an upperdir, and what of it can be put right without losing anything that a user has written?

Every object of the upperdir is looked at once, together with what the layers below have at its place (layer/merge.py).
Nothing is followed: neither symlinks nor mounts in it, nor what is in files.  Rules, and what a repair does:

    stale-temp               an object in workdir that a killed mount left                      removed
    volatile-mark            the last mount was volatile and may have lost writes               -
    whiteout-without-lower   hides a name that nothing below has                                removed
    whiteout-in-opaque       hides a name below a directory that shows nothing from below       removed
    bad-override             user.containers.override_stat that says nothing that can be true   the xattr is removed
    bad-redirect             overlay.redirect that is no path                                   opaque instead
    broken-redirect          overlay.redirect to what is no directory below                     opaque instead
    broken-metacopy          a file whose data is below, and is not there, or has another size  -
    wh-name                  a `.wh.` name: an ordinary file here, and nothing for a layer      -
    unreadable               whatever cannot be read                                            -

A directory whose redirect leads nowhere is made opaque, not only freed of it: otherwise a directory of the same name
below would show through all of a sudden.  What a repair changes is not to be seen in the mount, so directories keep
their times.

Kernel: no counterpart; util.c: ovl_is_whiteout(), ovl_get_redirect_xattr(); namei.c: ovl_check_redirect().
Precondition for all: the upperdir and workdir are claimed, nobody has them mounted.
"""

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ovlfs.errors import printable
from ovlfs.ids import Name
from ovlfs.image.layer_tar import WHITEOUT_PREFIX
from ovlfs.layer import merge, sys
from ovlfs.layer.base import Layer, What
from ovlfs.layer.directory import DirLayer, getxattr
from ovlfs.layer.merge import Found, Source
from ovlfs.layer.override import OVERRIDE_XATTR, parse_override
from ovlfs.overlay.copy_up import times_kept
from ovlfs.overlay.upper import remove_tree

_INCOMPAT = b"incompat"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        path: from the root of the upperdir, or of workdir/work for a stale temp.
        rule: its name in the table above.
        text: what is wrong, in words.
        remedy: what becomes of it by a repair ("removed"); "" where there is none.
        repair: does it; None: nothing can be done without losing something.
    """

    path: bytes
    rule: str
    text: str
    remedy: str = ""
    repair: Callable[[], None] | None = None


def check(upper: DirLayer, lowers: Sequence[Layer], work_fd: int | None) -> Iterator[Finding]:
    """Everything that is wrong; whoever repairs may do so before asking for the next.

    Args:
        upper: the upperdir (upperdir.open_layer()).
        lowers: what it lies over, top first.
        work_fd: workdir/work; None: there is none.
    """
    if work_fd is not None:
        yield from _work(work_fd)
    yield from _Check(upper, lowers).run()


def _work(work_fd: int) -> Iterator[Finding]:
    for entry in sorted(map(os.fsencode, os.listdir(work_fd))):
        if entry == _INCOMPAT:
            yield Finding(
                entry, "volatile-mark", "the last mount was volatile, and may have lost what was written last"
            )
            continue
        repair = functools.partial(_discard, work_fd, entry)
        yield Finding(entry, "stale-temp", "left by a mount that was killed", "removed", repair)


def _discard(work_fd: int, name: bytes) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=work_fd, follow_symlinks=False).st_mode):
        remove_tree(work_fd, name)
    else:
        os.unlink(name, dir_fd=work_fd)


@dataclass(frozen=True, slots=True)
class _Directory:
    """A directory of the upperdir: its path there, what merges with it below, and whether it is marked opaque."""

    path: bytes
    below: tuple[Source, ...]
    opaque: bool = False


class _Check:
    """One walk over an upperdir."""

    def __init__(self, upper: DirLayer, lowers: Sequence[Layer]) -> None:
        self.upper = upper
        self.layers: list[Layer | None] = [upper, *lowers]
        self.prefix = upper.prefixes[0]

    def run(self) -> Iterator[Finding]:
        yield from self._override(b"", is_dir=True)
        todo = [_Directory(b"", tuple(merge.roots(self.layers, 1)))]
        while todo:
            directory = todo.pop()
            try:
                names = sorted(self.upper.list(directory.path))
            except OSError as error:
                yield _unreadable(directory.path, error)
                continue
            below: list[_Directory] = []
            for name, what in names:
                path = directory.path + b"/" + name if directory.path else name
                try:
                    yield from self._one(directory, name, path, what)
                    if what is What.DIRECTORY:
                        below.append(self._enter(directory, name, path))
                except OSError as error:
                    yield _unreadable(path, error)
            todo += reversed(below)

    def _one(self, directory: _Directory, name: Name, path: bytes, what: What) -> Iterator[Finding]:
        if what is What.WHITEOUT:
            yield from self._whiteout(directory, name, path)
            return
        if name.startswith(WHITEOUT_PREFIX):
            yield Finding(path, "wh-name", "is an ordinary file here, and no OCI layer can hold a name like that")
        yield from self._override(path, is_dir=what is What.DIRECTORY)
        if what is What.DIRECTORY:
            yield from self._redirect(directory, name, path)
        else:
            yield from self._metacopy(directory, name, path)

    def _found(self, directory: _Directory, name: Name) -> Found | None:
        return merge.lookup(self.layers, (Source(0, directory.path), *directory.below), name)

    def _enter(self, directory: _Directory, name: Name, path: bytes) -> _Directory:
        try:
            found = self._found(directory, name)
        except OSError as error:
            if error.errno != errno.EUCLEAN:
                raise
            found = None  # a bad redirect, reported already: nothing below shows
        with self.upper.located(path) as at:
            opaque = self.upper.own_xattr(at, b"opaque", follow=True) == b"y"
        return _Directory(path, () if found is None else found.sources[1:], directory.opaque or opaque)

    # ---- whiteouts -----------------------------------------------------------------------------------------------

    def _whiteout(self, directory: _Directory, name: Name, path: bytes) -> Iterator[Finding]:
        def repair() -> None:
            with self.upper.directory(directory.path) as dirfd, self.upper.located(directory.path) as parent:
                entry = self.upper.lookup(directory.path, name)
                if entry is None or entry.what is not What.WHITEOUT:
                    raise OSError(errno.EBUSY, "is no longer the whiteout that was found", path)
                with times_kept(parent):
                    os.unlink(name, dir_fd=dirfd)

        if directory.opaque and not directory.below:
            text = "a whiteout in a directory that shows nothing from below"
            yield Finding(path, "whiteout-in-opaque", text, "removed", repair)
        elif merge.lookup(self.layers, directory.below, name) is None:
            yield Finding(path, "whiteout-without-lower", "a whiteout of what is not there", "removed", repair)

    # ---- xattrs --------------------------------------------------------------------------------------------------

    def _override(self, path: bytes, *, is_dir: bool) -> Iterator[Finding]:
        if not self.upper.override:
            return
        with self.upper.located(path) as at:
            if stat.S_IFMT(os.stat(at).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                return
            value = getxattr(at, OVERRIDE_XATTR, follow=True)
        if value is None:
            return
        shown = f"'{printable(value[:100])}'"
        try:
            kind = parse_override(value).file_type
        except OSError:
            text = f"{os.fsdecode(OVERRIDE_XATTR)} is damaged: {shown}"
        else:
            if not kind or stat.S_ISDIR(kind) == is_dir:
                return
            text = (
                f"{os.fsdecode(OVERRIDE_XATTR)} says what cannot be of {'a directory' if is_dir else 'a file'}: {shown}"
            )

        def repair() -> None:
            with self.upper.located(path) as at:
                os.removexattr(at, OVERRIDE_XATTR)

        yield Finding(path, "bad-override", text, "freed of the xattr", repair)

    def _redirect(self, directory: _Directory, name: Name, path: bytes) -> Iterator[Finding]:
        with self.upper.located(path) as at:
            value = self.upper.own_xattr(at, b"redirect", follow=True)
            opaque = self.upper.own_xattr(at, b"opaque", follow=True) == b"y"
        if value is None or opaque:
            return
        shown = f"'{printable(value[:300])}'"
        try:
            found = self._found(directory, name)
        except OSError as error:
            if error.errno != errno.EUCLEAN:
                raise
            rule, text = "bad-redirect", f"overlay.redirect is no path: {shown}"
        else:
            if found is not None and len(found.sources) > 1:
                return
            rule, text = "broken-redirect", f"overlay.redirect names {shown}, which is no directory in the layers below"

        def repair() -> None:
            with self.upper.located(path) as at:
                os.setxattr(at, self.prefix + b"opaque", b"y")
                os.removexattr(at, self.prefix + b"redirect")

        yield Finding(path, rule, text, "made opaque, and freed of the redirect", repair)

    def _metacopy(self, directory: _Directory, name: Name, path: bytes) -> Iterator[Finding]:
        with self.upper.located(path) as at:
            if not stat.S_ISREG(os.stat(at).st_mode):
                return
            if self.upper.own_xattr(at, b"metacopy", follow=True) is None:
                return
            size = os.stat(at).st_size
        try:
            found = self._found(directory, name)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EUCLEAN):
                raise
            yield Finding(path, "broken-metacopy", "its data should be in the layers below, and is not there")
            return
        assert found is not None
        layer = self.layers[found.sources[-1].layer]
        assert layer is not None
        below = layer.attr(found.sources[-1].ref)
        if not stat.S_ISREG(below.mode) or below.size != size:
            what = f"{below.size} bytes" if stat.S_ISREG(below.mode) else "no file"
            yield Finding(path, "broken-metacopy", f"its data should be {size} bytes, in the layers below is {what}")


def _unreadable(path: bytes, error: OSError) -> Finding:
    return Finding(path, "unreadable", os.strerror(error.errno or errno.EIO))


def open_work(workdir: bytes) -> int | None:
    """A descriptor of workdir/work; None where there is none."""
    try:
        fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return sys.open_beneath(fd, b"work", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)
