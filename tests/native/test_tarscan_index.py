"""The index image: what it answers when it is whole, and that it answers when it is not."""

import gc
import mmap
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tarblocks import END, at, directory, file, hard_link, header, image, index, pax, symlink

from ovlfs._native import Index, TarScanner
from ovlfs.layer.base import What

PARTS = [
    *(file(b"d%d/f%d" % (i % 5, i), b"x" * i) for i in range(40)),
    hard_link(b"d1/h", b"d0/f0"),
    hard_link(b"below", b"lower/file"),
    symlink(b"s", b"target"),
    file(b"d2/.wh.gone"),
    pax((b"SCHILY.xattr.user.a", b"value"), (b"SCHILY.xattr.user.b", b"")),
    directory(b"e"),
    pax((b"GNU.sparse.size", b"9000"), (b"GNU.sparse.map", b"0,100,5000,100")),
    file(b"sparse", b"y" * 200),
]


def ask_everything(ix: Index) -> int:
    """Every question about every inode; how many answers were ValueError (damage)."""
    damaged = 0
    names = [b"f0", b"h", b"s", b"d1", b"", b"x" * 300]
    for ref in [*range(60), 2**32 - 1]:
        calls: list[tuple[Callable[..., object], tuple[int | bytes, ...]]] = [
            (ask, (ref,)) for ask in (ix.list, ix.attr, ix.readlink, ix.xattrs, ix.links, ix.extents, ix.flags)
        ]
        calls += [(ix.lookup, (ref, name)) for name in names]
        for ask, arguments in calls:
            try:
                ask(*arguments)
            except ValueError:
                damaged += 1
            except OSError:
                pass  # the question does not fit the inode
    return damaged


def test_index_answers_agree_with_each_other() -> None:
    """What list names, lookup finds; what lookup finds, links leads back to."""
    ix = index(*PARTS)

    for name, what in ix.list(0):
        node = at(ix, name)
        assert node.what == what
        if what not in (What.WHITEOUT, What.LINK_BELOW):
            assert name in ix.links(node.ref)
    assert ix.counts() == (42, 7, 1, 0, sum(range(40)) + 9000)
    assert ix.xattrs(at(ix, b"e").ref) == {b"user.a": b"value", b"user.b": b""}
    assert sorted(ix.links(at(ix, b"d1/h").ref)) == [b"d0/f0", b"d1/h"]
    assert ix.links(0) == [b""]
    assert ix.lookup(0, b"no") is None


def test_index_questions_that_do_not_fit_the_inode() -> None:
    """ENOTDIR and EINVAL, as the kernel says it."""
    ix = index(*PARTS)
    plain = at(ix, b"d0/f0").ref

    with pytest.raises(NotADirectoryError):
        ix.lookup(plain, b"x")
    with pytest.raises(NotADirectoryError):
        ix.list(plain)
    with pytest.raises(OSError, match="Invalid argument"):
        ix.readlink(plain)
    with pytest.raises(OSError, match="Invalid argument"):
        ix.extents(0)
    with pytest.raises(ValueError, match="damaged"):
        ix.attr(1000)
    with pytest.raises(OverflowError):
        ix.attr(2**32)
    with pytest.raises(TypeError):
        ix.lookup(0, "x")  # type: ignore[arg-type]


def test_index_in_a_mapping_stays_usable_after_the_name_is_dropped(tmp_path: Path) -> None:
    """The index holds on to the buffer it lies in."""
    (tmp_path / "ix").write_bytes(image(*PARTS))
    with (tmp_path / "ix").open("rb") as stored:
        mapping = mmap.mmap(stored.fileno(), 0, access=mmap.ACCESS_READ)
    ix = Index(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    del mapping

    assert at(ix, b"s").what == What.OTHER


def test_index_in_a_cycle_keeps_its_mapping_until_it_is_gone(tmp_path: Path) -> None:
    """The collector clears a memoryview that it finds in a cycle, if it may; the index would read unmapped memory."""
    path = tmp_path / "index"
    path.write_bytes(image(*PARTS) + bytes(32))

    class Holder:
        def __init__(self) -> None:
            with path.open("rb") as file:
                self.view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))[:-32]
            self.index = Index(self.view)
            self.me = self

        def __del__(self) -> None:
            said.append(at(self.index, b"s").what)

    said: list[int] = []
    Holder()
    gc.collect()
    assert said == [What.OTHER]
    gc.collect()


