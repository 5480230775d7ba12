"""What is locked, in which order, and what need not be.

All handlers run in one thread under trio.  Code between two awaits is atomic: nothing else runs meanwhile.  The
functions of overlay/ never await, so each of them is atomic as a whole, and the tree needs no lock.

One thing awaits in the middle: the copying of a file's data (copy_up.begin ... run in a thread ... finish).  Whoever
needs an inode to stay as it is over such an await, or must not start before it is over, takes that inode's lock:

    1. inode locks, by ascending nodeid when there are two (rename, exchange)
    2. nothing else: no lock is ever taken while holding one for another purpose

Taken by: open for writing, truncate, setattr, setxattr, removexattr, link (the inode), rename (the moved inodes).
Not by: lookup, readdir, read, write (its handle exists, so the copy is over), create, unlink, mkdir, ....  A name
may be removed or created beside a copy-up that is under way; copy_up.finish() looks at the names that are there then.

An `await` that is put into a handler splits it in two: look through this list again.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ovlfs.ids import NodeId


class InodeLocks:
    """One lock per inode, made when it is wanted."""

    def __init__(self) -> None:
        self._locks: dict[NodeId, tuple[trio.Lock, int]] = {}

    @asynccontextmanager
    async def holding(self, *nodeids: NodeId) -> AsyncIterator[None]:
        """Hold the locks of these inodes."""
        wanted = sorted(set(nodeids))
        held: list[trio.Lock] = []
        try:
            for nodeid in wanted:
                lock, users = self._locks.get(nodeid, (None, 0))
                lock = lock or trio.Lock()
                self._locks[nodeid] = (lock, users + 1)
            for nodeid in wanted:
                lock = self._locks[nodeid][0]
                try:
                    lock.acquire_nowait()  # the usual case; no checkpoint, so nothing changes under the caller
                except trio.WouldBlock:
                    await lock.acquire()
                held.append(lock)
            yield
        finally:
            for lock in held:
                lock.release()
            for nodeid in wanted:
                lock, users = self._locks[nodeid]
                if users == 1:
                    del self._locks[nodeid]
                else:
                    self._locks[nodeid] = (lock, users - 1)
