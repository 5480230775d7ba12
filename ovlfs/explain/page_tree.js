// The merged tree.  Only the rows in sight are elements, so that a hundred thousand paths cost nothing.
// See page.js, which comes after this in the same script.
"use strict";

const ROW = 26; // pixels, as in page.css

function sought() {
  const query = $("filter").value.toLowerCase();
  if (!query && !chosenLayer) return null;
  const keep = new Uint8Array(count);
  let found = 0;
  const whole = query.includes("/") ? query : "";
  for (let i = 0; i < count; i += 1) {
    if (kind[i] === 0 && !$("ghosts").checked && !chosenLayer) continue;
    if (chosenLayer && !saysOf(i).some((say) => say.layer === chosenLayer)) continue;
    if (query && !(whole ? pathOf(i) : names[i]).toLowerCase().includes(query)) continue;
    found += 1;
    for (let at = i; at >= 0 && keep[at] === 0; at = parents[at]) keep[at] = 1;
  }
  return { keep, found };
}

function listRows() {
  const search = sought();
  const ghosts = $("ghosts").checked || chosenLayer > 0;
  const at = selected;
  shown = [];
  const todo = [[0, 1, 1]];
  while (todo.length > 0) {
    const row = todo.pop();
    shown.push(row);
    const i = row[0];
    if (!(search ? !closed.has(i) : opened.has(i))) continue;
    const inside = children[i].filter((child) => (search ? search.keep[child] === 1 : ghosts || kind[child] !== 0));
    for (let place = inside.length; place > 0; place -= 1) todo.push([inside[place - 1], place, inside.length]);
  }
  cursor = Math.max(0, shown.findIndex((row) => row[0] === at));
  let note = "";
  if (search) note = search.found === 0 ? "Nothing fits." : many(search.found, "path fits.", "paths fit.");
  if (chosenLayer) note += ` Only what layer ${chosenLayer} says is shown.`;
  $("tree-note").textContent = note;
  drawRows();
}

function isOpen(i) {
  return mayOpen(i) && (chosenLayer || $("filter").value ? !closed.has(i) : opened.has(i));
}

function drawRows() {
  const tree = $("tree");
  const rows = $("rows");
  rows.style.height = `${shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(tree.scrollTop / ROW) - 8);
  const last = Math.min(shown.length, Math.ceil((tree.scrollTop + tree.clientHeight) / ROW) + 8);
  const drawn = document.createDocumentFragment();
  for (let place = first; place < last; place += 1) drawn.append(row(place));
  rows.replaceChildren(drawn);
  const active = shown[cursor] && cursor >= first && cursor < last ? `row-${shown[cursor][0]}` : "";
  if (active) tree.setAttribute("aria-activedescendant", active);
  else tree.removeAttribute("aria-activedescendant");
}

function row(place) {
  const [i, order, siblings] = shown[place];
  const ghost = kind[i] === 0;
  const element = coloured(make("div", `row${isDir(i) ? " dir" : ""}${ghost ? " ghost" : ""}${place === cursor ? " at" : ""}`), owner[i]);
  element.id = `row-${i}`;
  element.dataset.place = place;
  element.setAttribute("role", "treeitem");
  element.setAttribute("aria-level", depth[i] + 1);
  element.setAttribute("aria-posinset", order);
  element.setAttribute("aria-setsize", siblings);
  element.setAttribute("aria-selected", String(i === selected));
  if (mayOpen(i)) element.setAttribute("aria-expanded", String(isOpen(i)));
  element.style.top = `${place * ROW}px`;
  element.style.paddingLeft = `${6 + Math.min(depth[i], 13) * 14}px`;
  const mark = mayOpen(i) ? (isOpen(i) ? "▾" : "▸") : "";
  add(element, "span", "twist", mark).setAttribute("aria-hidden", "true");
  add(element, "span", "dot").title = ghost ? "hidden" : theLayers(sources(i));
  add(element, "bdi", "", i === 0 ? "/" : names[i] + (isDir(i) ? "/" : ""));
  if (kinds[kind[i]] === "symlink" && notes[i]) add(element, "bdi", "target", `→ ${notes[i]}`);
  const bytes = ghost ? wasted[i] : seen[i];
  if (bytes > 0) add(element, "span", "bytes", human(bytes));
  return element;
}

function toggle(i, open) {
  if (!mayOpen(i)) return;
  if (chosenLayer || $("filter").value) open ? closed.delete(i) : closed.add(i);
  else if (open) opened.add(i);
  else opened.delete(i);
  listRows();
}

function moveTo(place) {
  cursor = Math.max(0, Math.min(shown.length - 1, place));
  select(shown[cursor][0]);
}

function scrollToCursor() {
  const tree = $("tree");
  const y = cursor * ROW;
  if (y < tree.scrollTop) tree.scrollTop = y;
  else if (y + ROW > tree.scrollTop + tree.clientHeight) tree.scrollTop = y + ROW - tree.clientHeight;
}

function treeKey(event) {
  const i = shown[cursor][0];
  const page = Math.max(1, Math.floor($("tree").clientHeight / ROW) - 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length };
  if (event.key in moves) moveTo(cursor + moves[event.key]);
  else if (event.key === "ArrowRight") isOpen(i) ? moveTo(cursor + 1) : toggle(i, true);
  else if (event.key === "ArrowLeft") isOpen(i) ? toggle(i, false) : i > 0 && select(parents[i]);
  else if (event.key === "Enter" || event.key === " ") toggle(i, !isOpen(i));
  else return;
  event.preventDefault();
}

function select(i) {
  selected = i;
  for (let at = parents[i]; at >= 0; at = parents[at]) {
    opened.add(at);
    closed.delete(at);
  }
  if (kind[i] === 0 && !chosenLayer) $("ghosts").checked = true;
  listRows();
  if (shown[cursor][0] !== i) {
    $("filter").value = "";
    chooseLayer(0);
  }
  scrollToCursor();
  drawRows();
  drawWalk();
  markTile();
}
