"""The option string: every word honoured or refused by name."""

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovlfs.errors import UsageError
from ovlfs.overlay import params as params_module
from ovlfs.overlay.params import MountFlags, Params, escape, parse_mount_options, split_words, unescape, verify

PATHS = st.binary(min_size=1, max_size=40).filter(lambda raw: b"\0" not in raw)


def parsed(text: str) -> Params:
    return parse_mount_options(text)[0]


def flags(text: str) -> MountFlags:
    return parse_mount_options(text)[1]


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_mount_options(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_the_defaults() -> None:
    assert parse_mount_options("") == (Params(), MountFlags())


def test_image_mounts_are_nosuid_nodev_unless_asked() -> None:
    assert not flags("").suid
    assert not flags("").dev
    assert flags("suid,dev") == MountFlags(suid=True, dev=True)


def test_lowerdirs_are_topmost_first() -> None:
    assert parsed("lowerdir=/a:/b:c").lowerdirs == (b"/a", b"/b", b"c")


def test_lowerdir_plus_appends() -> None:
    assert parsed("lowerdir+=/a,lowerdir+=/b:c").lowerdirs == (b"/a", b"/b:c")


@pytest.mark.parametrize("text", ["lowerdir=a,lowerdir+=b", "lowerdir+=b,lowerdir=a"])
def test_lowerdir_and_lowerdir_plus_cannot_be_combined(text: str) -> None:
    assert "cannot be combined" in refusal(text)


@pytest.mark.parametrize("text", ["lowerdir=a:b::c::d", "lowerdir+=a,lowerdir+=b,datadir+=c,datadir+=d"])
def test_data_only_layers_stand_below_all_others(text: str) -> None:
    """Kernel: overlayfs.rst, "Data-only lower layers"."""
    params, _ = parse_mount_options(text)
    assert params.lowerdirs == (b"a", b"b")
    assert params.datadirs == (b"c", b"d")


@pytest.mark.parametrize(
    "text", ["lowerdir=::a", "lowerdir=a::", "lowerdir=a:::b", "lowerdir=a::b:c", "lowerdir+=a,datadir+=b,lowerdir+=c"]
)
def test_data_only_layers_in_the_wrong_place_are_refused(text: str) -> None:
    """There is something above them, and nothing regular below."""
    refusal(text)


@pytest.mark.parametrize("text", ["lowerdir=:a", "lowerdir=a:", "lowerdir=a:b:", "upperdir=", "workdir=", "lowerdir+="])
def test_empty_names_are_refused(text: str) -> None:
    refusal(text)


def test_an_empty_lowerdir_forgets_the_earlier_ones() -> None:
    assert parsed("lowerdir=a:b,lowerdir=,lowerdir=c").lowerdirs == (b"c",)


def test_escapes_keep_colons_commas_and_backslashes() -> None:
    found = parsed(r"lowerdir=a\:b:c\,d:e\\f,upperdir=u\,p\:q,workdir=w")
    assert found.lowerdirs == (b"a:b", b"c,d", b"e\\f")
    assert found.upperdir == b"u,p:q"


@given(st.lists(PATHS, min_size=1, max_size=5), PATHS, PATHS)
def test_escaped_paths_come_back_as_they_were(lowers: list[bytes], upper: bytes, work: bytes) -> None:
    """parse(escape(path)) is the path, whatever bytes it has."""
    text = f"ro,lowerdir={':'.join(map(escape, lowers))},upperdir={escape(upper)},workdir={escape(work)},nodev"
    found, _ = parse_mount_options(text)

    assert found.lowerdirs == tuple(lowers)
    assert found.upperdir == upper
    assert found.workdir == work


@given(st.lists(PATHS, min_size=1, max_size=5))
def test_lowerdir_plus_takes_escaped_paths(lowers: list[bytes]) -> None:
    text = ",".join(f"lowerdir+={escape(path)}" for path in lowers)
    assert parsed(text).lowerdirs == tuple(lowers)


@given(st.text())
def test_unescape_undoes_escape(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass").replace(b"\0", b"")
    assert os.fsencode(unescape(escape(raw))) == raw


@given(st.text(alphabet='ab,:\\"=', max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """No input makes anything but a UsageError."""
    with contextlib.suppress(UsageError):
        parse_mount_options(text)


@given(st.text(alphabet='ab,\\"=', max_size=30))
def test_words_lose_nothing_but_commas(text: str) -> None:
    assert "".join(split_words(text)).replace(",", "") == text.replace(",", "")


def test_quotes_keep_commas() -> None:
    found = flags('ro,context="system_u:object_r:x:s0:c1,c2",nodev')
    assert found.security == ('context="system_u:object_r:x:s0:c1,c2"',)
    assert found.read_only


@pytest.mark.parametrize(
    "word", ["foo", "foo=bar", "lowerdirs=a", "RO", "metacopy_=on", "lanes", " ro", "squash", "x", "xyz-x"]
)
def test_unknown_words_are_refused_by_name(word: str) -> None:
    assert f"'{word}'" in refusal(f"ro,{word},nodev")
    assert "unknown" in refusal(word)


def test_an_unknown_word_is_shown_printable() -> None:
    assert r"'\x1b[2Jx'" in refusal("\x1b[2Jx")


@pytest.mark.parametrize(
    "word", ["nfs_export=on", "verity=on", "verity=require", "redirect_dir=nofollow", "uuid=on", "plugins=x", "remount",
             "ino32_t", "xattr_permissions=1", "noxattrs=1", "auto_unmount", "nosymfollow", "allow_root", "bind",
             "subtype=x"]
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(word: str) -> None:
    assert f"'{word}'" in refusal(f"lowerdir=a,{word}")


@pytest.mark.parametrize(
    "word", ["metacopy=yes", "redirect_dir=", "xino=2", "index=maybe", "fsync=2", "whiteouts=x", "nfs_export="]
)
def test_impossible_values_name_the_possible_ones(word: str) -> None:
    assert "one of: " in refusal(word)


@pytest.mark.parametrize("word", ["ro=1", "userxattr=on", "suid=1", "debug=yes", "ephemeral=1"])
def test_flags_take_no_value(word: str) -> None:
    assert "takes no value" in refusal(word)


@pytest.mark.parametrize("word", ["lowerdir", "upperdir", "metacopy", "squash_to_uid", "fsname", "platform"])
def test_options_with_values_need_one(word: str) -> None:
    assert "needs a value" in refusal(word)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("redirect_dir=on", "redirect_dir", True),
        ("redirect_dir=off", "redirect_dir", False),
        ("redirect_dir=follow", "redirect_dir", False),
        ("metacopy=on", "metacopy", True),
        ("metacopy=off", "metacopy", False),
        ("userxattr", "userxattr", True),
        ("volatile", "volatile", True),
        ("fsync=volatile", "volatile", True),
        ("fsync=auto", "volatile", False),
        ("fsync=strict", "volatile", False),
        ("fsync=0", "volatile", True),
        ("fsync=0", "volatile_mark", False),
        ("fsync=1", "volatile", False),
        ("whiteouts=kernel", "oci_whiteouts", False),
        ("whiteouts=oci", "oci_whiteouts", True),
        ("noacl", "acl", False),
        ("xattr_permissions=2", "xattr_permissions", 2),
        ("xattr_permissions=0", "xattr_permissions", 0),
        ("squash_to_uid=7", "squash_uid", 7),
        ("squash_to_gid=8", "squash_gid", 8),
        ("squash_to_root", "squash_gid", 0),
        ("uidmapping=0:10:100:100:10000:2000", "uidmapping", ((0, 10, 100), (100, 10000, 2000))),
        ("gidmapping=0:10:1", "gidmapping", ((0, 10, 1),)),
        ("ro", "read_only", True),
        ("ro,rw", "read_only", False),
    ],
)
def test_words_set_params(text: str, field: str, value: object) -> None:
    assert getattr(parsed(text), field) == value


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("noexec", "exec", False),
        ("noexec,exec", "exec", True),
        ("sync", "sync", True),
        ("sync,async", "sync", False),
        ("dirsync", "dirsync", True),
        ("allow_other", "allow_other", True),
        ("no_lane", "lane", False),
        ("no_lane,lane", "lane", True),
        (r"fsname=a\,b", "fsname", "a,b"),
        ("platform=linux/arm64", "platform", "linux/arm64"),
        ("ephemeral", "ephemeral", True),
        ("debug", "debug", True),
        ("ro", "read_only", True),
        ("suid,user", "suid", False),
    ],
)
def test_words_set_flags(text: str, field: str, value: object) -> None:
    assert getattr(flags(text), field) == value


@pytest.mark.parametrize(
    "text",
    ["uidmapping=1:2", "uidmapping=a:b:c", "gidmapping=", "squash_to_uid=-1", "squash_to_uid=4294967296",
     "timeout=x", "timeout=-1", "fsname="],
)  # fmt: skip
def test_bad_values_are_refused(text: str) -> None:
    assert text.partition("=")[0] in refusal(text)


def test_words_of_mount_and_fstab_are_understood() -> None:
    text = (
        "rw,nosuid,nodev,noexec,noatime,nodiratime,relatime,atime,strictatime,lazytime,defaults,auto,noauto,nofail,"
        "_netdev,nouser,comment=my disk,x-systemd.automount,x-systemd.requires=a.service,X-mount.mkdir,silent,"
        "default_permissions,threaded=1,fast_ino=1,timeout=0.5,writeback=0,static_nlink,clone_fd,xino=auto,uuid=null,"
        "index=on,nfs_export=off,verity=off,subtype=ovlfs,max_read=4096,noxattrs=0,override_creds,symfollow"
    )
    assert parse_mount_options(text) == (Params(), MountFlags(exec=False))


def test_the_last_word_wins() -> None:
    assert parsed("upperdir=a,upperdir=b").upperdir == b"b"


def test_given_defaults_stay_unless_a_word_changes_them() -> None:
    _, found = parse_mount_options("nosuid", flags=MountFlags(suid=True, dev=True))
    assert (found.suid, found.dev) == (False, True)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (Params(upperdir=b"u"), "workdir"),
        (Params(metacopy=True, redirect_dir=False), "metacopy=on"),
        (Params(lowerdirs=(b"l",) * 501), "500"),
    ],
)
def test_contradictions_are_refused(params: Params, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        verify(params)


def test_an_upperdir_without_workdir_can_be_shown_read_only() -> None:
    verify(Params(upperdir=b"u", read_only=True))


def test_no_word_has_two_meanings() -> None:
    """A word is in one table; those in two have a form with and one without a value."""
    module = params_module
    assert not module._NOTHING_TO_DO & (module._FLAGS.keys() | module._VALUES.keys() | module._REFUSED.keys())
    assert not module._REFUSED.keys() & (module._FLAGS.keys() | module._VALUES.keys())
