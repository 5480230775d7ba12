// The walk of one lookup through the layers: who was asked, what it said, and where the lookup stopped.
// See page.js, which comes after this in the same script.
"use strict";

function verdict(i) {
  const from = sources(i);
  const what = kinds[kind[i]];
  if (what === "directory") {
    return from.length > 1 ? `A directory, merged from ${theLayers(from)}.` : `A directory of layer ${from[0]} alone.`;
  }
  if (what) {
    const say = saysOf(i).find((one) => one.layer === from.at(-1));
    const size = what === "file" && say ? `, ${human(say.bytes)}` : "";
    const target = what === "symlink" && notes[i] ? ` to ${notes[i]}` : "";
    return `You see a ${what}${target} of layer ${from[0]}${size}.`;
  }
  if (notes[i]) return `A lookup fails: ${notes[i]}.`;
  const reached = asked(i);
  if (reached.length > 0) {
    const last = saysOf(i).find((say) => say.layer === reached.at(-1));
    if (last?.kind === "whiteout") return `There is no such name: layer ${last.layer} has a whiteout for it.`;
    return `There is no such name: the directory shows ${theLayers(sources(parents[i]))} only, and what is below is hidden.`;
  }
  const way = trail(i);
  const end = way.findIndex((at) => !isDir(at));
  const why = kind[way[end]] === 0 ? "is gone" : `is a ${kinds[kind[way[end]]]}`;
  return `A lookup does not come here: ${pathOf(way[end])} ${why}.`;
}

function step(i, layer, say) {
  const isAsked = asked(i).includes(layer);
  const serves = sources(i).includes(layer);
  const size = say && say.bytes > 0 ? `, ${human(say.bytes)}` : "";
  if (!isAsked) {
    const rule = say ? `Hidden: the lookup does not come this far${say.wasted ? ", its bytes are wasted" : ""}.` : "";
    return { css: "unasked", what: say ? say.kind + size : unasked(i, layer), rule };
  }
  if (!say) return { css: "silent", what: "says nothing", rule: "" };
  switch (say.kind) {
    case "whiteout":
      return { css: "stop", what: "whiteout", rule: "The name is gone. Nothing below is asked." };
    case "opaque directory":
      return { css: serves ? "merge stop" : "stop", what: say.kind, rule: serves ? "It shows, and nothing below merges with it." : "It cannot be what is sought, and ends the lookup." };
    case "directory":
      return serves
        ? { css: "merge", what: say.kind, rule: sources(i)[0] === layer ? "It shows, and directories of this name further down merge with it." : "It merges with the one above." }
        : { css: "stop", what: say.kind, rule: "It cannot have the data of a file, and ends the lookup." };
    case "hard link below":
      return { css: "win", what: "hard link", rule: `It wins, and leads to an inode of ${theLayers(sources(i))}.` };
    default:
      return serves
        ? { css: "win", what: say.kind + size, rule: "No directory: it wins, and hides all of this name below." }
        : { css: "stop", what: say.kind + size, rule: "No directory: it cannot merge, and ends the lookup." };
  }
}

function unasked(i, layer) {
  if (layer < (asked(i).at(-1) ?? Infinity)) return "not asked";
  const parent = parents[i];
  const has = saysOf(parent).some((say) => say.layer === layer);
  const path = pathOf(parent);
  return has ? "not asked" : `has no ${path.length < 40 ? path : "such directory"}, is not asked`;
}

function drawWalk() {
  const i = selected;
  const way = trail(i);
  const crumbs = $("crumbs");
  crumbs.replaceChildren();
  for (const at of way) {
    if (at > 0 && parents[at] > 0) add(crumbs, "span", "", "/").setAttribute("aria-hidden", "true");
    crumbs.append(crumb(at, at === i, () => select(at)));
  }
  $("verdict").textContent = verdict(i);
  const list = $("walk");
  list.replaceChildren();
  list.scrollTop = 0;
  const said = new Map(saysOf(i).map((say) => [say.layer, say]));
  const changes = new Map(events(i));
  const reached = asked(i);
  const last = reached.at(-1) ?? top + 1;
  if (reached.length === 0) list.append(endMark("the lookup does not come here", false));
  for (let layer = top; layer > 0; layer -= 1) {
    const say = said.get(layer);
    const { css, what, rule } = step(i, layer, say);
    const bottom = !say ? lastSilent(layer, said, reached, last) : layer; // several that say nothing are one row
    const isFirst = bottom <= reached[0] && layer >= reached[0];
    const isLast = bottom <= last && layer >= last;
    const item = coloured(add(list, "li", `step ${css}${isLast ? " last" : ""}${isFirst ? " first" : ""}`), layer);
    add(item, "span", "badge", bottom < layer ? `${layer}–${bottom}` : String(layer));
    const line = add(item, "span", "says");
    add(line, "span", "what", what);
    if (changes.has(layer)) add(line, "span", "event", `${changes.get(layer)} by this layer`);
    if (rule) add(item, "span", "rule", rule);
    const made = layers[layer - 1].created_by;
    if (say && made) add(item, "span", "made", made).title = made;
    layer = bottom;
    if (isLast) {
      const below = [...said.keys()].some((number) => number < layer) || layer > (i > 0 ? sources(parents[i]).at(-1) : 1);
      const stops = layer > 1 && (/stop|win/.test(css) || below);
      list.append(endMark(stops ? "the lookup stops here" : "no layer is left to ask", !stops));
    }
  }
}

function lastSilent(layer, said, reached, last) {
  let bottom = layer;
  const isAsked = reached.includes(layer);
  const word = isAsked ? "" : unasked(selected, layer);
  while (bottom > 1 && bottom !== last && !said.has(bottom - 1) && reached.includes(bottom - 1) === isAsked && (isAsked || unasked(selected, bottom - 1) === word)) bottom -= 1;
  return bottom;
}

function endMark(text, through) {
  return make("li", `end${through ? " through" : ""}`, text);
}

function crumb(at, current, act) {
  const button = make("button", kind[at] === 0 ? "gone" : "");
  button.type = "button";
  if (current) button.setAttribute("aria-current", "location");
  add(button, "bdi", "", at === 0 ? "/" : names[at]);
  button.addEventListener("click", act);
  return button;
}
