"""How does an explanation look to people?

Takes the facts of explain.py, and knows nothing else: what it shows is what `--json` prints.  Each bracket names the
room to read: [merge] is ovlfs/layer/merge.py, [copy_up] ovlfs/overlay/copy_up.py.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ovlfs.explain.layers import instruction

Facts = dict[str, Any]
Row = tuple[str, str, str, str]
"""Name, who, what it says, what that means."""

_SHORT = 64
_LOOP_STEPS = 6
_NAMES = 6
_GO_ON = "keep looking below"


def text(facts: Facts) -> str:
    """The explanation, some lines without a newline at the end."""
    layers = {one["layer"]: one for one in facts["layers"]}
    steps = facts["steps"][:_LOOP_STEPS] if facts["error"] == "ELOOP" else facts["steps"]
    rows = [row for step in steps for row in _step_rows(step, layers)]
    if len(steps) < len(facts["steps"]):
        rows.append(("...", "", f"{len(facts['steps']) - len(steps)} steps more", ""))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [_verdict(facts, layers)]
    if facts["resolved"] != facts["path"]:
        lines.append(f"  symlinks lead to {facts['resolved']}")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append(("  " + "  ".join([*cells, row[3]])).rstrip())
    lines += _titled("hidden", [_hidden(one, layers) for one in facts["hidden"]])
    lines += _titled("write", _write(facts, layers))
    lines += _titled("layers", _layers(facts, layers))
    lines += _titled("note", facts["notes"])
    return "\n".join(lines)


# ---- the first line --------------------------------------------------------------------------------------------------


def _verdict(facts: Facts, layers: dict[int, Facts]) -> str:
    found = facts["object"]
    if found is None:
        what = "does not exist" if facts["error"] == "ENOENT" else f"cannot be reached ({facts['error']})"
        return f"{facts['path']} {what}: {facts['reason']}"
    what = f"{facts['path']} is a {found['kind']}"
    if found["size"] is not None:
        what += f", {_bytes(found['size'])}"
    if found["target"] is not None:
        what += f" to {found['target']}"
    if found["device"] is not None:
        what += f" {found['device'][0]}:{found['device'][1]}"
    if found["kind"] == "directory" and len(found["from"]) > 1:
        return f"{what}, merged from {_who(found['from'], layers)}"
    if found["metacopy"]:
        data = layers[found["data_from"]]
        return f"{what}: metadata from {layers[found['from'][0]]['name']}, data from {data['name']}{_made(data)}"
    layer = layers[found["attributes_from"]]
    return f"{what}, from {layer['name']}{_made(layer)}"


def _made(layer: Facts) -> str:
    """Where a layer comes from, in parentheses."""
    if layer["diff_id"] is None:
        return f" ({layer['where']})" if layer["where"] else ""
    created = f', created by "{_short(layer["created_by"])}"' if layer["created_by"] else ""
    return f" (diff_id {_digest(layer['diff_id'])}{created})"


def _digest(digest: str) -> str:
    return digest.rpartition(":")[2][:12]


def _short(line: str) -> str:
    """A line of history as the Dockerfile has it, shortened."""
    line = instruction(line).strip()
    return line if len(line) <= _SHORT else line[: _SHORT - 3] + "..."


# ---- the walk --------------------------------------------------------------------------------------------------------


def _step_rows(step: Facts, layers: dict[int, Facts]) -> list[Row]:
    rows: list[Row] = []

    def add(who: str, says: str, means: str) -> None:
        rows.append((step["name"] if not rows else "", who, says, means))

    groups = [list(group) for _, group in groupby(step["answers"], key=lambda one: {**one, "layer": None})]
    for answers in groups:
        first = answers[0]
        asked = "" if first["asked"] == step["name"] else f"{first['asked']}: "
        size = "" if first["size"] is None else f", {_bytes(first['size'])}"
        stops = "stop" in first["because"] or first["redirect"] is not None
        means = _means(first, last=answers is groups[-1], found=step["found"])
        add(
            _who([one["layer"] for one in answers], layers),
            f"{asked}{_plural(first['says']) if len(answers) > 1 else first['says']}{size}",
            f"{means}  [{first['room']}]" if stops else means,
        )
    for unasked in step["not_asked"]:
        asked = "" if unasked["asked"] == step["name"] else f"{unasked['asked']}: "
        add(_who(unasked["layers"], layers), f"{asked}not asked", "redirected away" if unasked["redirected"] else "")
    if step["follows"] is not None:
        add("", f"symlink to {step['follows']}", "followed inside the root")
    return rows


def _means(answer: Facts, *, last: bool, found: bool) -> str:
    means = str(answer["because"])
    if answer["redirect"]:
        return f"{means}, there as {answer['redirect']} (redirect)"
    if last and means.endswith(_GO_ON):
        return means.removesuffix(_GO_ON).rstrip(", ") if found else "no layer is left"
    return means


def _plural(says: str) -> str:
    return "directories" if says == "directory" else says


def _who(numbers: Sequence[int], layers: dict[int, Facts]) -> str:
    """`upper, layers 3, 2, 1`; a long run of layers is shortened to its ends."""
    names = [layers[number]["name"] for number in numbers]
    plain = [name.removeprefix("layer ") for name in names if name.startswith("layer ")]
    others = [name for name in names if not name.startswith("layer ")]
    parts = others[:1] if others[:1] == ["upper"] else []
    if len(plain) > 4:
        parts.append(f"layers {plain[0]} ... {plain[-1]}")
    elif plain:
        parts.append(f"layer{'s' if len(plain) > 1 else ''} {', '.join(plain)}")
    return ", ".join(parts + [name for name in others if name != "upper"])


# ---- below the walk --------------------------------------------------------------------------------------------------


def _titled(title: str, lines: list[str]) -> list[str]:
    return [f"{title if not index else '':<8}{line}" for index, line in enumerate(lines)]


def _hidden(hidden: Facts, layers: dict[int, Facts]) -> str:
    size = "" if hidden["size"] is None else f", {_bytes(hidden['size'])}"
    return f"{_who(hidden['layers'], layers)}: {hidden['path']}, {hidden['kind']}{size}; covered by {hidden['by']}"


def _write(facts: Facts, layers: dict[int, Facts]) -> list[str]:
    would, found = facts["write"], facts["object"]
    if would is None:
        return []
    begin = "on a writable mount: " if would["read_only"] else ""
    first = []
    if would["directories"]:
        what = "directory" if len(would["directories"]) == 1 else "directories"
        first = [f"after the {what} {', '.join(f'upper/{path}' for path in would['directories'])}"]
    if would["creates"]:
        over = ", in the place of its whiteout" if would["over_whiteout"] else ""
        return [f"{begin}making it would make upper/{would['upper']}{over}  [dir]", *first]
    where = f"upper/{would['upper']}".rstrip("/")
    if would["in_place"] and found["kind"] == "directory":
        return [f"{begin}making a name in it would change {where}, which is there already  [dir]"]
    if would["in_place"]:
        return [f"{begin}would change {where} in its place"]
    if found["kind"] == "directory":
        return [f"{begin}making a name in it would first make {where}, without its content  [copy_up]", *first]
    if found["kind"] != "regular file":
        return [f"{begin}would copy up the {found['kind']} to {where} via workdir/work  [copy_up]", *first]
    holes = "" if would["data_bytes"] == would["size_bytes"] else f" (of {would['size_bytes']}, the rest is holes)"
    data = f"{_bytes(would['data_bytes'])}{holes}"
    steps = f"in this order: {', '.join(would['steps'])}"
    if would["completes"]:
        source = layers[found["data_from"]]["name"]
        return [f"{begin}would copy {data} from {source} into {where}, which has the metadata  [copy_up]", steps]
    lines = [f"{begin}would copy up {data} to {where} via workdir/work  [copy_up]", *first, steps]
    if len(would["names"]) > 1:
        names = [f"upper/{name}" for name in would["names"][:_NAMES]]
        more = len(would["names"]) - len(names)
        lines.append(f"with all its names: {', '.join(names)}{f' and {more} more' if more else ''}")
    if would["size_bytes"] and would["metadata_alone"]:
        lines.append("a change of metadata alone (chmod, chown, rename) copies none of it  [copy_up: metacopy]")
    return lines


def _layers(facts: Facts, layers: dict[int, Facts]) -> list[str]:
    """Those that have something to do with it, and what made them."""
    involved = {one["layer"] for step in facts["steps"] for one in step["answers"] if one["says"] != "absent"}
    involved |= {number for one in facts["hidden"] for number in one["layers"]}
    lines = []
    for number in sorted(involved):
        layer = layers[number]
        if layer["diff_id"] is not None:
            lines.append(f"{layer['name']}: {_digest(layer['diff_id'])} {_short(layer['created_by'])}".rstrip())
        elif layer["where"]:
            lines.append(f"{layer['name']}: {layer['where']}")
    return lines


def _bytes(number: int) -> str:
    return f"{number} byte" if number == 1 else f"{number} bytes"
