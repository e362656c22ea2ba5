// Canvases in the colours of the style sheet, sharp on every screen.
"use strict";

const STAGES = ["W", "REM", "N1", "N2", "N3"]; // from top to bottom, as hypnograms are drawn
const NAMES = {W: "wake", REM: "REM sleep", N1: "stage N1", N2: "stage N2", N3: "stage N3", UNSCORED: "unscored"};
const ORDER = ["W", "N1", "N2", "N3", "REM"]; // of the probabilities
const MARGIN = {left: 46, right: 8};

const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name.toLowerCase()).trim();

function surface(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * ratio)); canvas.height = Math.max(1, Math.round(box.height * ratio));
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle"; g.fillStyle = color("ink");
  return {g, width: box.width, height: box.height, inner: Math.max(1, box.width - MARGIN.left - MARGIN.right)};
}

const clock = (start, seconds) => {
  if (start === null) { const m = Math.floor(seconds / 60); return `${Math.floor(m / 60)} h ${String(m % 60).padStart(2, "0")} min`; }
  const t = new Date(new Date(start + "Z").getTime() + seconds * 1000); // naive local time: never moved to the browser's zone
  return t.toISOString().slice(11, seconds % 60 ? 19 : 16);
};

function cursor(s, x, width = 1) {
  s.g.save(); s.g.strokeStyle = color("ink"); s.g.lineWidth = Math.max(1.5, Math.min(width, 3)); s.g.globalAlpha = .8;
  s.g.beginPath(); s.g.moveTo(x, 0); s.g.lineTo(x, s.height); s.g.stroke(); s.g.restore();
}

function fillTable(table, rows) {
  const body = table.querySelector("tbody"); body.replaceChildren();
  for (const [name, value, definition] of rows) {
    const tr = document.createElement("tr"), th = document.createElement("th");
    th.scope = "row"; th.textContent = name; tr.append(th);
    for (const text of [value, definition]) { const td = document.createElement("td"); td.textContent = text; tr.append(td); }
    body.append(tr);
  }
}

const shown = (value, unit) => value === null || value === undefined ? "not known" : `${typeof value === "number" ? +value.toPrecision(4) : value}${unit ? " " + unit : ""}`;

// A blue-to-yellow scale that is read the same by people who see colours differently (after Cividis).
const SCALE = [[0, 32, 76], [38, 60, 109], [85, 91, 108], [124, 123, 120], [166, 157, 117], [211, 193, 100], [255, 233, 69]];
function heat(v) {
  const x = Math.min(1, Math.max(0, v)) * (SCALE.length - 1), i = Math.min(SCALE.length - 2, Math.floor(x)), f = x - i;
  return SCALE[i].map((c, k) => Math.round(c + f * (SCALE[i + 1][k] - c)));
}
