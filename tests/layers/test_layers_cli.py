"""`ovlfs layers`: the table, the JSON, the file that --html writes, and what goes wrong."""

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import archives
import pytest
from layers_images import FIXTURES, Layer

from ovlfs import _native
from ovlfs.errors import OvlfsError
from ovlfs.explain import page
from ovlfs.explain.layers import Facts, Made, gather, instruction
from ovlfs.layer.tar import TarLayer, scan

Run = Callable[..., "subprocess.CompletedProcess[str]"]

TABLE = """\
layer     size  files  added  changed  deleted  wasted  made by
    9  3.22 kB      5      6        0        0       0  COPY --chown=1000:1000
    8    340 B     19     19        9       19       0  RUN cd /opt/shape && r
    7      8 B      2      1        1       63       0  RUN rm -rf /usr/share/
    6     23 B      5      8        0        0       0  /bin/sh
    5     34 B      2      4        0        0       0  ADD file:4551d5bf1d445
    4     44 B     20     32        0        0    40 B  RUN mkdir -p /opt/shap
    3  1.05 MB     29     75        0        0       0  RUN mkdir -p /opt/zoo
    2        0      0      0        0       13       0  RUN rm -rf /usr/share/
    1  2.47 MB    522    572        0        0  119 kB  ADD file:f424603f70fde
  all  3.52 MB    604                           119 kB"""


def described(ovlfs: Run, image: Path) -> list[dict[str, Any]]:
    layers = json.loads(ovlfs("layers", image, "--json").stdout)["layers"]
    assert isinstance(layers, list)
    return layers


def test_table_of_a_real_image(ovlfs: Run, real_image: Path) -> None:
    """What docker's image of nine layers holds; the counts are those of the model test's rules."""
    out = ovlfs("layers", real_image).stdout
    assert "\n".join(line[:78].rstrip() for line in out.splitlines()) == TABLE


def test_every_tool_wrote_the_same_layers(ovlfs: Run, tmp_path: Path) -> None:
    """The same image as docker, podman, skopeo, umoci and buildah save it: the same facts, compressed or not."""
    with tarfile.open(FIXTURES) as tar:
        tar.extractall(tmp_path, filter="data")
    forms = ("small-docker20.tar", "small-podman.tar", "small-skopeo.tar", "small-oci.tar", "small-plain.oci.tar")
    compressed = ("small-zstd.oci.tar", "small-zstdchunked.oci.tar")
    told = []
    for form in (*forms, *compressed):
        (path,) = tmp_path.rglob(form)
        told.append([layer | {"stored_bytes": 0, "created_by": ""} for layer in described(ovlfs, path)])
    assert len(told[0]) == 9
    assert all(one == told[0] for one in told)


def test_json_adds_up_with_what_a_mount_shows(ovlfs: Run, real_image: Path, mounted: Callable[..., Path]) -> None:
    """Added minus deleted names are the names of the merged tree, counted through a real mount."""
    layers = described(ovlfs, real_image)
    assert [layer["number"] for layer in layers] == list(range(1, 10))
    assert all(layer["diff_id"].startswith("sha256:") and layer["stored_bytes"] > 0 for layer in layers)
    assert "rm -rf" in layers[1]["created_by"]
    # Names of one inode may be deleted while the inode lives on: wasted bytes are counted by inode.
    root = mounted("--ro", real_image)
    inodes: dict[int, int] = {}
    count = 0
    for directory, subdirectories, files in os.walk(os.fsencode(root)):
        count += len(subdirectories) + len(files)
        for name in files:
            status = os.lstat(os.path.join(directory, name))
            if os.path.isfile(os.path.join(directory, name)) and not os.path.islink(os.path.join(directory, name)):
                inodes[status.st_ino] = status.st_size
    assert sum(layer["added"] - layer["deleted"] for layer in layers) == count
    assert sum(layer["bytes"] - layer["wasted_bytes"] for layer in layers) == sum(inodes.values())


def test_one_layer_and_a_directory(ovlfs: Run, small_image: Callable[..., Path], scratch: Path) -> None:
    """A single layer adds everything and needs no sum; a directory is an image of one layer without history."""
    table = ovlfs("layers", small_image({"a": None, "a/b": b"123"})).stdout.splitlines()
    assert [line.split() for line in table[1:]] == [["1", "3", "B", "1", "2", "0", "0", "0"]]
    root = scratch / "root"
    for name in ("usr", "etc", "bin"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "os-release").write_text("ID=x\n")
    (layer,) = described(ovlfs, root)
    assert (layer["bytes"], layer["added"], layer["created_by"]) == (5, 4, "")


def test_an_opaque_root_hides_every_layer_below(ovlfs: Run, image_of: Callable[..., Path]) -> None:
    """`.wh..wh..opq` at the root of a tar: the layers below are still read, and all of them is wasted."""
    image = image_of([[(b"a", b"1234")], [(b".wh..wh..opq", b""), (b"b", b"12")]], [])
    bottom, top = described(ovlfs, image)
    assert (bottom["added"], bottom["bytes"], bottom["wasted_bytes"]) == (1, 4, 4)
    assert (top["added"], top["deleted"], top["opaque"], top["wasted_bytes"]) == (1, 1, 1, 0)