def test_index_at_any_alignment_reads_the_same() -> None:
    """A buffer may begin anywhere."""
    stored = image(*PARTS)

    for shift in range(1, 8):
        ix = Index(memoryview(bytes(shift) + stored)[shift:])
        assert ask_everything(ix) == ask_everything(Index(stored))
        assert ix.list(0) == Index(stored).list(0)


@pytest.mark.parametrize("cut", [0, 1, 100, 191, 192, 1000, -1])
def test_index_cut_short_is_refused(cut: int) -> None:
    """Also without the checksum."""
    with pytest.raises(ValueError, match="index"):
        Index(image(*PARTS)[:cut], verify=False)


def test_index_with_any_bit_flipped_is_refused_by_its_checksum() -> None:
    """The checksum guards against accidents."""
    stored = image(*PARTS)

    for position in range(0, len(stored), 7):
        bad = bytearray(stored)
        bad[position] ^= 0x10
        with pytest.raises(ValueError, match="index"):
            Index(bad)


def test_index_that_is_hostile_never_crashes() -> None:
    """Bytes changed on purpose, the checksum not asked: damage is an error or another answer, never a crash."""
    stored = image(*PARTS)
    dice = random.Random(7)
    damaged = 0

    for _ in range(1500):
        bad = bytearray(stored)
        for _ in range(dice.randrange(1, 5)):
            position = dice.randrange(8, dice.choice([192, len(bad)]))
            bad[position] = dice.choice([0, 1, 0x7F, 0xFF, dice.randrange(256)])
        try:
            ix = Index(bad, verify=False)
        except ValueError:
            continue
        damaged += ask_everything(ix) > ask_everything(Index(stored))
    assert damaged > 50


def test_index_that_changes_while_open_never_crashes() -> None:
    """A shared mapping may be written to by its owner at any time."""
    stored = bytearray(image(*PARTS))
    ix = Index(stored)
    dice = random.Random(8)

    for _ in range(300):
        for _ in range(20):
            stored[dice.randrange(len(stored))] = dice.randrange(256)
        ask_everything(ix)


def test_index_can_be_read_by_many_threads() -> None:
    """It never changes."""
    ix = index(*PARTS)
    expected = ask_everything(ix)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(ask_everything(ix))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [expected] * 4


def test_scan_of_300_000_files_in_one_directory_is_linear_and_small() -> None:
    """At most 120 bytes per file with its name, and no step that grows with the square."""
    count = 300_000
    block = header(b"d/file-0000000.txt")
    rest = sum(block[:148]) + sum(block[156:]) + 8 * 32 - sum(b"0000000")

    def numbered(i: int) -> bytes:
        digits = b"%07d" % i
        return block[:7] + digits + block[14:148] + b"%06o\0 " % (rest + sum(digits)) + block[156:]

    order = list(range(count))
    random.Random(1).shuffle(order)
    stream = b"".join(numbered(i) for i in order) + END
    started = time.monotonic()
    scanner = TarScanner()
    scanner.feed(stream)
    stored = scanner.finish()
    seconds = time.monotonic() - started
    started = time.monotonic()
    ix = Index(stored)
    open_seconds = time.monotonic() - started

    assert len(stored) / count < 120
    assert seconds < 6
    assert open_seconds < 0.5
    assert ix.counts()[0] == count
    assert [name for name, _ in ix.list(1)] == [b"file-%07d.txt" % i for i in range(count)]
