// Where the bytes are: a squarified treemap (Bruls, Huizing, van Wijk 2000).
// See page.js, which comes after this in the same script.
"use strict";

const LEAST = 5; // pixels
const TILES = 1200;

function squarify(items, box, draw) {
  let { x, y, w, h } = box;
  let total = items.reduce((sum, item) => sum + item.weight, 0);
  let at = 0;
  while (at < items.length && w > 0 && h > 0) {
    const short = Math.min(w, h);
    const scale = (w * h) / total;
    let sum = 0;
    let worst = Infinity;
    let end = at;
    while (end < items.length) {
      const next = sum + items[end].weight;
      const side = (next * scale) / short;
      const ratio = Math.max(...[items[at].weight, items[end].weight].map((weight) => {
        const other = (weight * scale) / side;
        return Math.max(side / other, other / side);
      }));
      if (ratio > worst) break;
      worst = ratio;
      sum = next;
      end += 1;
    }
    const side = end === items.length ? (w < h ? h : w) : (sum * scale) / short;
    let along = 0;
    for (; at < end; at += 1) {
      const length = (items[at].weight / sum) * short;
      draw(items[at], w < h ? { x: x + along, y, w: length, h: side } : { x, y: y + along, w: side, h: length });
      along += length;
    }
    total -= sum;
    if (w < h) [y, h] = [y + side, h - side];
    else [x, w] = [x + side, w - side];
  }
}

function drawMap() {
  const map = $("map");
  const hadFocus = map.contains(document.activeElement);
  map.replaceChildren();
  map.classList.toggle("wasting", mapWeights === wasted);
  const crumbs = $("map-crumbs");
  crumbs.replaceChildren();
  for (const at of trail(mapRoot)) {
    if (at > 0 && parents[at] > 0) add(crumbs, "span", "", "/").setAttribute("aria-hidden", "true");
    crumbs.append(crumb(at, at === mapRoot, () => zoom(at)));
  }
  const bytes = mapWeights[mapRoot];
  $("map-note").textContent = bytes > 0
    ? `${human(bytes)} below ${pathOf(mapRoot)}. A colour is a layer. An inode with several names is drawn at one of them.`
    : "";
  if (bytes === 0) {
    add(map, "p", "empty", mapWeights === wasted ? "Nothing is wasted here." : "There are no bytes here.");
    return;
  }
  fill(mapRoot, { x: 0, y: 0, w: map.clientWidth, h: map.clientHeight });
  const tiles = map.querySelectorAll("button");
  if (tiles.length > 0) tiles[0].tabIndex = 0;
  if (hadFocus && tiles.length > 0) tiles[0].focus();
  markTile();
}

function fill(directory, box) {
  const map = $("map");
  const area = box.w * box.h;
  const total = mapWeights[directory];
  const items = [];
  const rest = { weight: 0, number: 0 };
  for (const i of children[directory]) {
    if (mapWeights[i] <= 0) continue;
    if ((mapWeights[i] / total) * area < LEAST * LEAST * 2 || map.childElementCount > TILES) {
      rest.weight += mapWeights[i];
      rest.number += 1;
    } else items.push({ i, weight: mapWeights[i] });
  }
  items.sort((one, other) => other.weight - one.weight);
  if (rest.number > 0 && (rest.weight / total) * area >= LEAST * LEAST) items.push(rest);
  squarify(items, box, (item, at) => {
    const tile = "i" in item ? tileOf(item.i, at) : restOf(item, at);
    tile.style.left = `${at.x}px`;
    tile.style.top = `${at.y}px`;
    tile.style.width = `${at.w}px`;
    tile.style.height = `${at.h}px`;
    if ("i" in item && tile.classList.contains("dir") && at.w > 46 && at.h > 42) {
      fill(item.i, { x: at.x + 3, y: at.y + 19, w: at.w - 6, h: at.h - 22 });
    }
  });
}

function restOf(item, at) {
  const tile = add($("map"), "div", "tile rest");
  tile.title = `${item.number} more, ${human(item.weight)}`;
  if (at.w > 46 && at.h > 15) add(tile, "span", "label", `${item.number} more`);
  return tile;
}

function tileOf(i, at) {
  const inside = children[i].some((child) => mapWeights[child] > 0);
  const tile = add($("map"), "button", inside ? "tile dir" : "tile");
  tile.type = "button";
  tile.tabIndex = -1;
  tile.dataset.path = i;
  const counted = saysOf(i).filter((say) => say.counts && say.wasted === (mapWeights === wasted));
  const layer = counted.sort((one, other) => other.bytes - one.bytes)[0]?.layer ?? owner[i];
  coloured(tile, layer);
  const [gone] = events(i).find(([number, event]) => number > layer && event !== "added") ?? [0];
  const since = mapWeights === wasted && gone > 0 ? `, hidden since layer ${gone}` : "";
  const words = `${pathOf(i)}, ${human(mapWeights[i])}${inside ? "" : `, layer ${layer}${since}`}`;
  tile.title = words;
  tile.setAttribute("aria-label", words);
  if (at.w > 24 && at.h > 15) add(tile, "span", "label").append(make("bdi", "", names[i] + (inside ? "/" : "")));
  tile.addEventListener("click", () => (inside ? zoom(i) : select(i)));
  return tile;
}

function zoom(i) {
  mapRoot = i;
  drawMap();
  select(i);
}

function markTile() {
  for (const tile of $("map").querySelectorAll("button")) {
    if (Number(tile.dataset.path) === selected) tile.setAttribute("aria-current", "true");
    else tile.removeAttribute("aria-current");
  }
}

function mapKey(event) {
  const tiles = [...$("map").querySelectorAll("button")];
  const at = tiles.indexOf(document.activeElement);
  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (event.key in moves && tiles.length > 0) {
    const next = tiles[(at + moves[event.key] + tiles.length) % tiles.length];
    if (at >= 0) tiles[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else if ((event.key === "Backspace" || event.key === "Escape") && mapRoot > 0) zoom(parents[mapRoot]);
  else return;
  event.preventDefault();
}

function measure(weights) {
  mapWeights = weights;
  $("by-size").setAttribute("aria-pressed", String(weights === seen));
  $("by-waste").setAttribute("aria-pressed", String(weights === wasted));
  drawMap();
}
