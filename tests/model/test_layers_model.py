"""What each layer of a random stack brought, against the flattened truth with and without it."""

from hypothesis import example, given, settings
from stacks import Content, Item, Shown, as_tar, flatten, stacks

from ovlfs.explain.layers import Made, gather


def flattened(stack: list[Content], first: int) -> dict[str, Shown]:
    """The tree that layer `first` and those below it make; layers are numbered as in the whole stack."""
    return {path: one._replace(layer=one.layer + first) for path, one in flatten(stack[first:]).items()}


def happened(old: Shown | None, new: Shown | None) -> str:
    if old is None or new is None:
        return "added" if old is None else "deleted"
    return "changed" if old != new and (old.kind, new.kind) != ("dir", "dir") else ""


@given(stacks)
@settings(max_examples=150, deadline=None)
@example([{"a": Item("opaque", 1), "a/b": Item("file", 2)}, {"a": Item("dir", 3), "a/b": Item("file", 4)}])
@example([{"a": Item("file", 1)}, {"a": Item("dir", 3), "a/b": Item("dir", 4), "a/b/c": Item("file", 5)}])
@example([{"a": Item("whiteout", 0)}, {"a": Item("file", 7), "b": Item("link", 0, "a")}])
def test_layers_say_what_the_flattened_trees_show(stack: list[Content]) -> None:
    """Added, changed and deleted names, wasted bytes, and what every path of the merged tree is."""
    facts = gather([as_tar(layer, number) for number, layer in enumerate(stack)], [Made()] * len(stack))
    merged = flatten(stack)
    events: dict[str, list[tuple[int, str]]] = {}
    for index in reversed(range(len(stack))):
        number = len(stack) - index
        layer = facts.layers[number - 1]
        new, old = flattened(stack, index), flattened(stack, index + 1)
        counts = {"added": 0, "changed": 0, "deleted": 0}
        for path in new.keys() | old.keys():
            event = happened(old.get(path), new.get(path))
            if event:
                events.setdefault(path, []).append((number, event))
                counts[event] += 1
        assert {"added": layer.added, "changed": layer.changed, "deleted": layer.deleted} == counts
        held = {path: item.number for path, item in stack[index].items() if item.kind == "file"}
        kept = {shown.owner for shown in merged.values() if shown.layer == index}
        assert layer.bytes == sum(held.values())
        assert layer.wasted_bytes == sum(size for path, size in held.items() if path not in kept)
    for node in list(facts.root.walk())[1:]:
        name = node.path().decode()[1:]
        shown = merged.get(name)
        assert list(node.events) == events.get(name, [])
        assert node.kind == ("" if shown is None else "directory" if shown.kind == "dir" else shown.kind)
        assert bool(node.sources) == (shown is not None)
        if shown is not None:
            assert node.sources[0] == len(stack) - shown.layer
            assert node.sources[-1] in node.asked
    counted = sum(say.bytes for node in facts.root.walk() for say in node.says if say.counts)
    assert counted == sum(layer.bytes for layer in facts.layers)
