// A night: three canvases over one axis of time, a cursor for keys and pointer, scores by hand.
"use strict";

const night = {id: null, result: null, at: 0, busy: false};
const KEYS = {w: "W", "1": "N1", "2": "N2", "3": "N3", r: "REM", u: "UNSCORED"};

function showNight(id, result) {
  Object.assign(night, {id, result, at: Math.min(night.id === id ? night.at : 0, result.stages.length - 1)});
  const r = result, about = r.about, model = about.model;
  byId("night").hidden = false;
  byId("night-title").textContent = `Night${r.recording.start ? " of " + r.recording.start.slice(0, 10) : ""}`;
  byId("night-about").textContent = `${r.stages.length} epochs of ${r.epoch_seconds} s, by ${model.name} ${model.version} (${model.model_hash.slice(0, 12)}…), pftsleep ${about.software.version}. ${about.statement}`;
  byId("night-warnings").replaceChildren(...[...(model.fallback_from ? [`Version ${model.fallback_from} could not be verified; this is an older one.`] : []), ...r.warnings].map(item));
  fillTable(byId("statistics"), Object.values(r.statistics).map(s => [s.name, shown(s.value, s.unit), [s.definition, s.source].filter(Boolean).join("; ")]));
  byId("corrections").hidden = !r.corrections.length;
  byId("corrections").querySelector("ol").replaceChildren(...r.corrections.map(c => item(`epoch ${c.epoch + 1}: ${c.from} → ${c.to}, ${c.at}`)));
  const slider = byId("night-view");
  slider.setAttribute("aria-valuemin", 1); slider.setAttribute("aria-valuemax", r.stages.length);
  scoreButtons(); drawNight();
}

function drawNight() {
  if (!night.result) return;
  drawHypnogram(night.result); drawDensity(night.result); drawSpectrogram(night.result); tellEpoch(night.result);
}

const xOf = (s, r, epoch) => MARGIN.left + s.inner * epoch / r.stages.length;

function drawHypnogram(r) {
  const s = surface(byId("hypnogram")), g = s.g, bottom = s.height - 20, row = name => 10 + (bottom - 16) * STAGES.indexOf(name) / (STAGES.length - 1);
  g.strokeStyle = color("line"); g.lineWidth = 1;
  for (const name of STAGES) { g.fillText(name, 4, row(name)); g.beginPath(); g.moveTo(MARGIN.left, row(name)); g.lineTo(s.width - MARGIN.right, row(name)); g.stroke(); }
  hours(s, r, bottom + 12);
  const width = s.inner / r.stages.length;
  let before = null;
  r.stages.forEach((name, i) => {
    const x = xOf(s, r, i);
    if (name === "UNSCORED") { g.fillStyle = color("unscored"); g.globalAlpha = .3; g.fillRect(x, 4, width, bottom - 8); g.globalAlpha = 1; before = null; return; }
    g.strokeStyle = color("ink"); g.lineWidth = 1;
    if (before && before !== name) { g.beginPath(); g.moveTo(x, row(before)); g.lineTo(x, row(name)); g.stroke(); }
    g.fillStyle = color(name); g.fillRect(x, row(name) - 2.5, Math.max(width, 1), 5);
    before = name;
  });
  g.fillStyle = color("warn");
  for (const c of r.corrections) { const x = xOf(s, r, c.epoch + .5); g.beginPath(); g.moveTo(x - 4, bottom - 1); g.lineTo(x + 4, bottom - 1); g.lineTo(x, bottom - 8); g.fill(); }
  cursor(s, xOf(s, r, night.at + .5), width);
}

function hours(s, r, y) {
  const total = r.stages.length * r.epoch_seconds, start = r.recording.start, first = start ? new Date(start + "Z").getTime() / 1000 + r.onset_s : r.onset_s;
  const step = [900, 1800, 3600, 7200, 14400].find(v => total / v * 60 < s.inner) || 21600;
  s.g.fillStyle = color("ink"); s.g.textAlign = "center";
  for (let t = Math.ceil(first / step) * step; t <= first + total; t += step) s.g.fillText(clock(start, t - first + r.onset_s), MARGIN.left + s.inner * (t - first) / total, y);
  s.g.textAlign = "left";
}

function drawDensity(r) {
  const s = surface(byId("hypnodensity")), g = s.g;
  g.fillText("how sure", 0, s.height / 2, MARGIN.left - 4);
  if (!r.probabilities) return;
  const width = s.inner / r.probabilities.length;
  r.probabilities.forEach((p, i) => {
    if (!p) return;
    let y = 0;
    for (const name of STAGES) { const h = p[ORDER.indexOf(name)] * s.height; g.fillStyle = color(name); g.fillRect(xOf(s, r, i), y, width + .6, h); y += h; }
  });
  cursor(s, xOf(s, r, night.at + .5), width);
}

