"""How does a page show the layers of a hostile image, and need nothing but a browser?

The page is one file: page.html with page.css, page.js and the facts put in.  The facts are JSON in a script element of
a type that no browser runs; `<`, `>` and `&` in it are escaped, so no name in an image can end the element, and
page.js only ever sets textContent.  Its Content-Security-Policy names the hashes of the one style and the one script
and forbids everything else, so that even a mistake in both could load and run nothing.

Names are shown as errors.printable() shows them: bytes that are no UTF-8, controls and marks of direction are escapes.

Spec: HTML, 4.12.1.3 "Restrictions for contents of script elements"; CSP level 3, 8.4 (hashes).
"""

import base64
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Hashable, Iterator
from importlib import resources
from typing import Any

from ovlfs import __version__
from ovlfs.errors import OvlfsError, printable
from ovlfs.explain.layers import Facts, Path, instruction

MAX_NAMES = 400_000
"""A page with more paths than that would be larger than a browser likes to open (some 60 bytes a path)."""

_SCRIPTS = ("page_tree.js", "page_walk.js", "page_map.js", "page.js")


def write_page(out: bytes, facts: Facts, *, title: str) -> None:
    """Write the page to `out`, which is replaced at once or not at all.

    Raises OvlfsError: too many paths; OSError.
    """
    text = build_page(facts, title=title)
    if os.path.exists(out) and not os.path.isfile(out):  # /dev/stdout, a fifo: nothing to replace
        with open(out, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    out = os.path.realpath(out)  # a symlink stays, and what it leads to is replaced
    fd, temp = tempfile.mkstemp(dir=os.path.dirname(out), prefix=b".ovlfs-", suffix=b".html")
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        os.rename(temp, out)
    except BaseException:
        os.unlink(temp)
        raise


def build_page(facts: Facts, *, title: str) -> str:
    """The page, as text."""
    style, script = _part("page.css"), _script()
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(title),
        "version": html.escape(__version__),
        "style": style,
        "script": script,
        "facts": _embedded(payload(facts)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html"))


def _part(name: str) -> str:
    return resources.files("ovlfs.explain").joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    """The scripts as one function, so that none of their names is the window's."""
    return "(() => {\n" + "\n".join(map(_part, _SCRIPTS)) + "})();\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(facts: dict[str, Any]) -> str:
    """JSON that may stand in a script element: its text has no character that HTML gives a meaning."""
    text = json.dumps(facts, separators=(",", ":"))  # ASCII only: no line separators, no lone surrogates
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


class _Numbered:
    """Values that occur often, each kept once and named by its place."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}

    def of(self, value: Hashable) -> int:
        return self._places.setdefault(value, len(self._places))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._places)


def payload(facts: Facts) -> dict[str, Any]:
    """What the page is made of: the layers, and the paths as columns, a directory before what is in it.

    `says` has four numbers for each layer that says something: layer, kind, bytes, and 1 (counts here) + 2 (wasted).
    `asked`, `sources` and `events` are places in `lists`, `kind` and the kinds in `says` places in `kinds`.
    """
    kinds, lists = _Numbered(), _Numbered()
    kinds.of("")
    places: dict[Path, int] = {}
    names: list[str] = []
    parents: list[int] = []
    columns: dict[str, list[int]] = {"kind": [], "asked": [], "sources": [], "events": []}
    says: list[list[int]] = []
    notes: dict[int, str] = {}
    for number, path in enumerate(facts.root.walk()):
        if number >= MAX_NAMES:
            raise OvlfsError(f"the image has more than {MAX_NAMES} paths, too many for a page")
        places[path] = number
        names.append(printable(path.name))
        parents.append(-1 if path.parent is None else places[path.parent])
        columns["kind"].append(kinds.of(path.kind if path.sources else ""))
        columns["asked"].append(lists.of(path.asked))
        columns["sources"].append(lists.of(path.sources))
        columns["events"].append(lists.of(path.events))
        flat: list[int] = []
        for say in path.says:
            flat += (say.layer, kinds.of(say.kind), say.bytes, say.counts + 2 * say.wasted)
        says.append(flat)
        if path.damage:
            notes[number] = printable(path.damage)
        elif path.target:
            notes[number] = printable(path.target)
    layers = [layer | {"created_by": printable(instruction(layer["created_by"]))} for layer in facts.describe()]
    return {
        "layers": layers,
        "kinds": list(kinds),
        "lists": list(lists),
        "names": names,
        "parents": parents,
        **columns,
        "says": says,
        "notes": notes,
    }
