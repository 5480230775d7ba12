"""The commands: one file for each verb of `ovlfs`; mount_helper for mount(8); fuse_overlayfs for podman.

They parse and print.  `start` is what the three ways to mount have in common, `uppers` knows where changes are kept,
`changed` leads from a mount or an upperdir to the layers.
"""
