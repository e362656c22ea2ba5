// A night: three canvases over one axis of time, a cursor for keys and pointer, scores by hand.
"use strict";

const night = {id: null, result: null, at: 0, busy: false};
const BLANK = "1985-01-01"; // what a date is blanked to
const KEYS = [["w", "W"], ["1", "N1"], ["2", "N2"], ["3", "N3"], ["r", "REM"], ["u", "UNSCORED"]];
const SUMMARY = ["tst_min", "sleep_efficiency_percent", "sol_min", "waso_min", "rem_latency_min"];

function showNight(id, result) {
  Object.assign(night, {id, result, at: Math.min(night.id === id ? night.at : 0, Math.max(0, result.stages.length - 1))});
  const r = result, about = r.about, model = about.model, hand = r.corrections.length;
  byId("night").hidden = false;
  byId("night-title").textContent = `Night${!r.recording.start || r.recording.start.startsWith(BLANK) ? "" : " of " + r.recording.start.slice(0, 10)}${files.has(id) ? " from " + files.get(id) : ""}`;
  byId("night-about").textContent = `${r.stages.length} epochs of ${r.epoch_seconds} s, by ${model.name} ${model.version} (${model.model_hash.slice(0, 12)}…), pftsleep ${about.software.version}. ${about.statement}`;
  byId("night-warnings").replaceChildren(...[...(model.fallback_from ? [`Version ${model.fallback_from} could not be verified; this is an older one.`] : []), ...r.warnings].map(item));
  const told = SUMMARY.filter(k => r.statistics[k]).map(k => `${r.statistics[k].name} ${shown(r.statistics[k].value, r.statistics[k].unit)}`);
  byId("night-summary").textContent = [...told, hand ? `${hand} epoch${hand > 1 ? "s" : ""} corrected by hand` : "as the model said"].join(" · ");
  fillTable(byId("statistics"), Object.values(r.statistics).map(s => [s.name, shown(s.value, s.unit), [s.definition, s.source].filter(Boolean).join("; ")]));
  byId("corrections").hidden = !hand;
  byId("corrections").querySelector("ol").replaceChildren(...r.corrections.map(c => item(`epoch ${c.epoch + 1}: ${c.from} → ${c.to}, ${c.at.slice(0, 16).replace("T", " ")} UTC, ${c.by}`)));
  const slider = byId("night-view");
  slider.setAttribute("aria-valuemin", 1); slider.setAttribute("aria-valuemax", r.stages.length);
  for (const id of ["scores", "correct-help"]) byId(id).hidden = !session.actions.includes("nights.correct");
  markShown(id); drawNight();
}

function drawNight() {
  if (!night.result) return;
  drawHypnogram(night.result); drawDensity(night.result); drawSpectrogram(night.result); tellEpoch(night.result);
}

const xOf = (s, r, epoch) => MARGIN.left + s.inner * epoch / r.stages.length;

function drawHypnogram(r) {
  const s = surface(byId("hypnogram")), g = s.g, bottom = s.height - 20, row = name => 10 + (bottom - 16) * STAGES.indexOf(name) / (STAGES.length - 1);
  for (const name of STAGES) { g.fillText(name, 4, row(name)); stroke(g, [[MARGIN.left, row(name)], [s.width - MARGIN.right, row(name)]], "line"); }
  hours(s, r, bottom + 12);
  for (const [name, from, to] of runs(r.stages)) {
    const x = xOf(s, r, from), width = xOf(s, r, to) - x;
    if (name === "UNSCORED") { missing(g, x, 4, width, bottom - 8); continue; }
    g.fillStyle = color(name); g.fillRect(x, row(name) - 3, Math.max(width, 1), 6);
    stroke(g, [[x, row(name)], [x + width, row(name)]]);
    const before = from ? r.stages[from - 1] : "UNSCORED";
    if (before !== "UNSCORED") stroke(g, [[x, row(before)], [x, row(name)]]);
  }
  g.fillStyle = color("warn");
  for (const c of r.corrections) { const x = xOf(s, r, c.epoch + .5); g.beginPath(); g.moveTo(x - 4, bottom); g.lineTo(x + 4, bottom); g.lineTo(x, bottom - 8); g.fill(); }
  cursor(s, xOf(s, r, night.at + .5));
}

