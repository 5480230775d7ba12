"""`ovlfs layers IMAGE`: what each layer of an image brought, and what of it can nobody see any more."""

import argparse
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

from ovlfs.cli.main import Parser
from ovlfs.errors import OvlfsError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.cli.progress import Progress
    from ovlfs.explain.layers import Facts, LayerFacts
    from ovlfs.image.image import Image
    from ovlfs.image.store import Store

_DESCRIPTION = """\
Shows what each layer of an image brought: how large it is, what it added, changed and deleted against the layers below
it, how many of its bytes are wasted (no name leads to them any more), and the line that made it.

  ovlfs layers image.tar
  ovlfs layers image.tar --html layers.html       one page to click through, for any browser
"""
_HEAD = ("layer", "size", "files", "added", "changed", "deleted", "wasted", "made by")


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs layers", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("image", metavar="IMAGE[:TAG]", type=os.fsencode)
    how = found.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="for programs; bottom layer first")
    how.add_argument("--html", metavar="OUT", type=os.fsencode, help="write a page that needs nothing but a browser")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Show, or write the page."""
    from ovlfs.cli.progress import Progress  # noqa: PLC0415
    from ovlfs.image.image import open_image  # noqa: PLC0415  # heavy
    from ovlfs.image.platform import parse_platform  # noqa: PLC0415
    from ovlfs.image.reference import parse_reference  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415

    platform = parse_platform(args.platform) if args.platform else None
    store = Store()
    with Progress(sys.stderr if sys.stderr.isatty() else None) as progress:
        image = open_image(parse_reference(args.image), platform=platform, progress=progress, store=store)
        facts = _gathered(image, store, progress)
    if args.json:
        print(json.dumps({"image": os.fsdecode(image.path), "layers": facts.describe()}, indent=2))
    elif args.html is not None:
        from ovlfs.explain.page import write_page  # noqa: PLC0415

        if os.path.exists(args.html) and os.path.samefile(args.html, image.path):
            raise UsageError(f"{printable(args.html)}: is the image, and would be replaced by the page")
        write_page(args.html, facts, title=_title(image))
    else:
        for line in _table(facts):
            print(line)
    return 0


def _title(image: "Image") -> str:
    name = printable(os.path.basename(os.path.abspath(image.path)))
    return f"{name} ({printable(image.chosen_tag)})" if image.chosen_tag else name


def _gathered(image: "Image", store: "Store", progress: "Progress") -> "Facts":
    from ovlfs.explain.layers import Made, gather  # noqa: PLC0415
    from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap  # noqa: PLC0415
    from ovlfs.layer.open import open_layers  # noqa: PLC0415

    if image.directory is not None:
        layer = DirLayer(image.directory, InoMap(), prefixes=(TRUSTED, USER))
        try:
            return gather([layer], [Made()])
        finally:
            layer.close()
    if not image.layers:
        raise OvlfsError(f"{printable(image.path)}: has no layers, so there is nothing in it")
    layers = open_layers(image, store, progress=progress)
    made = [Made(layer.diff_id, layer.created_by, layer.size) for layer in image.layers]
    try:
        return gather(layers[::-1], made[::-1])
    finally:
        for opened in layers:
            opened.close()


def _table(facts: "Facts") -> list[str]:
    """Top first, as the layers lie."""
    rows = [_HEAD, *(_row(layer) for layer in reversed(facts.layers))]
    if len(facts.layers) > 1:
        sums = [_human(sum(layer.bytes for layer in facts.layers)), str(sum(layer.files for layer in facts.layers))]
        rows.append(("all", *sums, "", "", "", _human(sum(layer.wasted_bytes for layer in facts.layers)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    lines = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
    if not sys.stdout.isatty():
        return lines
    columns = shutil.get_terminal_size().columns
    return [line if len(line) <= columns else line[: columns - 1] + "…" for line in lines]


def _row(layer: "LayerFacts") -> tuple[str, ...]:
    from ovlfs.explain.layers import instruction  # noqa: PLC0415

    counts: list[Any] = [layer.files, layer.added, layer.changed, layer.deleted]
    wasted = _human(layer.wasted_bytes)
    return (
        str(layer.number),
        _human(layer.bytes),
        *map(str, counts),
        wasted,
        printable(instruction(layer.made.created_by)),
    )


def _human(size_bytes: int) -> str:
    """`0`, `512 B`, `1.2 MB`: decimal units, as docker history has them."""
    if size_bytes == 0:
        return "0"
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size_bytes} B" if unit == "B" else f"{size:.3g} {unit}"
