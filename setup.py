"""Builds the C extension, and says by name which Debian package is missing when one is.

`OVLFS_CFLAGS` adds compiler flags: the tests build with -Werror, and with the sanitizers, through it.
"""

import glob
import os
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup


def need_fuse3() -> None:
    """pyfuse3 is built from source by pip and needs libfuse3's headers: say so before its build fails unreadably."""
    if shutil.which("pkg-config") is None:
        sys.exit("ovlfs: pkg-config is missing (Debian: apt-get install pkg-config)")
    if subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode != 0:
        sys.exit("ovlfs: the headers of libfuse 3 are missing (Debian: apt-get install libfuse3-dev)")


need_fuse3()
sources = [path for path in sorted(glob.glob("native/*.c")) if not os.path.basename(path).startswith("fuzz_")]
setup(
    ext_modules=[
        Extension(
            "ovlfs._native",
            sources=sources,
            depends=sorted(glob.glob("native/*.h")),
            include_dirs=["native"],
            extra_compile_args=[
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-fvisibility=hidden",
                *shlex.split(os.environ.get("OVLFS_CFLAGS", "")),
            ],
            extra_link_args=shlex.split(os.environ.get("OVLFS_LDFLAGS", "")),
        )
    ]
)