function runs(stages) { // [stage, first, one after the last]
  const out = [];
  stages.forEach((name, i) => { if (i && stages[i - 1] === name) out.at(-1)[2] = i + 1; else out.push([name, i, i + 1]); });
  return out;
}

function hours(s, r, y) {
  const total = r.stages.length * r.epoch_seconds, start = r.recording.start, first = start ? new Date(start + "Z").getTime() / 1000 + r.onset_s : r.onset_s;
  const step = [60, 300, 900, 1800, 3600, 7200, 14400].find(v => total / v * 60 < s.inner) || 21600;
  s.g.fillStyle = color("ink"); s.g.textAlign = "center";
  for (let t = Math.ceil(first / step) * step; t <= first + total; t += step) {
    const x = MARGIN.left + s.inner * (t - first) / total;
    if (x < s.width - 24) s.g.fillText(clock(start, t - first + r.onset_s), x, y);
    stroke(s.g, [[x, y - 12], [x, y - 8]]);
  }
  s.g.textAlign = "left";
}

function drawDensity(r) {
  const s = surface(byId("hypnodensity")), g = s.g;
  const inks = STAGES.map(name => [ORDER.indexOf(name), color(name)]);
  g.fillText("100 %", 4, 7); g.fillText("0 %", 4, s.height - 7);
  r.stages.forEach((_, i) => {
    const p = r.probabilities[i], x = xOf(s, r, i), width = xOf(s, r, i + 1) - x;
    if (!p) { missing(g, x, 0, width, s.height); return; }
    let y = 0;
    for (const [k, ink] of inks) { const h = p[k] * s.height; g.fillStyle = ink; g.fillRect(x, y, width + .6, h); y += h; }
  });
  cursor(s, xOf(s, r, night.at + .5));
}

const pictures = new WeakMap(); // of spectrograms, painted once

function pictureOf(map) { // {canvas, low, high}; null where nothing is known
  if (!map) return null;
  if (pictures.has(map)) return pictures.get(map);
  const values = map.db.filter(Boolean).flat().filter(v => v !== null).sort((a, b) => a - b), n = map.frequencies.length;
  if (!values.length) return null;
  const low = values[Math.floor(values.length * .05)], high = values[Math.floor(values.length * .98)], canvas = document.createElement("canvas");
  canvas.width = map.db.length; canvas.height = n;
  const p = canvas.getContext("2d"), data = p.createImageData(map.db.length, n);
  map.db.forEach((column, x) => (column || []).forEach((v, f) => {
    const at = 4 * ((n - 1 - f) * map.db.length + x);
    if (v !== null) { data.data.set(heat((v - low) / (high - low || 1)), at); data.data[at + 3] = 255; }
  }));
  p.putImageData(data, 0, 0);
  pictures.set(map, {canvas, low, high});
  return pictures.get(map);
}

function drawSpectrogram(r) {
  const s = surface(byId("spectrogram")), g = s.g, map = r.spectrogram, picture = pictureOf(map), caption = byId("spectrogram-caption");
  if (!picture) { caption.textContent = "There is no spectrogram: no EEG was found, or it is too short."; return; }
  caption.textContent = `Spectrogram of ${map.channel}, from ${picture.low.toFixed(0)} (dark blue) to ${picture.high.toFixed(0)} ${map.unit} (bright yellow)`;
  missing(g, MARGIN.left, 0, s.inner, s.height);
  g.imageSmoothingEnabled = false;
  g.save(); g.beginPath(); g.rect(MARGIN.left, 0, s.inner, s.height); g.clip(); // its columns begin with the recording, the epochs maybe later
  g.drawImage(picture.canvas, xOf(s, r, -r.onset_s / r.epoch_seconds), 0, s.inner * map.db.length * map.seconds_per_column / r.epoch_seconds / r.stages.length, s.height);
  g.restore();
  const top = map.frequencies.at(-1);
  for (const f of [10, 20, 30].filter(f => f < top - 1)) { const y = s.height * (1 - f / top); g.fillText(`${f} Hz`, 4, y); stroke(g, [[MARGIN.left - 5, y], [MARGIN.left, y]]); }
  cursor(s, xOf(s, r, night.at + .5));
}

