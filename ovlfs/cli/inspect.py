"""`ovlfs inspect IMAGE`: what an image consists of.

Reads documents only.  What is in a layer (files, whiteouts) is told where its index is in the store already, from an
earlier mount.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ovlfs.cli.main import Parser
from ovlfs.errors import printable

if TYPE_CHECKING:
    from ovlfs.image.image import Image
    from ovlfs.image.store import Store

_COUNTS = ("files", "directories", "whiteouts", "opaque", "bytes")


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs inspect", description="Shows what an image consists of.")
    found.add_argument("image", metavar="IMAGE[:TAG]", type=os.fsencode)
    found.add_argument("--json", action="store_true", help="for programs")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Show; all images of the file if none was chosen."""
    from ovlfs.cli.progress import Progress  # noqa: PLC0415
    from ovlfs.image.image import list_images, open_image  # noqa: PLC0415  # heavy
    from ovlfs.image.platform import parse_platform  # noqa: PLC0415
    from ovlfs.image.reference import Reference, parse_reference  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415

    platform = parse_platform(args.platform) if args.platform else None
    reference = parse_reference(args.image)
    store = Store()
    with Progress(sys.stderr if sys.stderr.isatty() else None) as progress:
        references = [reference]
        platforms: list[list[str]] = [[]]
        if (reference.tag, reference.index, reference.digest) == (None, None, None):
            listed = list_images(reference, progress=progress, store=store)
            platforms = [[str(one) for one in image.platforms] for image in listed]
            if len(listed) > 1:
                references = [Reference(reference.path, index=image.number) for image in listed]
        images = []
        for one, known in zip(references, platforms, strict=True):
            image = open_image(one, platform=platform, progress=progress, store=store)
            images.append(_described(image, store) | {"platforms": known})
    if args.json:
        print(json.dumps(images[0] if len(images) == 1 else {"images": images}, indent=2))
        return 0
    for number, described in enumerate(images):
        if len(images) > 1:
            print(f"{'' if number == 0 else os.linesep}@{number}")
        _show(described)
    return 0


def _described(image: "Image", store: "Store") -> dict[str, Any]:
    described = image.describe()
    for layer, shown in zip(image.layers, described["layers"], strict=True):
        shown["counts"] = _counts(store, layer.diff_id, whiteouts=layer.whiteouts)
    return described


def _counts(store: "Store", diff_id: str, *, whiteouts: bool) -> dict[str, int] | None:
    """What is in a layer, if its index is in the store."""
    from ovlfs.layer.open import INDEX_VERSION  # noqa: PLC0415
    from ovlfs.layer.tar import TarLayer  # noqa: PLC0415

    index = store.load_index(store.index_name(diff_id, INDEX_VERSION, "layer" if whiteouts else "rootfs"))
    if index is None:
        return None
    layer = TarLayer(index, -1, base_offset=0, layer_number=0)
    return dict(zip(_COUNTS, layer.index.counts(), strict=True))


def _show(image: dict[str, Any]) -> None:
    form = image["form"] + (f", {image['compression']}" if image["compression"] else "")
    print(f"{printable(image['path'])}: {form}")
    _line("tags", ", ".join(image["tags"]))
    for key in ("image_id", "manifest_digest", "platform", "created", "author"):
        _line(key.replace("_", " "), image[key] or "")
    if len(image["platforms"]) > 1:
        _line("platforms", ", ".join(image["platforms"]))
    config = image["config"]
    for key in ("user", "entrypoint", "cmd", "working_dir", "env", "volumes", "exposed_ports", "stop_signal"):
        value = config[key]
        _line(key.replace("_", " "), value if isinstance(value, str) else _words(value))
    for key, value in sorted(config["labels"].items()):
        _line("label", f"{key}={value}")
    for layer in reversed(image["layers"]):
        compression = layer["media_type"].rpartition(".")[2].rpartition("+")[2]
        print(f"layer {layer['number'] + 1}: {_size(layer['size'])}, {printable(compression)}")
        for key in ("digest", "diff_id", "chain_id"):
            _line(key, layer[key] or "")
        if layer["counts"] is not None:
            counts = layer["counts"]
            _line("holds", ", ".join(f"{counts[what]} {what}" for what in _COUNTS))
        _line("created by", layer["created_by"])


def _line(key: str, value: str) -> None:
    if value:
        print(f"  {key:<16} {printable(value)}")


def _words(words: list[str]) -> str:
    return json.dumps(words, ensure_ascii=False) if words else ""


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
