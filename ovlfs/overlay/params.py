"""What do the mount options say?

One string of words separated by commas, as mount(8), fstab, `mount -t overlay` and fuse-overlayfs take it.  Every
word is either honoured or refused by name: an option that is silently ignored is a promise broken.  The words that are
accepted and change nothing are listed with the reason (`_NOTHING_TO_DO`).

A backslash takes the meaning from the next character, be it a comma, a colon or a backslash, in every value.  An
SELinux context may stand in double quotes, and then hold commas (mount(8) writes it so).  The last of several equal
words wins.

Kernel: fs/overlayfs/params.c: ovl_parameter_spec, ovl_next_opt(), ovl_unescape(), ovl_parse_param_lowerdir().
Differences: `lowerdir+` is unescaped too; what a kernel would ignore with a warning is refused.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ovlfs.errors import UsageError, printable

MAX_LAYERS = 500
"""Kernel: OVL_MAX_STACK."""

_QUOTED = frozenset(("context=", "fscontext=", "defcontext=", "rootcontext="))

IdMap = tuple[tuple[int, int, int], ...]
"""(id in the layers, id to show, count), as /proc/PID/uid_map of fuse-overlayfs's `host:to:len`."""


@dataclass(frozen=True, slots=True)
class Params:
    """What shall be stacked, and by which rules.

    Attributes:
        lowerdirs: topmost first; empty when the lower layers are an image's.
        datadirs: data-only layers: reached only by the absolute redirect of a metacopy file, never listed.
        upperdir: None: a read-only stack.
        userxattr: whether the overlay's xattrs are user.overlay.*; None: as privileges allow.
        redirect_dir: whether directories with something below may be renamed; None: the default.
        metacopy: whether a change of attributes copies only those; None: the default.
        volatile: nothing is ever synced.
        volatile_mark: a volatile mount leaves a mark that forbids using the upperdir after a crash.
        xattr_permissions: 2: owners are kept in user.containers.override_stat; 0: never; None: where needed.
        override_always: with 2, also where the object itself says the same: for who shows it in a user namespace, where
            ids mean something else than outside.
        oci_whiteouts: `.wh.` names in lower directories are whiteouts, as in an unpacked OCI layer.
        read_only: nothing can be changed, even with an upperdir.
        acl: POSIX ACLs are honoured.
        squash_uid, squash_gid: the owner that every inode is shown with.
        uidmapping, gidmapping: how ids of the layers are shown; an id that is not mapped is shown as 65534.
    """

    lowerdirs: tuple[bytes, ...] = ()
    datadirs: tuple[bytes, ...] = ()
    upperdir: bytes | None = None
    workdir: bytes | None = None
    userxattr: bool | None = None
    redirect_dir: bool | None = None
    metacopy: bool | None = None
    volatile: bool = False
    volatile_mark: bool = True
    xattr_permissions: int | None = None
    override_always: bool = False
    oci_whiteouts: bool = True
    read_only: bool = False
    acl: bool = True
    squash_uid: int | None = None
    squash_gid: int | None = None
    uidmapping: IdMap = ()
    gidmapping: IdMap = ()


@dataclass(frozen=True, slots=True)
class MountFlags:
    """What the options say about the mount as such, and about the command.

    Attributes:
        suid, dev: set-uid bits and device nodes have effect; not unless asked for, since an image is a stranger's.
        exec: programs can be executed.
        sync, dirsync: as mount(8) says.
        lane: requests pass through the lane in C (fuse/lane.py).
        io_uring: they come by io_uring, if the kernel offers it (native/uring.h).
        fsname: what mount(8) shows as the source.
        allow_other: other users may enter; None: if root mounts.
        security: SELinux words (`context=...`), for the kernel.
        platform: which of an image's platforms, "" for this machine's.
    """

    read_only: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    sync: bool = False
    dirsync: bool = False
    allow_other: bool | None = None
    lane: bool = True
    io_uring: bool = False
    fsname: str | None = None
    security: tuple[str, ...] = ()
    platform: str = ""
    ephemeral: bool = False
    debug: bool = False


@dataclass(slots=True)
class _Parsed:
    """The state of one parse: what the words seen so far said."""

    params: Params = field(default_factory=Params)
    flags: MountFlags = field(default_factory=MountFlags)
    appended: bool = False

    def param(self, **changes: object) -> None:
        self.params = replace(self.params, **changes)  # type: ignore[arg-type]

    def flag(self, **changes: object) -> None:
        self.flags = replace(self.flags, **changes)  # type: ignore[arg-type]


