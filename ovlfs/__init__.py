"""ovlfs mounts container images as writable directories, through FUSE, without unpacking them.

The rooms of the package, in reading order (imports point one way only, `scripts/check` holds it):

    ids, errors        the words: names, digests, the errors a user can see
    events             one stream of decisions, told by the code that decides
    image/             what an image is: forms, manifests, platforms, blobs, the store
    layer/             what a layer is: tar index, directory, whiteout dialects, merge, the live tree
    overlay/           what overlayfs does: namei, readdir, copy_up, dir, file, attr, xattr
    fuse/              the protocol: mount, session, request handlers
    cli/               one file per verb
"""

__version__ = "0.1.0"
