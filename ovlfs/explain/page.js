// Draws the page from the facts inside it, with page_tree.js, page_walk.js and page_map.js, which stand before this file
// in one script.  It decides nothing: what hides what, and how far a lookup came, is in the facts; sums are made here.
// Names are hostile: they only ever become textContent, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const { layers, kinds, lists, names, parents, kind, says, notes } = facts;
const asked = (i) => lists[facts.asked[i]];
const sources = (i) => lists[facts.sources[i]];
const events = (i) => lists[facts.events[i]];
const top = layers.length;

// ---- what is derived from the facts: sums only -------------------------------------------------------------------

const count = names.length;
const children = Array.from({ length: count }, () => []);
const depth = new Int32Array(count);
const seen = new Float64Array(count);
const wasted = new Float64Array(count);
const owner = new Int32Array(count); // the layer whose colour a path has
let ghostCount = 0;
for (let i = 0; i < count; i += 1) {
  if (i > 0) {
    children[parents[i]].push(i);
    depth[i] = depth[parents[i]] + 1;
  }
  owner[i] = sources(i)[0] ?? says[i][0];
  ghostCount += kind[i] === 0 ? 1 : 0;
  for (const say of saysOf(i)) {
    if (say.counts) (say.wasted ? wasted : seen)[i] += say.bytes;
  }
}
for (let i = count - 1; i > 0; i -= 1) {
  seen[parents[i]] += seen[i];
  wasted[parents[i]] += wasted[i];
}

function saysOf(i) {
  const flat = says[i];
  const found = [];
  for (let at = 0; at < flat.length; at += 4) {
    const flags = flat[at + 3];
    found.push({ layer: flat[at], kind: kinds[flat[at + 1]], bytes: flat[at + 2], counts: (flags & 1) > 0, wasted: (flags & 2) > 0 });
  }
  return found;
}
const isDir = (i) => kinds[kind[i]] === "directory";
const mayOpen = (i) => children[i].length > 0;

function trail(i) {
  const found = [];
  for (let at = i; at >= 0; at = parents[at]) found.unshift(at);
  return found;
}
const pathOf = (i) => `/${trail(i).slice(1).map((at) => names[at]).join("/")}`;

// ---- words and elements ------------------------------------------------------------------------------------------

function human(bytes) {
  let size = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 999.5) return unit === "B" ? `${bytes} B` : `${Number(size.toPrecision(3))} ${unit}`;
    size /= 1000;
  }
  return `${Number(size.toPrecision(3))} TB`;
}
const many = (number, one, several = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : several}`;
function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}
const theLayers = (numbers) => `${numbers.length === 1 ? "layer" : "layers"} ${listed(numbers.map(String))}`;

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}
function add(parent, tag, className, text) {
  return parent.appendChild(make(tag, className, text));
}
const hue = (layer) => (top < 2 ? 255 : 255 - (230 * (layer - 1)) / (top - 1));
function coloured(element, layer) {
  element.style.setProperty("--hue", hue(layer).toFixed(1));
  return element;
}

// ---- state -------------------------------------------------------------------------------------------------------

let selected = 0;
let cursor = 0; // index into `shown`
let chosenLayer = 0;
const opened = new Set([0]);
const closed = new Set(); // while something is sought, all is open but these
let shown = []; // the rows of the tree: [path, place among its siblings, how many siblings]
let mapRoot = 0;
let mapWeights = seen;

// ---- head and stack ----------------------------------------------------------------------------------------------

function drawHead() {
  const total = layers.reduce((sum, layer) => sum + layer.bytes, 0);
  const waste = layers.reduce((sum, layer) => sum + layer.wasted_bytes, 0);
  const share = total > 0 ? ` (${((100 * waste) / total).toFixed(1)} %)` : "";
  for (const [number, words, className] of [
    [String(top), top === 1 ? "layer" : "layers", ""],
    [(count - 1 - ghostCount).toLocaleString("en"), "names in the merged tree", ""],
    [ghostCount.toLocaleString("en"), "names hidden", ""],
    [human(total), "in files", ""],
    [human(waste) + share, "wasted", "waste"],
  ]) {
    const item = add($("sums"), "li", className);
    add(item, "b", "", number);
    item.append(` ${words}`);
  }
}

function drawStack() {
  const most = Math.max(1, ...layers.map((layer) => layer.bytes));
  for (const layer of [...layers].reverse()) {
    const item = add($("stack"), "li");
    item.value = layer.number;
    const button = coloured(add(item, "button", "layer"), layer.number);
    button.type = "button";
    button.dataset.layer = layer.number;
    button.setAttribute("aria-pressed", "false");
    button.title = layer.created_by;
    const line = add(button, "span", "line");
    add(line, "span", "badge", String(layer.number));
    const counts = add(line, "span", "counts");
    for (const [sign, word] of [["+", "added"], ["~", "changed"], ["−", "deleted"]]) {
      const part = add(counts, "span", "", `${sign}${layer[word]}`);
      part.setAttribute("aria-label", `${layer[word]} ${word}`);
      part.title = word;
    }
    add(line, "span", "size", human(layer.bytes));
    add(button, "span", "made", layer.created_by || "no history");
    const bar = add(button, "span", "bar");
    const rest = layer.bytes - layer.wasted_bytes;
    add(bar, "i").style.width = `${(100 * rest) / most}%`;
    add(bar, "i", "wasted").style.width = `${(100 * layer.wasted_bytes) / most}%`;
    bar.title = `${human(layer.wasted_bytes)} wasted`;
    button.addEventListener("click", () => chooseLayer(chosenLayer === layer.number ? 0 : layer.number));
  }
}

function chooseLayer(layer) {
  chosenLayer = layer;
  closed.clear();
  for (const button of $("stack").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === layer));
  }
  listRows();
}

// ---- begin -------------------------------------------------------------------------------------------------------

drawHead();
drawStack();
if (ghostCount === 0) $("ghosts").closest("label").hidden = true;
for (const i of children[0]) if (children[0].length < 12 && children[i].length < 12) opened.add(i);
$("filter").addEventListener("input", () => { closed.clear(); listRows(); $("tree").scrollTop = 0; drawRows(); });
$("ghosts").addEventListener("change", listRows);
$("tree").addEventListener("scroll", drawRows, { passive: true });
$("tree").addEventListener("keydown", treeKey);
$("rows").addEventListener("click", (event) => {
  const element = event.target.closest(".row");
  if (!element) return;
  const i = shown[Number(element.dataset.place)][0];
  if (i === selected || event.target.closest(".twist")) toggle(i, !isOpen(i));
  else if (mayOpen(i) && !isOpen(i)) toggle(i, true);
  select(i);
});
$("by-size").addEventListener("click", () => measure(seen));
$("by-waste").addEventListener("click", () => measure(wasted));
$("map").addEventListener("keydown", mapKey);
new ResizeObserver(drawMap).observe($("map"));
new ResizeObserver(drawRows).observe($("tree"));
select(0);
