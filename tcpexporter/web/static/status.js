// SPDX-License-Identifier: GPL-3.0-only
// Updates the status page with the data of api/v1/connections, and sorts and filters it.
"use strict";

const WIDTH = 120;
const HEIGHT = 20;
const PATIENCE_MS = 10000;
const SVG = "http://www.w3.org/2000/svg";

const body = document.querySelector("#series tbody");
const heads = [...document.querySelectorAll("#series th")];
const filter = document.getElementById("filter");
const shown = document.getElementById("shown");
const stale = document.getElementById("stale");
const rows = new Map();
let data = null;
let etag = "";
let sorting = { column: heads.findIndex((each) => each.ariaSort), down: true };

function element(name, attributes = {}, text = "") {
  const made = SVG_NAMES.has(name)
    ? document.createElementNS(SVG, name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}
const SVG_NAMES = new Set(["svg", "rect", "path"]);

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const number = (value) => (value === null ? "-" : value.toLocaleString("en"));
const rate = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });

// A row of the data is: labels, established, long-term, clients, opened and closed per
// minute, ages, levels of the last 15 minutes, the largest number.
function cells(row) {
  const [labels, established, longTerm, clients, opened, closed] = row;
  return [...labels, number(established), number(longTerm), number(clients), rate(opened), rate(closed)];
}

function sortKey(row, column) {
  const count = data.labels.length;
  if (column < count) return row[0][column];
  return [row[1], row[2], row[3] ?? -1, row[4], row[5], row[1], row[8]][column - count];
}

function compare(one, other) {
  const a = sortKey(one, sorting.column);
  const b = sortKey(other, sorting.column);
  const order =
    typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return sorting.down ? -order : order;
}

function ages(row) {
  const total = row[6].reduce((sum, each) => sum + each, 0);
  const parts = row[6].map((each, at) => `${number(each)} ${data.age_segments[at]}`);
  const svg = element("svg", {
    class: "ages", role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none", "aria-label": parts.join(", "),
  });
  let x = 0;
  row[6].forEach((each, at) => {
    if (!each) return;
    const width = (WIDTH * each) / total;
    const share = row[6].length > 1 ? at / (row[6].length - 1) : 1;
    const fill = `color-mix(in srgb, var(--age-1) ${Math.round(100 * share)}%, var(--age-0))`;
    svg.append(element("rect", { x, y: 0, width, height: HEIGHT, fill }));
    x += width;
  });
  return svg;
}

function spark(row) {
  const [, established, , , , , , levels, largest] = row;
  const svg = element("svg", {
    class: "spark", role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    "aria-label": `at most ${number(largest)} in 15 minutes, now ${number(established)}`,
  });
  // A single point would not be visible.
  svg.append(element("path", { d: line(levels) && `${line(levels)}h-2` }));
  return svg;
}

function line(levels) {
  const step = WIDTH / (levels.length - 1);
  let path = "";
  [...levels].forEach((level, at) => {
    if (level === "-") return;
    const y = HEIGHT - 1 - (parseInt(level, 16) / 15) * (HEIGHT - 2);
    path += `${path ? "L" : "M"}${(at * step).toFixed(1)} ${y.toFixed(1)}`;
  });
  return path;
}

function rowOf(row) {
  const key = JSON.stringify(row[0]);
  let made = rows.get(key);
  if (!made) {
    made = element("tr");
    cells(row).forEach((_, at) =>
      made.append(element("td", at < data.labels.length ? { class: "label" } : {})));
    made.append(element("td"), element("td"));
    rows.set(key, made);
  }
  const texts = cells(row);
  texts.forEach((text, at) => setText(made.cells[at], text));
  const state = JSON.stringify([row[6], row[7], row[8]]);
  if (made.state !== state) {
    made.state = state;
    made.cells[texts.length].replaceChildren(ages(row));
    made.cells[texts.length + 1].replaceChildren(spark(row));
  }
  return made;
}

function showRows() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = data.rows.filter((row) => {
    const text = row[0].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  chosen.sort(compare);
  body.replaceChildren(...chosen.map(rowOf));
  setText(shown, `${number(chosen.length)} of ${number(data.rows.length)} series`);
}

function showSummary() {
  for (const name of ["connections", "long_term", "clients"])
    setText(document.getElementById(name), number(data[name]));
  const trust = document.getElementById("trust");
  setText(trust, data.trust);
  trust.className = data.uncertain === 0 ? "exact" : "uncertain";
  setText(document.getElementById("compared"), data.compared);
  const list = document.getElementById("expected");
  list.replaceChildren(...data.expected.map((each) => element(
    "li", { class: each.is_met ? "met" : "missing" }, each.text)));
}

function forget() {
  const known = new Set(data.rows.map((row) => JSON.stringify(row[0])));
  for (const key of rows.keys()) if (!known.has(key)) rows.delete(key);
}

async function update() {
  const headers = etag ? { "if-none-match": etag } : {};
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const response = await fetch("api/v1/connections", { headers, signal });
    if (response.status === 200) {
      etag = response.headers.get("etag") || "";
      const labels = data && data.labels.join();
      data = await response.json();
      if (labels !== null && labels !== data.labels.join()) location.reload();
      forget();
      showSummary();
      showRows();
    } else if (response.status !== 304) {
      throw new Error(`it answers ${response.status}`);
    }
    stale.hidden = true;
  } catch (error) {
    if (stale.hidden) {
      const since = new Date().toLocaleTimeString();
      setText(stale, `No data from the exporter since ${since} (${error.message}).`);
      stale.hidden = false;
    }
  }
  setTimeout(update, 1000 * ((data && data.interval_s) || 5));
}

function sortBy(column) {
  const down = sorting.column === column ? !sorting.down : column >= data.labels.length;
  sorting = { column, down };
  heads.forEach((each, at) => {
    if (at === column) each.setAttribute("aria-sort", down ? "descending" : "ascending");
    else each.removeAttribute("aria-sort");
  });
  showRows();
}

heads.forEach((each, column) => {
  const button = element("button", { type: "button" }, each.textContent);
  button.addEventListener("click", () => data && sortBy(column));
  each.replaceChildren(button);
});
document.getElementById("filtering").hidden = false;
filter.addEventListener("input", () => data && showRows());
update();
