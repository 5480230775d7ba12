"""What the entries of a layer tar mean together: duplicates, whiteouts, links, paths."""

import pytest
from tarblocks import (
    DIRECTORY,
    IMPLIED,
    LINK_BELOW,
    OPAQUE,
    OTHER,
    WHITEOUT,
    at,
    directory,
    file,
    find,
    gnu_long,
    hard_link,
    header,
    index,
    pax,
    symlink,
    tree,
)

from ovlfs._native import Index, TarError


def size(ix: Index, path: bytes) -> int:
    return ix.attr(at(ix, path).ref)[5]


def fails(*parts: bytes, rule: str, whiteouts: bool = True) -> TarError:
    with pytest.raises(TarError, match=rule) as caught:
        index(*parts, whiteouts=whiteouts)
    return caught.value


# ---- whiteouts ----


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_whiteout_beside_file_of_same_layer_keeps_file(order: tuple[int, int]) -> None:
    """A whiteout hides the layers below only, whatever the order."""
    parts = [file(b".wh.a"), file(b"a", b"new")]
    ix = index(*(parts[i] for i in order))

    assert tree(ix) == {b"a": OTHER}
    assert size(ix, b"a") == 3


@pytest.mark.parametrize(
    "parts",
    [
        [file(b".wh.d"), directory(b"d/"), file(b"d/y")],
        [directory(b"d/"), file(b"d/y"), file(b".wh.d")],
        [file(b".wh.d"), file(b"d/y")],
        [file(b"d/y"), file(b".wh.d")],
    ],
)
def test_whiteout_beside_directory_of_same_layer_makes_it_opaque(parts: list[bytes]) -> None:
    """`.wh.d` and `d`: what is below d is gone, what the layer has in d stays; d may be implied."""
    ix = index(*parts)

    assert tree(ix) == {b"d": DIRECTORY, b"d/y": OTHER}
    assert at(ix, b"d").flags & OPAQUE


def test_whiteout_alone_hides_name() -> None:
    """`.wh.a` without `a` is a whiteout of a, and no name of its own."""
    ix = index(file(b"d/.wh.a"))

    assert tree(ix) == {b"d": DIRECTORY, b"d/a": WHITEOUT}
    assert at(ix, b"d/a").ref == 0
    assert find(ix, b"d/.wh.a") is None
    assert ix.counts()[:4] == (0, 2, 1, 0)


@pytest.mark.parametrize("first", [True, False])
def test_opaque_marker_in_any_order_marks_directory(first: bool) -> None:
    """`.wh..wh..opq` hides everything below its directory, wherever it stands."""
    marker = [file(b"d/.wh..wh..opq")]
    rest = [directory(b"d/"), file(b"d/y")]
    ix = index(*(marker + rest if first else rest + marker))

    assert tree(ix) == {b"d": DIRECTORY, b"d/y": OTHER}
    assert at(ix, b"d").flags == OPAQUE
    assert ix.counts()[3] == 1


def test_opaque_marker_at_root_marks_root() -> None:
    """`.wh..wh..opq` at the top hides all layers below."""
    assert index(file(b".wh..wh..opq")).flags(0) & OPAQUE


def test_opaque_marker_alone_makes_implied_empty_directory() -> None:
    """On what is a file below, the marker leaves an empty directory."""
    ix = index(file(b"p/.wh..wh..opq"))

    assert tree(ix) == {b"p": DIRECTORY}
    assert at(ix, b"p").flags == OPAQUE | IMPLIED


def test_whiteout_under_opaque_directory_is_dropped() -> None:
    """Nothing below shows there, also deeper down, so there is nothing to hide."""
    ix = index(file(b"d/.wh..wh..opq"), file(b"d/.wh.a"), file(b"d/e/.wh.b"))

    assert tree(ix) == {b"d": DIRECTORY, b"d/e": DIRECTORY}


