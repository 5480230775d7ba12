"""What overlayfs does, file by file named after the kernel's fs/overlayfs.

    params    what the mount options say
    stack     the layers, upperdir and workdir of one mount, opened and claimed
    upper     how an object comes to be in the upperdir: made in workdir, complete, then moved into place
    namei     where a name leads, and under which name it stands below (redirects)
    copy_up   make a lower object writable
    dir       create, remove and rename names
    attr      owners, modes, times and sizes
    xattr     extended attributes; acl: the two that are POSIX ACLs
    file      the bytes of open files

And what can be asked of an upperdir without mounting it:

    upperdir      how to read it
    changes       what it changes: two merged trees compared
    layer_export  the same as the layer of an OCI image
    fsck          what is wrong with it, and what can be repaired

Functions here are plain and synchronous: between two of them nothing changes, because one thread (fuse/) calls
them.  They raise OSError with the errno that the caller of the system call shall see, and leave everything as it was
when they do.  They know nothing of FUSE.
"""