def parse_mount_options(
    text: str, params: Params | None = None, flags: MountFlags | None = None
) -> tuple[Params, MountFlags]:
    """What the option string `text` says; `params` and `flags` hold what no word changes.

    Raises:
        UsageError: naming the word that is unknown, or whose value is.
    """
    parsed = _Parsed(params or Params(), flags or MountFlags())
    for word in split_words(text):
        _parse_word(parsed, word)
    return parsed.params, parsed.flags


def verify(params: Params) -> None:
    """Raise UsageError where options contradict each other.  Kernel: ovl_fs_params_verify()."""
    if params.upperdir is not None and params.workdir is None and not params.read_only:
        raise UsageError("option 'upperdir' needs a 'workdir'")
    if params.metacopy and params.redirect_dir is False:
        # A metacopy file that is renamed finds its data by its redirect only.
        raise UsageError("options 'metacopy=on' and 'redirect_dir=off' contradict each other")
    if params.datadirs and not params.lowerdirs:
        raise UsageError("data-only layers need a layer above them in 'lowerdir'")
    if params.datadirs and params.metacopy is False:
        raise UsageError("data-only layers and 'metacopy=off' contradict each other")
    count = len(params.lowerdirs) + len(params.datadirs)
    if count > MAX_LAYERS:
        raise UsageError(f"option 'lowerdir' has {count} directories, the limit is {MAX_LAYERS}")


def split_words(text: str) -> Iterator[str]:
    """The words of an option string, escapes kept.  Empty words (`ro,,nodev`) mean nothing."""
    word: list[str] = []
    quoted = escaped = False
    for char in text:
        if char == "," and not quoted and not escaped:
            if word:
                yield "".join(word)
            word.clear()
            continue
        word.append(char)
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"' and (quoted or "".join(word[:-1]) in _QUOTED):
            quoted = not quoted
    if word:
        yield "".join(word)