def test_whiteout_of_directory_and_within_it_leaves_empty_opaque_directory() -> None:
    """`.wh.d` and `d/.wh.a`: an empty d."""
    ix = index(file(b".wh.d"), file(b"d/.wh.a"))

    assert tree(ix) == {b"d": DIRECTORY}
    assert at(ix, b"d").flags & OPAQUE


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b"d/.wh.", b".wh./", b"d/.wh../", b".wh.../"])
def test_whiteout_without_name_is_rejected(name: bytes) -> None:
    """`.wh.`, `.wh..`, `.wh...` name nothing, the directory itself, its parent."""
    fails(file(name), rule="a whiteout must have a name")


@pytest.mark.parametrize("kind", [b"0", b"1", b"2", b"3", b"5", b"6"])
def test_whiteout_of_any_type_is_judged_by_name(kind: bytes) -> None:
    """Builders have written whiteouts as directories, symlinks and hard links."""
    assert tree(index(header(b".wh.a", kind, link=b"srv/zoo"))) == {b"a": WHITEOUT}


def test_whiteout_with_data_is_skipped_over() -> None:
    """A whiteout that is not empty is a whiteout."""
    assert tree(index(file(b".wh.a", b"x" * 700), file(b"b"))) == {b"a": WHITEOUT, b"b": OTHER}


@pytest.mark.parametrize("name", [b"d/.wh.x/file", b".wh.x/file", b"a/.wh..wh..opq/child", b".wh..wh.zzz/f"])
def test_whiteout_as_parent_is_rejected(name: bytes) -> None:
    """A whiteout has no children."""
    error = fails(file(name), rule="must not be a directory of other entries")

    assert error.name == name


def test_aufs_names_are_hidden_but_link_data_is_found() -> None:
    """`.wh..wh.plnk` holds what hard links lead to; it and its like are not seen."""
    ix = index(
        directory(b".wh..wh.plnk/"),
        file(b".wh..wh.plnk/12.34", b"data"),
        hard_link(b"a", b".wh..wh.plnk/12.34"),
        hard_link(b"b", b".wh..wh.plnk/12.34"),
        file(b".wh..wh.aufs"),
        directory(b".wh..wh.orph/"),
        file(b".wh..wh.other"),
    )

    assert tree(ix) == {b"a": OTHER, b"b": OTHER}
    assert ix.attr(at(ix, b"a").ref)[1] == 2
    assert size(ix, b"b") == 4


def test_whiteouts_off_takes_names_as_they_are() -> None:
    """In a root filesystem tar `.wh.` names are plain names."""
    ix = index(file(b".wh.a"), file(b".wh."), file(b"d/.wh..wh..opq"), file(b".wh.x/f"), whiteouts=False)

    assert set(tree(ix)) == {b".wh.a", b".wh.", b"d", b"d/.wh..wh..opq", b".wh.x", b".wh.x/f"}
    assert not at(ix, b"d").flags & OPAQUE


def test_char_device_0_0_is_a_plain_node() -> None:
    """The kernel's whiteout is not a whiteout in a tar."""
    ix = index(header(b"null", b"3"))

    assert at(ix, b"null").what == OTHER
    assert ix.attr(at(ix, b"null").ref)[0] == 0o020644


# ---- names and parents ----


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"../../x", b"x"),
        (b"../" * 30 + b"x", b"x"),
        (b"/abs/x", b"abs/x"),
        (b"a/../b", b"b"),
        (b".//a//g", b"a/g"),
        (b"./a", b"a"),
        (b"//a", b"a"),
        (b"a/.", b"a"),
    ],
)
def test_name_that_leads_out_is_clamped_to_root(name: bytes, path: bytes) -> None:
    """The root's parent is the root; absolute names start there too."""
    assert at(index(file(name)), path).what == OTHER


@pytest.mark.parametrize("name", [b"./", b".", b"/", b"//", b"./.", b"../"])
def test_root_entry_sets_attributes_of_root(name: bytes) -> None:
    """`./` describes the root directory."""
    ix = index(directory(name, mode=0o1700, uid=5, gid=6, mtime=7))

    assert ix.flags(0) == 0
    assert ix.attr(0) == (0o041700, 2, 5, 6, 0, 4096, 8, 7 * 10**9, 7 * 10**9, 7 * 10**9)