def test_a_name_deleted_and_made_again(ovlfs: Run, image_of: Callable[..., Path]) -> None:
    """Each layer is compared with those below it only; a whiteout that hides nothing has deleted nothing."""
    layers = [[(b"f", b"1")], [(b".wh.f", b""), (b".wh.none", b"")], [(b"f", b"333")], [(b"f", b"4444")]]
    counts = [
        tuple(layer[key] for key in ("added", "changed", "deleted", "wasted_bytes"))
        for layer in described(ovlfs, image_of(layers, []))
    ]
    assert counts == [(1, 0, 0, 1), (0, 0, 1, 0), (1, 0, 0, 3), (0, 1, 0, 0)]


def linking(*links: tuple[str, str]) -> TarLayer:
    """A layer of hard links only."""
    scanner = _native.TarScanner()
    scanner.feed(archives.tar_of((name, archives.hard_link(name, target)) for name, target in links))
    return TarLayer(scanner.finish(), -1, base_offset=0, layer_number=1)


def test_a_hard_link_to_a_layer_below_keeps_its_bytes() -> None:
    """A file that is whited out, and has another name by way of a later layer's link, is not wasted."""
    bottom = TarLayer(scanned([(b"a", b"12345"), (b"b", b"1")]), -1, base_offset=0, layer_number=0)
    links = linking(("c", "a"))
    top = TarLayer(scanned([(b".wh.a", b""), (b".wh.b", b"")]), -1, base_offset=0, layer_number=2)
    facts = gather([top, links, bottom], [Made()] * 3)
    assert [layer.wasted_bytes for layer in facts.layers] == [1, 0, 0]
    paths = {path.name: path for path in facts.root.walk()}
    assert (paths[b"c"].kind, paths[b"c"].sources, paths[b"c"].asked) == ("file", (1,), (3, 2))
    assert [say.kind for say in paths[b"c"].says] == ["hard link below"]
    assert paths[b"c"].events == ((2, "added"),)
    assert paths[b"a"].events == ((1, "added"), (3, "deleted"))
    assert [say.counts for path in facts.root.walk() for say in path.says if say.kind == "file"] == [True, True]


def test_a_hard_link_to_nothing_is_one_damaged_name() -> None:
    """A mount answers EIO for that name and shows all others; so do the facts."""
    bottom = TarLayer(scanned([(b"a", b"12345")]), -1, base_offset=0, layer_number=0)
    facts = gather([linking(("c", "none")), bottom], [Made()] * 2)
    paths = {path.name: path for path in facts.root.walk()}
    assert "no layer below has" in paths[b"c"].damage
    assert paths[b"c"].sources == ()
    assert [(layer.added, layer.files) for layer in facts.layers] == [(1, 1), (0, 1)]
    assert "no layer below has" in page.payload(facts)["notes"][2]


def test_history_lines_as_a_dockerfile_has_them() -> None:
    """What docker's old builder wraps around an instruction is taken off; anything else stays."""
    assert instruction('/bin/sh -c #(nop)  CMD ["sh"]') == 'CMD ["sh"]'
    assert instruction("/bin/sh -c apt-get update") == "RUN apt-get update"
    assert instruction("RUN /bin/sh -c make # buildkit") == "RUN /bin/sh -c make # buildkit"
    assert instruction("/bin/sh") == "/bin/sh"


def test_hostile_names_stay_on_their_line(ovlfs: Run, hostile_image: Path) -> None:
    """Nothing of an image reaches the terminal as a control character or as another line."""
    out = ovlfs("layers", hostile_image).stdout
    assert len(out.splitlines()) == 5
    assert all(char.isprintable() or char == "\n" for char in out)


def test_errors_are_one_line(ovlfs: Run, scratch: Path, real_image: Path) -> None:
    """A missing image, a page that cannot be written, both wishes at once; no page is left half-written."""
    assert ovlfs("layers", scratch / "none.tar", code=1).stderr.count("\n") == 1
    failed = ovlfs("layers", real_image, "--html", scratch / "no" / "out.html", code=1)
    assert (failed.stderr.count("\n"), failed.stdout) == (1, "")
    assert "usage" not in ovlfs("layers", real_image, "--json", "--html", "x", code=2).stdout
    old = scratch / "page.html"
    old.write_text("old")
    torn = scratch / "torn.tar"
    torn.write_bytes(real_image.read_bytes()[:-700_000])
    ovlfs("layers", torn, "--html", old, code=1)
    assert old.read_text() == "old"
    assert sorted(path.name for path in scratch.iterdir()) == ["page.html", "torn.tar"]


