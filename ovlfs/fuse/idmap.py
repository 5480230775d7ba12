"""Under which owner is an inode shown, and as which is it stored?

fuse-overlayfs's `uidmapping=STORED:SHOWN:LENGTH[:...]` and `gidmapping=` shift ids between the layers and the mount, so
that one image serves several user namespaces without a chown; `squash_to_root`, `squash_to_uid=` and `squash_to_gid=`
show everything as one owner's; what chown(2) says is stored, and not seen.  This is a matter of what the protocol
shows: overlay/ knows nothing of it.  An id without a mapping is shown as the overflow id, and cannot be given
(EOVERFLOW).

Not mapped: ids inside POSIX ACLs.
"""

import errno
import os
from dataclasses import dataclass

from ovlfs.overlay.params import IdMap, Params

OVERFLOW_ID = 65534
"""fs/proc: /proc/sys/kernel/overflowuid, which nobody changes."""


@dataclass(frozen=True, slots=True)
class _One:
    """One kind of ids, users or groups."""

    ranges: IdMap
    squash: int | None

    def shown(self, stored: int) -> int:
        if self.squash is not None:
            return self.squash
        if not self.ranges:
            return stored
        for first, to, length in self.ranges:
            if first <= stored < first + length:
                return to + stored - first
        return OVERFLOW_ID

    def stored(self, shown: int) -> int:
        if not self.ranges:
            return shown
        for first, to, length in self.ranges:
            if to <= shown < to + length:
                return first + shown - to
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))


class IdMapping:
    """The mapping of one mount."""

    def __init__(self, params: Params) -> None:
        self.users = _One(params.uidmapping, params.squash_uid)
        self.groups = _One(params.gidmapping, params.squash_gid)

    @property
    def is_identity(self) -> bool:
        """Whether every id is shown as it is stored."""
        return all(one.squash is None and not one.ranges for one in (self.users, self.groups))