@pytest.mark.parametrize("name", [b".", b"./", b"/", b"..", b"a/.."])
@pytest.mark.parametrize("kind", [b"0", b"1", b"2", b"3", b"6"])
def test_root_as_non_directory_is_rejected(name: bytes, kind: bytes) -> None:
    """Nothing may take the root's place."""
    fails(header(name, kind, link=b"x"), rule="the root must be a directory")


def test_empty_name_is_rejected() -> None:
    """An entry has a name."""
    fails(header(b""), rule="a name must not be empty")


def test_name_with_nul_in_pax_path_is_rejected() -> None:
    """A C reader would see another name than ours."""
    fails(pax((b"path", b"a\0b")), file(b"x"), rule="NUL")


@pytest.mark.parametrize("name", [b"new\nline", b"\x1b[31m", b"latin1-\xe9", b"\xe2\x80\xae"])
def test_name_of_any_bytes_is_kept(name: bytes) -> None:
    """Names are bytes."""
    assert tree(index(pax((b"path", name)), file(b"x"))) == {name: OTHER}


@pytest.mark.parametrize(
    ("name", "rule"),
    [(b"d/" + b"n" * 256, "255 bytes"), (b"n" * 256 + b"/f", "255 bytes"), (b"abcde/" * 700, "4096 bytes")],
)
def test_name_too_long_is_rejected(name: bytes, rule: str) -> None:
    """NAME_MAX for a component, PATH_MAX for a path; the error names the entry."""
    for before in (pax((b"path", name)), gnu_long(b"L", name)):
        error = fails(before, file(b"x"), rule=f"{rule} .ENAMETOOLONG")

        assert error.name == name


def test_name_of_255_bytes_and_path_of_4096_is_kept() -> None:
    """The limits themselves are legal."""
    path = b"/".join([b"n" * 255] * 15) + b"/" + b"m" * 255 + b"/"

    assert len(path) == 4096
    assert at(index(pax((b"path", path)), directory(b"x")), path[:-1]).what == DIRECTORY


def test_symlink_target_too_long_is_rejected() -> None:
    """A target has at most 4095 bytes."""
    at(index(pax((b"linkpath", b"t" * 4095)), symlink(b"s", b"")), b"s")
    fails(pax((b"linkpath", b"t" * 4096)), symlink(b"s", b""), rule="4095 bytes .ENAMETOOLONG")


def test_symlink_without_target_is_rejected() -> None:
    """A symlink leads somewhere."""
    fails(symlink(b"s", b""), rule="must have a target")


def test_parent_without_entry_is_implied() -> None:
    """`a/b` makes `a`, 0755 root:root from 1970, and says that nobody described it; `a/` later describes it."""
    ix = index(file(b"a/b/c"))

    assert at(ix, b"a/b").flags == IMPLIED
    assert ix.attr(at(ix, b"a").ref)[:5] == (0o040755, 3, 0, 0, 0)
    assert ix.attr(at(ix, b"a").ref)[8] == 0
    assert at(index(file(b"a/b/c"), directory(b"a")), b"a").flags == 0


def test_parent_symlink_of_same_layer_is_followed_within_root() -> None:
    """`ln -> /real`, `ln/x`: real/x, and no further up than the root."""
    for target in (b"real", b"/real", b"../../real", b"./d/../real/"):
        ix = index(symlink(b"ln", target), directory(b"d"), file(b"ln/x"))
        assert at(ix, b"real/x").what == OTHER
        assert at(ix, b"real").flags == IMPLIED
        assert at(ix, b"ln").what == OTHER


def test_parent_symlink_to_root_keeps_entry_within() -> None:
    """`esc -> /`, `esc/x`: the layer's own x."""
    assert set(tree(index(symlink(b"esc", b"/"), file(b"esc/x")))) == {b"esc", b"x"}


