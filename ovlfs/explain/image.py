"""What would a read-only mount of this image be?  The same stack, opened without mounting it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ovlfs.errors import ImageError, printable
from ovlfs.image.form import Progress
from ovlfs.image.image import open_image
from ovlfs.image.platform import parse_platform
from ovlfs.image.reference import Reference
from ovlfs.image.store import Store
from ovlfs.layer.open import open_layers
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack, open_stack


@contextmanager
def opened(reference: Reference, platform: str, progress: Progress | None) -> Iterator[Stack]:
    """The stack of the image that is named.  Raises ImageError, LayerError."""
    store = Store()
    image = open_image(
        reference, platform=parse_platform(platform) if platform else None, progress=progress, store=store
    )
    with ExitStack() as cleanup:
        if image.directory is not None:
            # As cli/start.py mounts it: a root file system in a directory speaks the kernel's dialect.
            stack = open_stack(
                Params(lowerdirs=(os.path.abspath(image.directory),), oci_whiteouts=False, read_only=True)
            )
        else:
            layers = open_layers(image, store, progress=progress)[::-1]
            if not layers:
                raise ImageError(f"{printable(image.path)}: has no layers, so there is nothing in it")
            stack = open_stack(Params(read_only=True), layers)
            for layer in layers[len(stack.layers) - 1 :]:
                cleanup.callback(layer.close)  # below an opaque root
        cleanup.callback(stack.close)
        yield stack
