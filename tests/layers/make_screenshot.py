"""Make screenshot.png beside this file anew: the page of the fixture image, at a path where layers disagree.

.venv/bin/python tests/layers/make_screenshot.py
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from browser_chromium import Browser

HERE = Path(__file__).parent
PATH = ("opt/", "shape/", "dir-to-file")


def main() -> None:
    """Write the page of small-docker20.tar and look at it."""
    with tempfile.TemporaryDirectory() as text:
        scratch = Path(text)
        with tarfile.open(HERE.parent / "image" / "fixtures.tar.xz") as tar:
            member = next(one for one in tar.getmembers() if one.name.endswith("small-docker20.tar"))
            tar.extract(member, scratch, filter="data")
        image = (scratch / member.name).rename(scratch / "image.tar")
        subprocess.run(
            [sys.executable, "-m", "ovlfs.cli.main", "layers", image, "--html", scratch / "layers.html"],
            env=os.environ | {"OVLFS_STORE": str(scratch / "store"), "PYTHONPATH": str(HERE.parent.parent)},
            check=True,
        )
        with Browser(scratch / "profile", width=1440, height=1180) as browser:
            browser.open(scratch / "layers.html")
            browser.click("#ghosts")
            for name in PATH:
                place = browser.run(
                    "[...document.querySelectorAll('.row')]"
                    f".find(row => row.querySelector('bdi').textContent === '{name}').dataset.place"
                )
                browser.click(f".row[data-place='{place}'] bdi")
            browser.run("scrollTo(0, 0)")
            browser.screenshot(HERE / "screenshot.png")


if __name__ == "__main__":
    main()
