"""How is a command run in a mounted image, as the image's config says?

Read in this order: `user` (who is USER?), `process` (config and command line become one process), `inside` (files and
mountpoints below a hostile root), `spec` (the runtime-spec bundle), `namespaces` (root without being root),
`supervise` (signals, and nothing left behind), `runtime` and `chroot` (the two ways to run), `container` (all of it in
one call).

Who has a mounted root and wants a command run in it calls three functions:

    from ovlfs.run import namespaces, container
    from ovlfs.run.process import Overrides

    mapping = namespaces.enter()          # once, before mounting; this process must have one thread
    ...mount the image on ROOTFS...       # nodev; nosuid is up to you
    code = container.run_in(ROOTFS, config, Overrides(argv=("sh", "-c", "make"), entrypoint=()), mapping=mapping)

`entrypoint=()` sets the image's aside.  The exit code is the command's, 128+n for a signal, 126 and 127 where the
command could not be started.  Who wants nothing left behind even when killed adds supervise.janitor() before mounting.
"""
