// A week: a row for each day with its activity, the model's attention as a strip below, rhythm metrics in a table.
"use strict";

const week = {rhythm: null, explain: null, at: 0};
const DAY_MINUTES = 1440;

const KINDS = {csv: "text/csv", json: "application/json", parquet: "application/vnd.apache.parquet"};

async function sendWeek(file) {
  const media = KINDS[file.name.toLowerCase().split(".").pop()];
  if (!media) return say("This is no CSV, JSON or Parquet file.", true);
  const common = {impute: byId("impute-week").checked}, model = byId("model-week").value, headers = {"Content-Type": media};
  const post = (path, more) => ask(`/v1/weeks/${path}?${new URLSearchParams({...common, ...more})}`, {method: "POST", body: file, headers}).then(a => a.json());
  say("Reading the week …");
  try {
    const unit = await unitOf(file, media);
    const rhythm = await post("rhythm", unit), explain = model ? await post("explain", {...unit, model}) : null;
    showWeek(rhythm, explain); say(""); byId("week-title").focus();
  } catch (e) { complain(e); }
}

// A column that is called 'value' doesn't say its unit; devices count.
async function unitOf(file, media) {
  if (media !== "text/csv") return {};
  const head = (await file.slice(0, 4096).text()).split("\n")[0].toLowerCase();
  return /\bvalue\b/.test(head) ? {unit: "counts"} : {};
}

function showWeek(rhythm, explain) {
  const r = rhythm.result.weeks[0], quality = rhythm.about.quality, model = explain && explain.about.model;
  Object.assign(week, {rhythm: r, explain: explain && explain.result.weeks[0], at: 0});
  byId("week").hidden = false;
  byId("week-title").textContent = `Week from ${r.start.slice(0, 10)}, ${r.start.slice(11, 16)}`;
  byId("week-about").textContent = `${(100 * quality.coverage).toFixed(1)} % measured, ${quality.missing_minutes} minutes missing, unit ${quality.unit}` +
    (quality.imputed_fraction ? `, ${(100 * quality.imputed_fraction).toFixed(1)} % imputed` : "") +
    (model ? `. Attention by ${model.name} ${model.version} (${model.model_hash.slice(0, 12)}…)` : "") + `. ${rhythm.about.statement}`;
  byId("week-warnings").replaceChildren(...[...new Set([...quality.warnings, ...(explain ? explain.about.quality.warnings : [])])].map(item));
  const rows = Object.entries(r.statistics);
  if (r.sleep_wake && r.sleep_wake.SRI) rows.push(["sleep regularity (SRI)", r.sleep_wake.SRI]);
  fillTable(byId("rhythm"), rows.map(([k, s]) => [k.replaceAll("_", " "), shown(s.value, s.unit), [s.definition, s.source].filter(Boolean).join("; ")]));
  byId("attention").textContent = week.explain ? `The strip shows how much attention each ${week.explain.patch_minutes} minutes received, at most ${shown(week.explain.flatness.max_mean)} times the mean` +
    (week.explain.flatness.flat ? ": so little that the pattern means nothing." : ".") + " Attention is not the reason for an answer." : "No model of weeks is ready, so there is no strip.";
  const slider = byId("week-view");
  slider.setAttribute("aria-valuemin", 0); slider.setAttribute("aria-valuemax", 167);
  drawWeek();
}

function forgetWeek() { Object.assign(week, {rhythm: null, explain: null, at: 0}); }