def unescape(text: str) -> str:
    """`text` without its escapes."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def escape(path: bytes) -> str:
    """A path as it has to be written in an option string, so that it means just this path."""
    return re.sub(r"([\\,:])", r"\\\1", os.fsdecode(path))


def _split_colons(text: str) -> list[str]:
    parts = [""]
    at = 0
    while at < len(text):
        if text[at] == "\\":
            parts[-1] += text[at : at + 2]
            at += 2
            continue
        if text[at] == ":":
            parts.append("")
        else:
            parts[-1] += text[at]
        at += 1
    return parts


# ---- words -----------------------------------------------------------------------------------------------------------


def _parse_word(parsed: _Parsed, word: str) -> None:
    name, equals, value = word.partition("=")
    if name in _NOTHING_TO_DO or name.startswith(("x-", "X-")):
        return
    if not equals and name in _FLAGS:
        _FLAGS[name](parsed)
    elif equals and name in _VALUES:
        _VALUES[name](parsed, word, value)
    elif name in _REFUSED:
        raise UsageError(f"option '{printable(word)}' is not supported: {_REFUSED[name]}")
    elif name in _FLAGS:
        raise UsageError(f"option '{name}' takes no value")
    elif name in _VALUES:
        raise UsageError(f"option '{name}' needs a value")
    else:
        raise UsageError(f"unknown mount option '{printable(word)}'")


def _path(word: str, value: str) -> bytes:
    path = os.fsencode(unescape(value))
    if not path or b"\0" in path:
        raise UsageError(f"option '{printable(word)}' should name a directory")
    return path


def _lowerdir(parsed: _Parsed, word: str, value: str) -> None:
    """Kernel: ovl_parse_param_lowerdir()."""
    if parsed.appended:
        raise UsageError("options 'lowerdir' and 'lowerdir+' cannot be combined")
    if not value:
        parsed.param(lowerdirs=(), datadirs=())
        return
    parts = _split_colons(value)
    # "a:b::d1::d2": behind the first "::" come data-only layers, each behind a "::" of its own.
    first = next((at for at, part in enumerate(parts) if not part and 0 < at < len(parts) - 1), len(parts))
    lowers, rest = parts[:first], parts[first:]
    if not all(lowers) or not all(rest[1::2]) or len(rest) % 2:
        raise UsageError(f"option '{printable(word)}' has an empty directory name")
    if any(rest[::2]):
        raise UsageError("option 'lowerdir': a data-only layer ('::') must not stand above a regular one (':')")
    parsed.param(
        lowerdirs=tuple(_path(word, part) for part in lowers), datadirs=tuple(_path(word, part) for part in rest[1::2])
    )


def _lowerdir_add(parsed: _Parsed, word: str, value: str) -> None:
    if parsed.params.lowerdirs and not parsed.appended:
        raise UsageError("options 'lowerdir' and 'lowerdir+' cannot be combined")
    parsed.appended = True
    if parsed.params.datadirs:
        raise UsageError("option 'lowerdir+': a data-only layer must not stand above a regular one")
    parsed.param(lowerdirs=(*parsed.params.lowerdirs, _path(word, value)))


def _datadir_add(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(datadirs=(*parsed.params.datadirs, _path(word, value)))


def _upperdir(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(upperdir=_path(word, value))


def _workdir(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(workdir=_path(word, value))


_Value = Callable[[_Parsed, str, str], None]
_NOTHING: dict[str, object] = {}


def _choice(**choices: dict[str, object] | str) -> _Value:
    """A word whose value is one of `choices`: what it changes in Params, or why it is refused."""

    def parse(parsed: _Parsed, word: str, value: str) -> None:
        value = value.removeprefix('"').removesuffix('"')
        key = f"_{value}" if value.isdigit() else value
        chosen = choices.get(key)
        if chosen is None:
            allowed = ", ".join(choice.lstrip("_") for choice in choices)
            raise UsageError(f"option '{printable(word)}': the value should be one of: {allowed}")
        if isinstance(chosen, str):
            raise UsageError(f"option '{printable(word)}' is not supported: {chosen}")
        parsed.param(**chosen)

    return parse


def _number(word: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) >= 1 << 32:
        raise UsageError(f"option '{printable(word)}': the value should be a number")
    return int(value)


def _seconds(_parsed: _Parsed, word: str, value: str) -> None:
    """`timeout`: how long the kernel keeps what it knows; nothing changes behind our back, so it keeps it for good."""
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]*)?", value):
        raise UsageError(f"option '{printable(word)}': the value should be a number of seconds")


def _squash_uid(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(squash_uid=_number(word, value))


def _squash_gid(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(squash_gid=_number(word, value))


def _mapping(word: str, value: str) -> IdMap:
    parts = value.removeprefix('"').removesuffix('"').split(":")
    if len(parts) % 3 or len(parts) > 3 * 340:  # 340: what a user namespace takes (UID_GID_MAP_MAX_EXTENTS)
        raise UsageError(f"option '{printable(word)}': the value should be HOST:TO:COUNT[:HOST:TO:COUNT...]")
    numbers = [_number(word, part) for part in parts]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _uidmapping(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(uidmapping=_mapping(word, value))


def _gidmapping(parsed: _Parsed, word: str, value: str) -> None:
    parsed.param(gidmapping=_mapping(word, value))


def _text(name: str) -> _Value:
    def parse(parsed: _Parsed, word: str, value: str) -> None:
        text = unescape(value)
        if not text or not text.isprintable():
            raise UsageError(f"option '{printable(word)}': the value should be printable text")
        parsed.flag(**{name: text})

    return parse


def _security(parsed: _Parsed, word: str, value: str) -> None:
    if not value or not word.isprintable():
        raise UsageError(f"option '{printable(word)}' should name an SELinux context")
    parsed.flag(security=(*parsed.flags.security, word))


def _param(**changes: object) -> Callable[[_Parsed], None]:
    return lambda parsed: parsed.param(**changes)


def _flag(**changes: object) -> Callable[[_Parsed], None]:
    return lambda parsed: parsed.flag(**changes)


def _read_only(parsed: _Parsed) -> None:
    parsed.param(read_only=True)
    parsed.flag(read_only=True)


def _read_write(parsed: _Parsed) -> None:
    parsed.param(read_only=False)
    parsed.flag(read_only=False)


def _user(parsed: _Parsed) -> None:
    """mount(8): `user`, `users`, `owner` and `group` imply these."""
    parsed.flag(suid=False, dev=False)


_FLAGS: dict[str, Callable[[_Parsed], None]] = {
    # kernel overlayfs
    "userxattr": _param(userxattr=True),
    "volatile": _param(volatile=True, volatile_mark=True),
    # fuse-overlayfs
    "squash_to_root": _param(squash_uid=0, squash_gid=0),
    "noacl": _param(acl=False),
    # mount(8)
    "ro": _read_only,
    "rw": _read_write,
    "suid": _flag(suid=True),
    "nosuid": _flag(suid=False),
    "dev": _flag(dev=True),
    "nodev": _flag(dev=False),
    "exec": _flag(exec=True),
    "noexec": _flag(exec=False),
    "sync": _flag(sync=True),
    "async": _flag(sync=False),
    "dirsync": _flag(dirsync=True),
    "user": _user,
    "users": _user,
    "owner": _user,
    "group": _user,
    # FUSE
    "allow_other": _flag(allow_other=True),
    # ours
    "ephemeral": _flag(ephemeral=True),
    "debug": _flag(debug=True),
    "lane": _flag(lane=True),
    "no_lane": _flag(lane=False),
    "io_uring": _flag(io_uring=True),
}

_VALUES: dict[str, _Value] = {
    # kernel overlayfs
    "lowerdir": _lowerdir,
    "lowerdir+": _lowerdir_add,
    "datadir+": _datadir_add,
    "upperdir": _upperdir,
    "workdir": _workdir,
    "redirect_dir": _choice(
        on={"redirect_dir": True},
        off={"redirect_dir": False},
        follow={"redirect_dir": False},
        nofollow="redirects that are there are always followed",
    ),
    "metacopy": _choice(on={"metacopy": True}, off={"metacopy": False}),
    # Hard links stay together over copy-up without an index directory, so on is what happens, and off asks for less.
    "index": _choice(on=_NOTHING, off=_NOTHING),
    # Inode numbers are always unique and constant, and equal to d_ino.
    "xino": _choice(on=_NOTHING, off=_NOTHING, auto=_NOTHING),
    "uuid": _choice(
        auto=_NOTHING, off=_NOTHING, null=_NOTHING, on="a FUSE file system cannot choose its statfs(2) f_fsid"
    ),
    "nfs_export": _choice(off=_NOTHING, on="file handles do not survive an unmount"),
    "verity": _choice(
        off=_NOTHING, on="fs-verity digests are not checked", require="fs-verity digests are not checked"
    ),
    # Copied-up data is always synced (auto, strict: when, is our choice); 0 and 1 are fuse-overlayfs's words, where 0
    # leaves no mark behind.
    "fsync": _choice(
        auto=_NOTHING,
        strict=_NOTHING,
        volatile={"volatile": True, "volatile_mark": True},
        _0={"volatile": True, "volatile_mark": False},
        _1={"volatile": False},
    ),
    # fuse-overlayfs
    "squash_to_uid": _squash_uid,
    "squash_to_gid": _squash_gid,
    "squash_to_root": _choice(_0=_NOTHING, _1={"squash_uid": 0, "squash_gid": 0}),
    "uidmapping": _uidmapping,
    "gidmapping": _gidmapping,
    "xattr_permissions": _choice(
        _0={"xattr_permissions": 0},
        _1="security.fuseoverlayfs.override_stat is read by no other tool, use 2",
        _2={"xattr_permissions": 2},
    ),
    "timeout": _seconds,
    "noxattrs": _choice(_0=_NOTHING, _1="extended attributes of lower layers are part of the tree"),
    "noacl": _choice(_0=_NOTHING, _1={"acl": False}),
    "volatile": _choice(_0=_NOTHING, _1={"volatile": True, "volatile_mark": True}),
    # FUSE
    "fsname": _text("fsname"),
    "subtype": _choice(ovlfs=_NOTHING),  # `ovlfs mounts` knows its mounts by it
    # SELinux
    "context": _security,
    "fscontext": _security,
    "defcontext": _security,
    "rootcontext": _security,
    # ours
    "whiteouts": _choice(oci={"oci_whiteouts": True}, kernel={"oci_whiteouts": False}),
    "platform": _text("platform"),
}

_NOTHING_TO_DO = frozenset(
    (
        # For mount(8) and systemd, not for the file system.
        *("defaults", "auto", "noauto", "nofail", "_netdev", "nouser", "nousers", "noowner", "nogroup"),
        *("comment", "uhelper", "helper", "silent", "loud", "mand", "nomand", "iversion", "noiversion"),
        # Times of access are never written: every file of a lower layer that is read would have to be copied up.
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
        *("lazytime", "nolazytime"),
        "symfollow",
        # Always so: the kernel checks permissions.
        "default_permissions",
        # Credentials are the daemon's, the mounter's own, in any case (kernel overlayfs 6.16).
        *("override_creds", "nooverride_creds"),
        # How FUSE and fuse-overlayfs work inside; the tree is the same.
        *("max_read", "threaded", "fast_ino", "fast_ino_check", "writeback", "static_nlink", "clone_fd"),
        *("big_writes", "nonempty", "intr", "large_read"),  # FUSE 2's words, without effect since FUSE 3
    )
)

_REFUSED = {
    "remount": "unmount it and mount it again",
    "bind": "it is not for file systems of this type",
    "move": "it is not for file systems of this type",
    "nosymfollow": "FUSE mounts cannot be made so",
    "allow_root": "use allow_other; the mode of the root directory can keep others out",
    "plugins": "layers come from directories and images only",
    "ino32_t": "inode numbers have 64 bits",
    "auto_unmount": "a dead mount is removed by the next mount, or by `ovlfs umount`",
}