def test_whiteout_through_symlinked_parent_follows_it() -> None:
    """`ln -> real` in the same layer, `ln/.wh.x`: hides real/x."""
    assert tree(index(symlink(b"ln", b"real"), file(b"ln/.wh.x")))[b"real/x"] == WHITEOUT


def test_parent_symlink_loop_is_rejected() -> None:
    """A loop has no end; a chain of 40 has."""
    fails(symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x"), rule="40 symlinks")
    fails(symlink(b"a", b"a/a"), file(b"a/x"), rule="40 symlinks")
    chain = [symlink(b"l%d" % i, b"l%d" % (i + 1)) for i in range(41)]
    assert at(index(*chain, file(b"l1/x")), b"l41/x").what == OTHER
    fails(*chain, file(b"l0/x"), rule="40 symlinks")


def test_parent_symlink_growth_is_bounded() -> None:
    """Targets that name the link again and again do not make the walk endless."""
    parts = [pax((b"linkpath", b"d/" * 2000 + b"m")), symlink(b"l", b""), directory(b"d")]
    deep = [pax((b"linkpath", b"../d/" * 800 + b"k%d" % (i + 1))) + symlink(b"d/k%d" % i, b"") for i in range(30)]
    fails(*parts, *deep, file(b"d/k0/x"), rule="8192 names")
    doubling = [pax((b"linkpath", b"l/" * 2000)) + symlink(b"l", b"")]
    fails(*doubling, file(b"l/x"), rule="16384 bytes|40 symlinks")


def test_parent_symlink_to_file_is_rejected() -> None:
    """A symlink that leads to a file is no directory, and the file is not to be lost for it."""
    fails(file(b"f"), symlink(b"l", b"f"), file(b"l/x"), rule="must lead to a directory")


def test_symlink_target_that_is_a_whiteout_is_no_parent() -> None:
    """Neither directly nor through a symlink does `.wh.` become a directory."""
    fails(symlink(b"l", b".wh.x"), file(b"l/f"), rule="must not be a directory of other entries")


# ---- duplicates ----


def test_duplicate_file_last_wins() -> None:
    """The later entry is what there is."""
    assert size(index(file(b"a", b"1"), file(b"a", b"22")), b"a") == 2


def test_duplicate_directory_replaces_attributes_and_keeps_children() -> None:
    """Directory over directory: the one case that removes nothing."""
    ix = index(pax((b"SCHILY.xattr.user.a", b"1")), directory(b"d", 0o700), file(b"d/f"), directory(b"d", 0o711, uid=3))

    assert tree(ix) == {b"d": DIRECTORY, b"d/f": OTHER}
    assert ix.attr(at(ix, b"d").ref)[:4] == (0o040711, 2, 3, 0)
    assert ix.xattrs(at(ix, b"d").ref) == {}
    assert at(ix, b"d").flags == 0


def test_file_over_directory_removes_subtree() -> None:
    """Everything else removes what was there."""
    assert tree(index(file(b"d/e/f"), file(b"d"))) == {b"d": OTHER}
    assert tree(index(file(b"d/e/f"), file(b"d"), file(b"d/g"))) == {b"d": DIRECTORY, b"d/g": OTHER}


@pytest.mark.parametrize("again", [directory(b"d"), file(b"d/x")])
def test_directory_over_file_of_same_layer_is_opaque(again: bytes) -> None:
    """The file had replaced what is below, so nothing of that comes back."""
    assert at(index(file(b"d"), again), b"d").flags & OPAQUE


def test_directory_over_symlink_replaces_it() -> None:
    """The last component of a name is never followed."""
    assert tree(index(symlink(b"lib", b"usr/lib"), directory(b"lib"), file(b"lib/x"))) == {
        b"lib": DIRECTORY,
        b"lib/x": OTHER,
    }


def test_symlink_replaced_after_use_as_parent_is_not_followed_again() -> None:
    """Each entry sees what stands there when it comes."""
    ix = index(symlink(b"l", b"a"), file(b"l/1"), symlink(b"l", b"b"), file(b"l/2"), directory(b"l"), file(b"l/3"))

    assert {p for p in tree(ix) if tree(ix)[p] == OTHER} == {b"a/1", b"b/2", b"l/3"}


def test_duplicates_by_the_thousand_leave_one_name() -> None:
    """A path that changes its type 3000 times costs 3000 entries, not 3000 squared."""
    kinds = [file(b"d/x", b"1"), directory(b"d/x"), file(b"d/x/y/z"), symlink(b"d/x", b"t"), file(b"d")]
    ix = index(*(kinds[i % 5] for i in range(15000)))

    assert tree(ix) == {b"d": OTHER}


# ---- hard links ----


@pytest.mark.parametrize("target", [b"d/a", b"/d/a", b"../../d/a", b"./d//a", b"ln/a", b"ln/../d/../d/a"])
def test_hard_link_target_is_found_from_root(target: bytes) -> None:
    """Targets are relative to the root, clamped to it, and may lead through symlinked directories."""
    ix = index(file(b"d/a", b"xyz"), symlink(b"ln", b"d"), hard_link(b"b", target))

    assert at(ix, b"b").ref == at(ix, b"d/a").ref
    assert ix.attr(at(ix, b"b").ref)[1] == 2
    assert sorted(ix.links(at(ix, b"b").ref)) == [b"b", b"d/a"]


def test_hard_link_entry_with_own_attributes_last_wins() -> None:
    """Mode, owner and time of the link are the inode's from then on."""
    ix = index(file(b"a", b"x", uid=1), hard_link(b"b", b"a", mode=0o4711, uid=2, gid=3, mtime=4))

    assert ix.attr(at(ix, b"a").ref)[:4] == (0o104711, 2, 2, 3)
    assert ix.attr(at(ix, b"a").ref)[8] == 4 * 10**9


def test_hard_link_to_symlink_is_legal() -> None:
    """The link is another name of the symlink itself."""
    ix = index(symlink(b"s", b"t"), hard_link(b"b", b"s"))

    assert ix.readlink(at(ix, b"b").ref) == b"t"
    assert ix.attr(at(ix, b"b").ref)[:2] == (0o120777, 2)


def test_hard_link_outlives_replaced_target() -> None:
    """The link holds the inode that was there when it was made."""
    ix = index(file(b"a", b"old"), hard_link(b"b", b"a"), file(b"a", b"newer"))

    assert size(ix, b"b") == 3
    assert ix.attr(at(ix, b"b").ref)[1] == 1
    assert size(index(file(b"d/a", b"old"), hard_link(b"b", b"d/a"), file(b"d")), b"b") == 3


def test_hard_link_replaces_the_directory_around_its_target() -> None:
    """`d -> d/a`: the inode stays, the directory goes."""
    assert tree(index(file(b"d/a", b"old"), hard_link(b"d", b"d/a"))) == {b"d": OTHER}


@pytest.mark.parametrize("target", [b"d", b"d/", b"/", b".", b"d/e"])
def test_hard_link_to_directory_is_rejected(target: bytes) -> None:
    """Directories have one name."""
    fails(directory(b"d"), file(b"d/e/f"), hard_link(b"b", target), rule="must not lead to a directory")


@pytest.mark.parametrize("before", [[], [file(b"d/b")]])
def test_hard_link_to_itself_is_rejected(before: list[bytes]) -> None:
    """A link needs something to link to."""
    fails(*before, hard_link(b"d/b", b"./d/b"), rule="must not lead to itself")


def test_hard_link_without_target_is_rejected() -> None:
    """A link needs something to link to."""
    fails(hard_link(b"b", b""), rule="must have a target")


def test_hard_link_beneath_file_is_rejected() -> None:
    """A file of this layer has nothing beneath it, here or below."""
    fails(file(b"f"), hard_link(b"b", b"f/x"), rule="must not lie beneath a non-directory")


@pytest.mark.parametrize("target", [b"d/.wh.x", b".wh.x", b".wh..wh.plnk/1"])
def test_hard_link_to_whiteout_is_rejected(target: bytes) -> None:
    """A whiteout is no inode."""
    fails(hard_link(b"b", target), rule="whiteout")


def test_hard_link_to_lower_path_is_recorded() -> None:
    """What this layer does not have, the layers below may: the normalised path is kept."""
    ix = index(symlink(b"ln", b"real"), hard_link(b"b", b"../ln/./sub/f"), hard_link(b"c", b"b"))

    assert at(ix, b"b") == (LINK_BELOW, 0, 0, b"real/sub/f")
    assert at(ix, b"c") == at(ix, b"b")
    assert find(ix, b"real") is None


def test_hard_link_before_target_remembers_forward_fallback() -> None:
    """If the target comes later in the layer, the link knows it; a directory is no fallback."""
    ix = index(hard_link(b"b", b"d/a"), file(b"d/a", b"x"), hard_link(b"c", b"e"), directory(b"e"))

    assert at(ix, b"b") == (LINK_BELOW, at(ix, b"d/a").ref, 0, b"d/a")
    assert at(ix, b"c").ref == 0


def test_hard_link_forward_chain_and_cycle() -> None:
    """A chain of forward links leads to the file at its end, a cycle nowhere."""
    chain = [hard_link(b"l%d" % i, b"l%d" % (i + 1)) for i in range(2000)]
    ix = index(*chain, file(b"l2000"))
    assert at(ix, b"l0").ref == at(ix, b"l2000").ref

    ix = index(hard_link(b"a", b"b"), hard_link(b"b", b"c"), hard_link(b"c", b"a"))
    assert all(at(ix, name).ref == 0 for name in (b"a", b"b"))


def test_regular_entry_with_linkname_is_a_file() -> None:
    """A link name that an entry's type has no use for is ignored."""
    ix = index(header(b"a", b"0", link=b"srv/zoo"))

    assert ix.attr(at(ix, b"a").ref)[0] == 0o100644


# ---- size ----


def test_hard_links_by_the_hundred_thousand() -> None:
    """One inode, 100 001 names."""
    ix = index(file(b"a"), *(hard_link(b"h%d" % i, b"a") for i in range(100_000)))

    assert ix.attr(at(ix, b"h7").ref)[1] == 100_001
    assert len(ix.links(at(ix, b"a").ref)) == 100_001


def test_directories_2000_deep() -> None:
    """Depth costs memory, not stack."""
    ix = index(pax((b"path", b"d/" * 2000 + b"f")), file(b"x"))

    ref = 0
    for _ in range(2000):
        found = ix.lookup(ref, b"d")
        assert found is not None
        ref = found[1]
    found = ix.lookup(ref, b"f")
    assert found is not None
    assert ix.links(found[1]) == [b"d/" * 2000 + b"f"]


def test_directories_deeper_than_2048_are_rejected() -> None:
    """Symlinks make paths longer than any name; there is an end."""
    deep = [pax((b"path", b"a/" * 1500)), directory(b"x"), pax((b"linkpath", b"a/" * 1500)), symlink(b"l", b"")]
    fails(*deep, pax((b"path", b"l/" + b"b/" * 600)), directory(b"x"), rule="2048 deep")


def test_directory_nlink_counts_subdirectories() -> None:
    """2, and one for each `..`."""
    ix = index(file(b"d/f"), directory(b"d/a"), file(b"d/b/c"))

    assert ix.attr(at(ix, b"d").ref)[1] == 4
    assert ix.attr(0)[1] == 3


def test_directory_lists_names_in_byte_order() -> None:
    """Sorted, shorter first, high bytes last."""
    names = [b"b", b"a", b"aa", b"\xff", b"a-long-name-2", b"a-long-name-1", b"a\x01"]
    ix = index(*(file(name) for name in names))

    assert [name for name, _ in ix.list(0)] == sorted(names)