function tellEpoch(r, i = night.at) {
  const stage = r.stages[i], p = r.probabilities[i], at = clock(r.recording.start, r.onset_s + i * r.epoch_seconds);
  const sure = p ? "The model: " + ORDER.map((n, k) => `${n} ${(100 * p[k]).toFixed(0)} %`).join(", ") : "The model gave no probabilities";
  const by = r.corrections.some(c => c.epoch === i) ? ", scored by hand" : "";
  byId("epoch").textContent = `Epoch ${i + 1} of ${r.stages.length}, ${at}: ${NAMES[stage]}${by}. ${sure}.`;
  if (i !== night.at) return;
  const slider = byId("night-view");
  slider.setAttribute("aria-valuenow", i + 1);
  slider.setAttribute("aria-valuetext", `epoch ${i + 1}, ${at}, ${NAMES[stage]}${by}${p ? `, the model ${(100 * Math.max(...p)).toFixed(0)} % sure` : ""}`);
  for (const b of byId("scores").querySelectorAll("button")) b.setAttribute("aria-pressed", b.dataset.stage === stage);
}

function moveNight(to) {
  night.at = Math.max(0, Math.min(night.result.stages.length - 1, to));
  drawNight();
}

function nextDoubtful() {
  const r = night.result, n = r.stages.length, hand = new Set(r.corrections.map(c => c.epoch));
  for (let d = 1; d <= n; d++) {
    const i = (night.at + d) % n;
    if (!hand.has(i) && (!r.probabilities[i] || Math.max(...r.probabilities[i]) < .5)) { moveNight(i); return; }
  }
  say("No epoch is left that the model was less than half sure of.");
}

async function correctEpoch(stage) {
  if (night.busy || !session.actions.includes("nights.correct") || night.result.stages[night.at] === stage) return;
  night.busy = true;
  const id = night.id, epoch = night.at;
  try {
    const body = JSON.stringify({epoch, stage, after: night.result.corrections.length});
    const result = await (await ask(`/v1/nights/${id}/corrections`, {method: "POST", body, headers: {"Content-Type": "application/json"}})).json();
    if (night.id === id) showNight(id, result);
    say(`Epoch ${epoch + 1} is ${NAMES[stage]} now.`);
  } catch (e) {
    if (e.code === "changed_meanwhile" && night.id === id) { await openNight(id).catch(() => {}); say("Somebody else has corrected this night. It was loaded again; yours was not stored.", true); }
    else complain(e);
  } finally { night.busy = false; }
}

function nightKeys(e) {
  if (!night.result || e.ctrlKey || e.altKey || e.metaKey) return;
  const page = Math.round(600 / night.result.epoch_seconds), key = e.key.toLowerCase(), score = KEYS.find(([k]) => k === key);
  const to = {ArrowLeft: night.at - 1, ArrowRight: night.at + 1, ArrowDown: night.at - 1, ArrowUp: night.at + 1, PageUp: night.at + page, PageDown: night.at - page, Home: 0, End: Infinity}[e.key];
  if (to !== undefined) { e.preventDefault(); moveNight(to); }
  else if (key === "n") { e.preventDefault(); nextDoubtful(); }
  else if (score) { e.preventDefault(); correctEpoch(score[1]); }
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
  say(`${link.download} was saved.`);
}

function nightControls() {
  byId("scores").append(...KEYS.map(([key, stage]) => {
    const b = button(stage === "UNSCORED" ? "unscored (U)" : stage === "W" ? "W" : `${stage} (${key.toUpperCase()})`, () => correctEpoch(stage));
    b.dataset.stage = stage;
    return b;
  }));
  byId("legend").append(...STAGES.map(name => { const e = document.createElement("span"), i = document.createElement("i"); i.style.background = `var(--${name.toLowerCase()})`; e.append(i, name); return e; }));
  byId("earlier").addEventListener("click", () => moveNight(night.at - 1)); byId("later").addEventListener("click", () => moveNight(night.at + 1)); byId("doubtful").addEventListener("click", nextDoubtful);
  byId("night-view").addEventListener("keydown", nightKeys);
  for (const name of ["click", "pointermove"]) byId("night-view").addEventListener(name, nightPointer);
  byId("night-view").addEventListener("pointerleave", () => night.result && tellEpoch(night.result));
  for (const b of document.querySelectorAll("[data-format]")) b.addEventListener("click", () => exportNight(b.dataset.format).catch(complain));
}