def test_page_goes_to_a_file_or_a_stream(ovlfs: Run, scratch: Path, real_image: Path) -> None:
    """A file is replaced and readable as any new file; /dev/stdout is written to."""
    out = scratch / "page.html"
    out.write_text("old")
    ovlfs("layers", real_image, "--html", out)
    assert out.read_text() == ovlfs("layers", real_image, "--html", "/dev/stdout").stdout
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_image_is_not_replaced_by_its_page(ovlfs: Run, scratch: Path, small_image: Callable[..., Path]) -> None:
    """A slip that would destroy the image is a usage error, also through a link; a symlink stays one."""
    image = small_image()
    raw = image.read_bytes()
    (scratch / "link").symlink_to(image)
    for out in (image, scratch / "link"):
        assert "is the image" in ovlfs("layers", image, "--html", out, code=2).stderr
    assert image.read_bytes() == raw
    (scratch / "old.html").write_text("old")
    (scratch / "page.html").symlink_to("old.html")
    ovlfs("layers", image, "--html", scratch / "page.html")
    assert (scratch / "page.html").is_symlink()
    assert (scratch / "old.html").read_text().startswith("<!doctype html>")


class _Elements(HTMLParser):
    """What a parser of HTML finds: all elements, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(text)
    return parser.found


def test_page_needs_nothing_else_and_hostile_names_add_no_element(
    ovlfs: Run, hostile_image: Path, real_image: Path
) -> None:
    """The page of a hostile image has the same elements as any other, none of which names another resource."""
    text = ovlfs("layers", hostile_image, "--html", "/dev/stdout").stdout
    plain = ovlfs("layers", real_image, "--html", "/dev/stdout").stdout
    assert [tag for tag, _ in elements(text)] == [tag for tag, _ in elements(plain)]
    for _, attributes in elements(text):
        assert not attributes.keys() & {"src", "href", "style", "action", "srcset", "data"}
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    policy = next(attributes["content"] for tag, attributes in elements(text) if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_page_of_too_many_paths_is_refused(
    small_image: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is above what a page must bear, and whoever passes it leaves no file behind."""
    assert page.MAX_NAMES > 50_000
    facts = gathered(small_image({f"f{number}": b"" for number in range(30)}))
    monkeypatch.setattr(page, "MAX_NAMES", 31)
    page.write_page(bytes(scratch / "out.html"), facts, title="t")
    monkeypatch.setattr(page, "MAX_NAMES", 30)
    with pytest.raises(OvlfsError, match="more than 30 paths"):
        page.write_page(bytes(scratch / "more.html"), facts, title="t")
    assert sorted(path.name for path in scratch.iterdir()) == ["image.tar", "out.html"]


def test_work_is_linear_in_the_names(image_of: Callable[..., Path]) -> None:
    """Twice the names in every layer: not more than about twice the questions to the layers."""
    asked = []
    for number in (200, 400):
        names = [f"d{one % 10}/f{one}".encode() for one in range(number)]
        layers = [[(name, b"1") for name in names], [(b"d1/.wh..wh..opq", b""), (b".wh.d2", b"")]] * 3
        stack = _Counting.all_of([TarLayer(scanned(layer), -1, base_offset=0, layer_number=0) for layer in layers])
        gather(stack, [Made()] * len(stack))
        asked.append(sum(layer.asked for layer in stack))
    assert asked[0] > 200 * 3
    assert asked[1] < 2.2 * asked[0]


class _Counting:
    """A layer that counts what it is asked."""

    def __init__(self, layer: TarLayer) -> None:
        self._layer = layer
        self.asked = 0

    @classmethod
    def all_of(cls, layers: list[TarLayer]) -> "list[Any]":
        return [cls(layer) for layer in layers]

    def __getattr__(self, name: str) -> Any:
        if name in {"lookup", "list", "attr"}:
            self.asked += 1
        return getattr(self._layer, name)


def scanned(layer: Layer) -> bytes:
    scanner = _native.TarScanner()
    scanner.feed(archives.tar_of(layer))
    return scanner.finish()


def gathered(image: Path) -> Facts:
    with tarfile.open(image) as tar:
        member = tar.getmember("layer0.tar")
    fd = os.open(image, os.O_RDONLY)
    try:
        index = scan(fd, member.offset_data, member.size, whiteouts=True, where="layer")
        return gather([TarLayer(index, fd, base_offset=member.offset_data, layer_number=0)], [Made()])
    finally:
        os.close(fd)


def test_embedded_facts_are_json_without_markup(ovlfs: Run, hostile_image: Path) -> None:
    """Between the tags of the facts there is no character that HTML gives a meaning, and every name is there."""
    text = ovlfs("layers", hostile_image, "--html", "/dev/stdout").stdout
    match = re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)
    assert match
    assert not set(match[1]) & set("<>&\n")
    names = json.loads(match[1])["names"]
    assert "</script><script>window.owned=1</script>".replace("/", "") in names
    assert "\\u202etxt.exe" in names
    assert "caf\\xe9 \\xff\\xfe" in names
    assert "{{facts}}{{script}}" in names