function drawSpectrogram(r) {
  const s = surface(byId("spectrogram")), g = s.g, map = r.spectrogram;
  if (!map || !map.db.length) { g.fillText("no spectrogram", MARGIN.left, s.height / 2); return; }
  const values = map.db.filter(Boolean).flat().sort((a, b) => a - b), low = values[Math.floor(values.length * .05)], high = values[Math.floor(values.length * .98)];
  const picture = document.createElement("canvas"), n = map.frequencies.length;
  picture.width = map.db.length; picture.height = n;
  const p = picture.getContext("2d"), data = p.createImageData(map.db.length, n);
  map.db.forEach((column, x) => (column || []).forEach((v, f) => {
    const at = 4 * ((n - 1 - f) * map.db.length + x);
    if (v !== null) { data.data.set(heat((v - low) / (high - low || 1)), at); data.data[at + 3] = 255; }
  }));
  p.putImageData(data, 0, 0);
  g.imageSmoothingEnabled = false;
  const shownColumns = map.db.length * map.seconds_per_column / (r.stages.length * r.epoch_seconds);
  g.drawImage(picture, MARGIN.left, 0, s.inner * Math.min(1, shownColumns), s.height);
  const top = map.frequencies[n - 1];
  for (const f of [5, 10, 15, 20, 25].filter(f => f < top)) g.fillText(`${f} Hz`, 4, s.height * (1 - f / top));
  g.fillText(map.channel, 4, 8, MARGIN.left - 4);
  cursor(s, xOf(s, r, night.at + .5));
}

function tellEpoch(r, i = night.at) {
  const stage = r.stages[i], p = r.probabilities && r.probabilities[i], at = clock(r.recording.start, r.onset_s + i * r.epoch_seconds);
  const sure = p ? ORDER.map((n, k) => `${n} ${(100 * p[k]).toFixed(0)} %`).join(", ") : "no probabilities";
  const by = r.corrections.some(c => c.epoch === i) ? ", scored by hand" : "";
  byId("epoch").textContent = `Epoch ${i + 1} of ${r.stages.length}, ${at}: ${NAMES[stage]}${by}. ${sure}.`;
  if (i !== night.at) return;
  const slider = byId("night-view");
  slider.setAttribute("aria-valuenow", i + 1); slider.setAttribute("aria-valuetext", `epoch ${i + 1}, ${at}, ${NAMES[stage]}`);
  for (const b of byId("scores").children) b.setAttribute("aria-pressed", b.dataset.stage === stage);
}

function moveNight(to) {
  night.at = Math.max(0, Math.min(night.result.stages.length - 1, to));
  drawNight();
}

function scoreButtons() {
  const allowed = session.actions.includes("nights.correct");
  byId("scores").hidden = byId("correct-help").hidden = !allowed;
  byId("scores").replaceChildren(...Object.entries(KEYS).map(([key, stage]) => {
    const b = document.createElement("button");
    b.type = "button"; b.dataset.stage = stage; b.textContent = `${stage} (${key.toUpperCase()})`; b.addEventListener("click", () => correctEpoch(stage));
    return b;
  }));
}

async function correctEpoch(stage) {
  if (night.busy || !session.actions.includes("nights.correct") || night.result.stages[night.at] === stage) return;
  night.busy = true;
  try {
    const body = JSON.stringify({epoch: night.at, stage, after: night.result.corrections.length});
    showNight(night.id, await (await ask(`/v1/nights/${night.id}/corrections`, {method: "POST", body, headers: {"Content-Type": "application/json"}})).json());
    say(`Epoch ${night.at + 1} is ${NAMES[stage]} now.`);
  } catch (e) {
    if (e.code === "changed_meanwhile") await openNight(night.id);
    complain(e);
  } finally { night.busy = false; }
}

function nightKeys(e) {
  if (!night.result || e.ctrlKey || e.altKey || e.metaKey) return;
  const page = Math.round(600 / night.result.epoch_seconds);
  const to = {ArrowLeft: night.at - 1, ArrowRight: night.at + 1, ArrowDown: night.at - 1, ArrowUp: night.at + 1, PageUp: night.at + page, PageDown: night.at - page, Home: 0, End: Infinity}[e.key];
  if (to !== undefined) { e.preventDefault(); moveNight(to); }
  else if (KEYS[e.key.toLowerCase()]) { e.preventDefault(); correctEpoch(KEYS[e.key.toLowerCase()]); }
}

// Pointing only tells; a click chooses. Else the way to a button would choose another epoch than the one that was meant.
function nightPointer(e) {
  if (!night.result) return;
  const box = byId("hypnogram").getBoundingClientRect(), inner = box.width - MARGIN.left - MARGIN.right, n = night.result.stages.length;
  const i = Math.max(0, Math.min(n - 1, Math.floor((e.clientX - box.left - MARGIN.left) / inner * n)));
  if (e.type === "click") moveNight(i);
  else if (e.pointerType === "mouse") tellEpoch(night.result, i);
}

async function openNight(id) { showNight(id, await (await ask(`/v1/nights/${id}`)).json()); }

async function exportNight(format) {
  const answer = await ask(`/v1/nights/${night.id}/export?format=${format}`), name = /filename="([\w.-]+)"/.exec(answer.headers.get("Content-Disposition") || "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob()); link.download = name ? name[1] : `night.${format}`;
  link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
