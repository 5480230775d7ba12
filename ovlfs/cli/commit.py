"""`ovlfs commit`: keep what was changed in a mount as a new layer of a new image."""

import argparse
import os
import re
import sys
import tempfile
from typing import TYPE_CHECKING

from ovlfs.cli.ending import end_in_order
from ovlfs.cli.main import Parser
from ovlfs.errors import ImageError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.cli.changed import Changed, Place
    from ovlfs.image.commit import Output, Written
    from ovlfs.image.image import LayerBlob
    from ovlfs.overlay.layer_export import Exported

_DESCRIPTION = """\
Writes an image: the layers of the image below, byte for byte, and on top of them one layer with what was changed.

  ovlfs commit /mnt/root new.tar:app:v2       a docker-archive: for docker load, podman load, skopeo, ovlfs
  ovlfs commit /mnt/root layout/:v2           an OCI layout, made, or added to if it is there already
  ovlfs commit UPPER new.tar                  from an upperdir, mounted or not

OUT becomes an OCI layout if it is a directory or ends with a slash, else a docker-archive (one that is an OCI archive,
too); --format says otherwise.  An archive that is there already is replaced.  TAG is what follows the first colon.

The upperdir of a mount is read after a syncfs(2).  Writers should be quiet meanwhile: each file is stored as it is
when its turn comes.  The same changes make the same layer; for the same image say --source-date-epoch (or set
SOURCE_DATE_EPOCH), since its config tells when it was made.  Sockets are left out; a name that begins with `.wh.`
is an error, because an OCI layer cannot express it.
"""
_FORMATS = ("docker-archive", "oci-archive", "oci-layout")
_COMPRESSIONS = ("none", "gzip", "zstd")


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs commit", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("place", metavar="MOUNT|UPPER", type=os.fsencode)
    found.add_argument("out", metavar="OUT[:TAG]", type=os.fsencode)
    found.add_argument("-m", "--message", default="", metavar="TEXT", help="the comment of the new entry in history")
    found.add_argument("-a", "--author", default="", metavar="TEXT")
    found.add_argument(
        "-c",
        "--change",
        action="append",
        default=[],
        metavar="INSTRUCTION",
        help="change the config, as a Dockerfile does: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, "
        "VOLUME, WORKDIR",
    )
    found.add_argument("--format", choices=_FORMATS, help="of OUT")
    found.add_argument(
        "--compress",
        choices=_COMPRESSIONS,
        help="the new layer (default: none in a docker-archive, as docker save has it; gzip otherwise); "
        "docker 20 does not load zstd",
    )
    found.add_argument(
        "--sparse",
        action="store_true",
        help="keep the holes of sparse files (GNU.sparse); docker loads such a layer, but cannot save or push it again",
    )
    found.add_argument("--source-date-epoch", metavar="SECONDS", help="the time of making; no file is newer")
    found.add_argument(
        "--image", metavar="IMAGE[:TAG]", help="the image below UPPER, where it is not known or was moved"
    )
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Write the layer, then the image."""
    from ovlfs.build import change  # noqa: PLC0415
    from ovlfs.cli import changed  # noqa: PLC0415  # heavy
    from ovlfs.image import new_config  # noqa: PLC0415
    from ovlfs.image.commit import Format, parse_output  # noqa: PLC0415

    end_in_order()  # to what was there before, and no temporary files
    output = parse_output(args.out, args.format)
    epoch = _epoch(args.source_date_epoch)
    change.parsed(args.change)  # what makes no sense is known before anything is read
    new_config.timestamp(epoch)
    compression = args.compress or ("none" if output.format is Format.DOCKER_ARCHIVE else "gzip")
    place = changed.find(args.place, args.image)
    _check_outside(output, place)
    with changed.opened(place, args.platform) as found, _temp(output) as temp:
        layers, exported = _layers(args, found, os.fsencode(temp), compression, epoch)
        written = _write(args, found, output, layers, exported, epoch)
    _report(output, layers, exported, written)
    return 0


def _epoch(typed: str | None) -> int | None:
    text = os.environ.get("SOURCE_DATE_EPOCH") if typed is None else typed
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"--source-date-epoch should be seconds since 1970, not '{printable(text[:40])}'")
    return int(text)


def _check_outside(output: "Output", place: "Place") -> None:
    """Raise ImageError where the image would be written into what it is made of."""
    from ovlfs.fuse import mounting  # noqa: PLC0415

    parent = _parent(output)
    mountpoint = None if place.mounted is None or not place.mounted.alive else place.mounted.entry.mountpoint
    for path in (place.upperdir, mountpoint):
        if path is not None and os.path.isdir(parent) and mounting.is_within(parent, path):
            raise ImageError(f"{printable(output.path)}: is in {printable(path)}, of which the image is made")


def _parent(output: "Output") -> bytes:
    return os.path.dirname(os.path.realpath(output.path.rstrip(b"/"))) or b"."


def _temp(output: "Output") -> "tempfile.TemporaryDirectory[str]":
    """Where the new layer waits to be copied: beside the output, where there is room for it."""
    try:
        return tempfile.TemporaryDirectory(prefix=".ovlfs-commit-", dir=os.fsdecode(_parent(output)))
    except OSError as error:
        raise ImageError(f"{printable(output.path)}: cannot be written: {error.strerror}") from error


def _layers(
    args: argparse.Namespace, found: "Changed", temp: bytes, compression: str, epoch: int | None
) -> "tuple[list[LayerBlob], Exported | None]":
    """All layers of the new image, bottom first; and the new one, None if nothing was changed."""
    from ovlfs.overlay import layer_export  # noqa: PLC0415

    layers: list[LayerBlob] = []
    if found.image is not None and found.image.directory is None:
        layers += found.image.layers
        layer_export.check_whiteout_names(found.image.layers, found.lowers)
    else:
        layers += layer_export.write_directories(
            temp, found.lowers, compression=compression, epoch=epoch, sparse=args.sparse
        )
    exported = layer_export.write_layer(
        os.path.join(temp, b"new"),
        found.now,
        found.before,
        below=layers[-1].chain_id if layers else None,
        compression=compression,
        epoch=epoch,
        sparse=args.sparse,
    )
    if exported.entries == 0:
        return layers, None
    return [*layers, exported.layer], exported


def _write(
    args: argparse.Namespace,
    found: "Changed",
    output: "Output",
    layers: "list[LayerBlob]",
    exported: "Exported | None",
    epoch: int | None,
) -> "Written":
    from ovlfs.build import change  # noqa: PLC0415
    from ovlfs.cli import changed  # noqa: PLC0415
    from ovlfs.image import new_config  # noqa: PLC0415
    from ovlfs.image.commit import write_image  # noqa: PLC0415
    from ovlfs.image.config import Config  # noqa: PLC0415

    document = new_config.document_of(Config() if found.image is None else found.image.config)
    document = change.changed(document, change.parsed(args.change))
    document = new_config.extended(
        document,
        [layer.diff_id for layer in layers],
        created=new_config.timestamp(epoch),
        created_by="ovlfs commit",
        author=args.author,
        comment=args.message,
        empty_layer=exported is None,
    )
    with changed.progress() as progress:
        return write_image(output, new_config.dump(document), layers, progress=progress)


def _report(output: "Output", layers: "list[LayerBlob]", exported: "Exported | None", written: "Written") -> None:
    for path in () if exported is None else exported.skipped:
        print(f"left out /{printable(path)}: a socket, which no layer can hold", file=sys.stderr)
    new = "none of them new: nothing was changed"
    if exported is not None:
        entries = "1 entry" if exported.entries == 1 else f"{exported.entries} entries"
        new = f"the new one has {entries}, {exported.layer.size} bytes"
    print(f"wrote {output} ({output.format.value}, {len(layers)} layers, {new})")
    print(f"image    {written.image_id}")
    print(f"manifest {written.manifest_digest}")
    if exported is not None:
        print(f"layer    {exported.layer.digest}")