function drawWeek() {
  if (!week.rhythm) return;
  const s = surface(byId("actogram")), g = s.g, bins = week.rhythm.activity, per = DAY_MINUTES / bins.minutes;
  const start = new Date(week.rhythm.start + "Z"), lead = Math.floor((start.getUTCHours() * 60 + start.getUTCMinutes()) / bins.minutes); // bins between midnight and the start
  const days = Math.ceil((bins.values.length + lead) / per), row = (s.height - 22) / days, known = bins.values.filter(v => v !== null).sort((a, b) => a - b);
  const top = known[Math.floor(.98 * (known.length - 1))] || 1, strip = week.explain ? Math.max(4, row * .18) : 0;
  const look = week.explain ? week.explain.profile : [], low = Math.min(...look), high = Math.max(...look);
  const place = k => ({x: MARGIN.left + s.inner * ((k + lead) % per) / per, y: row * Math.floor((k + lead) / per)});
  bins.values.forEach((v, k) => {
    const {x, y} = place(k), width = s.inner / per, tall = row - strip - 6;
    if (v === null) { g.fillStyle = color("unscored"); g.globalAlpha = .25; g.fillRect(x, y + 2, width + .5, tall); g.globalAlpha = 1; }
    else { const h = tall * Math.min(1, v / top); g.fillStyle = color("strong"); g.fillRect(x, y + 2 + tall - h, Math.max(width, .7), h); }
    if (!strip) return;
    const p = look[Math.floor(k * bins.minutes / week.explain.patch_minutes)];
    const c = p === null || p === undefined ? null : heat((p - low) / (high - low || 1));
    if (c) { g.fillStyle = `rgb(${c})`; g.fillRect(x, y + row - strip - 2, width + .6, strip); }
  });
  g.fillStyle = color("ink");
  for (let d = 0; d < days; d++) {
    const day = new Date(start); day.setUTCDate(day.getUTCDate() + d);
    g.fillText(day.toISOString().slice(5, 10), 2, row * d + row / 2);
    g.strokeStyle = color("line"); g.lineWidth = 1; g.beginPath(); g.moveTo(MARGIN.left, row * (d + 1)); g.lineTo(s.width - MARGIN.right, row * (d + 1)); g.stroke();
  }
  g.textAlign = "center";
  for (let h = 0; h <= 24; h += s.inner > 500 ? 3 : 6) g.fillText(`${h}`, MARGIN.left + s.inner * h / 24, s.height - 8);
  g.textAlign = "left";
  const here = place(week.at * 60 / bins.minutes);
  g.strokeStyle = color("ink"); g.lineWidth = 2; g.strokeRect(here.x, here.y + 1, s.inner / 24, row - 2);
  tellHour(bins, start);
}

function tellHour(bins, start) {
  const per = 60 / bins.minutes, values = bins.values.slice(week.at * per, (week.at + 1) * per).filter(v => v !== null);
  const when = new Date(start.getTime() + week.at * 3600e3).toISOString().slice(0, 16).replace("T", " ");
  const activity = values.length ? `mean activity ${shown(values.reduce((a, b) => a + b) / values.length, week.unit)} a minute` : "nothing was measured";
  let look = "";
  if (week.explain) {
    const n = week.explain.patch_minutes, part = week.explain.profile.slice(Math.floor(week.at * 60 / n), Math.ceil((week.at + 1) * 60 / n)).filter(v => v !== null);
    if (part.length) look = `, attention ${(part.reduce((a, b) => a + b) / part.length * week.explain.profile.length).toFixed(2)} times the mean`;
  }
  byId("hour").textContent = `Hour from ${when}: ${activity}${look}.`;
  const slider = byId("week-view");
  slider.setAttribute("aria-valuenow", week.at); slider.setAttribute("aria-valuetext", byId("hour").textContent);
}

function moveWeek(to) { week.at = Math.max(0, Math.min(167, to)); drawWeek(); }

function weekKeys(e) {
  const to = {ArrowLeft: week.at - 1, ArrowRight: week.at + 1, ArrowUp: week.at - 24, ArrowDown: week.at + 24, Home: 0, End: 167}[e.key];
  if (week.rhythm && to !== undefined) { e.preventDefault(); moveWeek(to); }
}

function weekPointer(e) {
  if (!week.rhythm) return;
  const box = byId("actogram").getBoundingClientRect(), bins = week.rhythm.activity, start = new Date(week.rhythm.start + "Z");
  const lead = start.getUTCHours() * 60 + start.getUTCMinutes(), days = Math.ceil((bins.values.length * bins.minutes + lead) / DAY_MINUTES);
  const day = Math.floor((e.clientY - box.top) / (box.height - 22) * days), minute = (e.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right) * DAY_MINUTES;
  moveWeek(Math.floor((day * DAY_MINUTES + minute - lead) / 60));
}
