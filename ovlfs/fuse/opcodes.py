"""What are the requests of the FUSE protocol called, and which handler answers each?

Kernel: include/uapi/linux/fuse.h, enum fuse_opcode; the names are the kernel's, without FUSE_.
"""

OPCODES: dict[int, str] = {
    1: "LOOKUP",
    2: "FORGET",
    3: "GETATTR",
    4: "SETATTR",
    5: "READLINK",
    6: "SYMLINK",
    8: "MKNOD",
    9: "MKDIR",
    10: "UNLINK",
    11: "RMDIR",
    12: "RENAME",
    13: "LINK",
    14: "OPEN",
    15: "READ",
    16: "WRITE",
    17: "STATFS",
    18: "RELEASE",
    20: "FSYNC",
    21: "SETXATTR",
    22: "GETXATTR",
    23: "LISTXATTR",
    24: "REMOVEXATTR",
    25: "FLUSH",
    26: "INIT",
    27: "OPENDIR",
    28: "READDIR",
    29: "RELEASEDIR",
    30: "FSYNCDIR",
    31: "GETLK",
    32: "SETLK",
    33: "SETLKW",
    34: "ACCESS",
    35: "CREATE",
    36: "INTERRUPT",
    37: "BMAP",
    38: "DESTROY",
    39: "IOCTL",
    40: "POLL",
    41: "NOTIFY_REPLY",
    42: "BATCH_FORGET",
    43: "FALLOCATE",
    44: "READDIRPLUS",
    45: "RENAME2",
    46: "LSEEK",
    47: "COPY_FILE_RANGE",
    48: "SETUPMAPPING",
    49: "REMOVEMAPPING",
    50: "SYNCFS",
    51: "TMPFILE",
    52: "STATX",
    53: "COPY_FILE_RANGE_64",
}

_OTHER_HANDLERS: dict[str, tuple[str, ...]] = {
    "READDIR": ("readdir_plain",),
    "READDIRPLUS": ("readdir",),
    "RENAME2": ("rename",),
    "SETXATTR": ("setxattr", "setxattr_with_flags"),
    "COPY_FILE_RANGE_64": ("copy_file_range",),
}
"""Handlers of operations.py and lane.py that are not called as their request is, in lower case."""

_REQUESTS = {"readdir_plain": "READDIR", "readdir": "READDIRPLUS", "setxattr_with_flags": "SETXATTR"}


def name_of(opcode: int) -> str:
    """The name of an opcode."""
    return OPCODES.get(opcode, f"OPCODE_{opcode}")


def handlers_of(request: str) -> tuple[str, ...]:
    """The handlers that answer a request in Python.  RENAME and RENAME2 have one."""
    return _OTHER_HANDLERS.get(request, (request.lower(),))


def request_of(handler: str) -> str:
    """The request that a handler answers."""
    return _REQUESTS.get(handler, handler.upper())
