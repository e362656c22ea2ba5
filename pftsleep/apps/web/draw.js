// Canvases in the colours of the style sheet, sharp on every screen; tables and numbers.
"use strict";

const STAGES = ["W", "REM", "N1", "N2", "N3"]; // from top to bottom, as hypnograms are drawn
const NAMES = {W: "wake", REM: "REM sleep", N1: "stage N1", N2: "stage N2", N3: "stage N3", UNSCORED: "unscored"};
const ORDER = ["W", "N1", "N2", "N3", "REM"]; // of the probabilities
const MARGIN = {left: 46, right: 10};

const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name.toLowerCase()).trim();

function surface(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * ratio)); canvas.height = Math.max(1, Math.round(box.height * ratio));
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle"; g.fillStyle = color("ink");
  return {g, width: box.width, height: box.height, inner: Math.max(1, box.width - MARGIN.left - MARGIN.right)};
}

function stroke(g, points, ink = "ink", width = 1) {
  g.strokeStyle = color(ink); g.lineWidth = width; g.beginPath();
  points.forEach(([x, y], i) => i ? g.lineTo(x, y) : g.moveTo(x, y));
  g.stroke();
}

// Hatched, so that what is missing differs by more than its colour.
function missing(g, x, y, width, height) {
  g.save(); g.beginPath(); g.rect(x, y, width, height); g.clip();
  g.globalAlpha = .18; g.fillStyle = color("unscored"); g.fillRect(x, y, width, height); g.globalAlpha = .7;
  for (let d = Math.floor((x - height) / 6) * 6; d < x + width; d += 6) stroke(g, [[d, y + height], [d + height, y]], "unscored");
  g.restore();
}

const clock = (start, seconds) => {
  if (start === null) { const m = Math.floor(seconds / 60); return `${Math.floor(m / 60)} h ${String(m % 60).padStart(2, "0")} min`; }
  const t = new Date(new Date(start + "Z").getTime() + seconds * 1000); // naive local time: never moved to the browser's zone
  return t.toISOString().slice(11, t.getUTCSeconds() ? 19 : 16);
};

function cursor(s, x) {
  s.g.save(); stroke(s.g, [[x, 0], [x, s.height]], "paper", 4); stroke(s.g, [[x, 0], [x, s.height]], "ink", 2); s.g.restore();
}

function fillTable(table, rows) {
  const cell = (tag, role, text) => { const e = document.createElement(tag); e.setAttribute("role", role); e.textContent = text; return e; }; // roles: a phone lays the rows out as boxes
  table.querySelector("tbody").replaceChildren(...rows.map(([name, value, definition]) => {
    const tr = cell("tr", "row", ""), th = cell("th", "rowheader", name);
    th.scope = "row"; tr.append(th, cell("td", "cell", value), cell("td", "cell", definition));
    return tr;
  }));
}

const rounded = value => String(Math.abs(value) >= 100 ? Math.round(value * 10) / 10 : +value.toPrecision(3));
const shown = (value, unit) => value === null || value === undefined ? "not known" : `${typeof value === "number" ? rounded(value) : value}${unit && unit !== "count" ? " " + unit : ""}`;

// A blue-to-yellow scale that is read the same by people who see colours differently (after Cividis).
const SCALE = [[0, 32, 76], [38, 60, 109], [85, 91, 108], [124, 123, 120], [166, 157, 117], [211, 193, 100], [255, 233, 69]];
function heat(v) {
  const x = Math.min(1, Math.max(0, v)) * (SCALE.length - 1), i = Math.min(SCALE.length - 2, Math.floor(x)), f = x - i;
  return SCALE[i].map((c, k) => Math.round(c + f * (SCALE[i + 1][k] - c)));
}
