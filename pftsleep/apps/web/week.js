// A week: a row for each day with its activity, the model's attention as a strip below, rhythm metrics in a table.
"use strict";

const week = {rhythm: null, explain: null, unit: "", at: 0, waits: null};
const DAY_MINUTES = 1440;
const KINDS = {csv: "text/csv", json: "application/json", parquet: "application/vnd.apache.parquet"};
const LONG = {IS: "Interdaily stability (IS)", IV: "Intradaily variability (IV)", ISm: "Interdaily stability, all bins (ISm)", IVm: "Intradaily variability, all bins (IVm)", RA: "Relative amplitude (RA)",
  L5: "Quietest 5 hours (L5)", L5_onset: "Onset of L5", M10: "Liveliest 10 hours (M10)", M10_onset: "Onset of M10", missing_percent: "Not measured", complete_days: "Complete days", days: "Length"};

async function sendWeek(file) {
  const media = KINDS[file.name.toLowerCase().split(".").pop()];
  if (!media) return say("This is no CSV, JSON or Parquet file.", true);
  const unit = byId("unit-week").value, common = {impute: byId("impute-week").checked, ...(unit && {unit})}, model = byId("model-week").value, mine = session.key;
  const post = (path, more) => ask(`/v1/weeks/${path}?${new URLSearchParams({...common, ...more})}`, {method: "POST", body: file, headers: {"Content-Type": media}}).then(a => a.json());
  say("Reading the week …"); week.waits = null;
  try {
    const rhythm = await post("rhythm", {});
    let explain = null, why = "";
    if (model) try { explain = await post("explain", {model}); } catch (e) { if (e.status === 401) throw e; why = e.message; } // a model of another unit keeps nobody from the rhythm
    if (session.key !== mine) return;
    showWeek(rhythm, explain, why); say(why ? `The rhythm is here; the model had no answer: ${why}` : "The week is here.", !!why); byId("week-title").focus(); byId("week").scrollIntoView();
  } catch (e) {
    if (e.code !== "bad_unit" || unit) return complain(e);
    week.waits = file; byId("unit-week").focus(); // nobody guesses it
    say("The file doesn't say in which unit its values are: choose it, and the week is sent.", true);
  }
}

function showWeek(rhythm, explain, why) {
  const r = rhythm.result.weeks[0], quality = rhythm.about.quality, model = explain && explain.about.model;
  Object.assign(week, {rhythm: r, explain: explain && explain.result.weeks[0], unit: quality.unit, at: 0});
  byId("week").hidden = false;
  byId("week-title").textContent = `Week from ${r.start.slice(0, 10)}, ${r.start.slice(11, 16)}`;
  byId("week-about").textContent = `${(100 * quality.coverage).toFixed(1)} % measured, ${quality.missing_minutes} minutes missing, unit ${quality.unit}` +
    (quality.imputed_fraction ? `, ${(100 * quality.imputed_fraction).toFixed(1)} % filled in` : "") +
    (model ? `. Attention by ${model.name} ${model.version} (${model.model_hash.slice(0, 12)}…)` : "") + `. ${rhythm.about.statement}`;
  byId("week-warnings").replaceChildren(...[...new Set([...(model && model.fallback_from ? [`Version ${model.fallback_from} could not be verified; this is an older one.`] : []), ...quality.warnings, ...(explain ? explain.about.quality.warnings : [])])].map(item));
  const rows = Object.entries(r.statistics).filter(([k]) => !(k.endsWith("_h") && r.statistics[k.slice(0, -2)])); // the clock time says the same
  if (r.sleep_wake && r.sleep_wake.SRI) rows.push(["Sleep regularity (SRI)", r.sleep_wake.SRI]);
  fillTable(byId("rhythm"), rows.map(([k, s]) => [s.name || LONG[k] || k.replaceAll("_", " "), shown(s.value, s.unit === "activity per epoch" ? `${week.unit} a minute` : s.unit), [s.definition, s.source].filter(Boolean).join("; ")]));
  const slept = r.sleep_wake ? `; the line above them marks periods of sleep (${r.sleep_wake.scorer.name}, ${r.sleep_wake.scorer.periods})` : "";
  byId("week-caption").textContent = `Bars are means of ten minutes in ${week.unit}${slept}${week.explain ? "; the strip below is the model's attention, brighter where there was more" : ""}; hatched is not measured.`;
  byId("attention").textContent = !week.explain ? (why ? "There is no attention strip." : "No model of weeks is ready, so there is no attention strip.") :
    `Each ${week.explain.patch_minutes} minutes received at most ${shown(week.explain.flatness.max_mean)} times the mean attention` + (week.explain.flatness.flat ? ": so little that the pattern means nothing." : ".") + " Attention is not the reason for an answer.";
  const slider = byId("week-view");
  slider.setAttribute("aria-valuemin", 1); slider.setAttribute("aria-valuemax", 168);
  drawWeek();
}

function forgetWeek() { Object.assign(week, {rhythm: null, explain: null, waits: null, at: 0}); }

function weekPlan() { // where a minute of the week lies
  const start = new Date(week.rhythm.start + "Z"), lead = start.getUTCHours() * 60 + start.getUTCMinutes(); // minutes between midnight and the start
  return {start, lead, days: Math.ceil((7 * DAY_MINUTES + lead) / DAY_MINUTES)};
}

function drawWeek() {
  if (!week.rhythm) return;
  const s = surface(byId("actogram")), g = s.g, bins = week.rhythm.activity, {start, lead, days} = weekPlan(), row = (s.height - 22) / days;
  const known = bins.values.filter(v => v !== null).sort((a, b) => a - b), top = known[Math.floor(.98 * (known.length - 1))] || 1, strip = week.explain ? Math.max(5, row * .2) : 0, tall = row - strip - 13;
  const part = (from, minutes, draw) => { // of the week, in the rows of one day or two
    for (let m = from; m < from + minutes;) {
      const at = (m + lead) % DAY_MINUTES, n = Math.min(from + minutes - m, DAY_MINUTES - at);
      draw(MARGIN.left + s.inner * at / DAY_MINUTES, row * Math.floor((m + lead) / DAY_MINUTES), s.inner * n / DAY_MINUTES);
      m += n;
    }
  };
  bins.values.forEach((v, k) => part(k * bins.minutes, bins.minutes, (x, y, width) => {
    if (v === null) return missing(g, x, y + 9, width + .5, row - 11);
    const h = tall * Math.min(1, v / top);
    g.fillStyle = color("bar"); g.fillRect(x, y + 9 + tall - h, Math.max(width, .7) + .3, h);
  }));
  if (strip) drawStrip(g, bins, part, row - strip - 2, strip);
  g.fillStyle = color("ink");
  for (const p of week.rhythm.sleep_wake ? week.rhythm.sleep_wake.periods : []) {
    const bin = t => (new Date(t + "Z") - start) / 6e4 / bins.minutes, from = Math.max(0, bin(p.in_bed)), to = Math.min(bins.values.length, bin(p.out_bed));
    for (let k = Math.floor(from); k < to; k++) if (bins.values[k] !== null) part(Math.max(k, from) * bins.minutes, (Math.min(k + 1, to) - Math.max(k, from)) * bins.minutes, (x, y, width) => g.fillRect(x, y + 4, width + .3, 3));
  }
  dayLabels(s, start, days, row);
  part(week.at * 60, 60, (x, y, width) => { g.strokeStyle = color("paper"); g.lineWidth = 4; g.strokeRect(x, y + 1, width, row - 2); g.strokeStyle = color("ink"); g.lineWidth = 2; g.strokeRect(x, y + 1, width, row - 2); });
  tellHour(bins, start);
}

function drawStrip(g, bins, part, y0, height) {
  const {profile, patch_minutes: n} = week.explain, gone = k => { const a = Math.floor(k * n / bins.minutes), b = Math.ceil((k + 1) * n / bins.minutes); return profile[k] === null || bins.values.slice(a, b).every(v => v === null); };
  const seen = profile.filter((p, k) => !gone(k)).sort((a, b) => a - b), low = seen[0], high = seen[Math.floor(.99 * (seen.length - 1))];
  profile.forEach((p, k) => { if (!gone(k)) part(k * n, n, (x, y, width) => { g.fillStyle = `rgb(${heat((p - low) / (high - low || 1))})`; g.fillRect(x, y + y0, width + .5, height); }); });
}

function dayLabels(s, start, days, row) {
  const g = s.g;
  g.fillStyle = color("ink");
  for (let d = 0; d < days; d++) {
    const day = new Date(start); day.setUTCDate(day.getUTCDate() + d);
    const weekday = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"][day.getUTCDay()];
    g.fillText(weekday, 2, row * (d + .5) - 7); g.fillText(day.toISOString().slice(5, 10), 2, row * (d + .5) + 7);
    stroke(g, [[MARGIN.left, row * (d + 1)], [s.width - MARGIN.right, row * (d + 1)]], "line");
  }
  g.textAlign = "center";
  for (let h = 0; h <= 24; h += s.inner > 500 ? 3 : 6) g.fillText(`${h}`, MARGIN.left + s.inner * h / 24, s.height - 8);
  g.textAlign = "left";
}

function tellHour(bins, start) {
  const per = 60 / bins.minutes, values = bins.values.slice(week.at * per, (week.at + 1) * per).filter(v => v !== null), mean = v => v.reduce((a, b) => a + b) / v.length;
  const when = new Date(start.getTime() + week.at * 3600e3).toISOString().slice(0, 16).replace("T", " ");
  const activity = values.length ? `mean activity ${rounded(mean(values))} ${week.unit} a minute` : "nothing was measured";
  let look = "";
  if (week.explain && values.length) {
    const n = week.explain.patch_minutes, part = week.explain.profile.slice(Math.floor(week.at * 60 / n), Math.ceil((week.at + 1) * 60 / n)).filter(v => v !== null), all = week.explain.profile.filter(v => v);
    if (part.length) look = `, attention ${(mean(part) / mean(all)).toFixed(2)} times the mean`;
  }
  byId("hour").textContent = `Hour from ${when}: ${activity}${look}.`;
  const slider = byId("week-view");
  slider.setAttribute("aria-valuenow", week.at + 1); slider.setAttribute("aria-valuetext", byId("hour").textContent);
}

function moveWeek(to) { week.at = Math.max(0, Math.min(167, to)); drawWeek(); }

function weekKeys(e) {
  if (e.ctrlKey || e.altKey || e.metaKey) return;
  const to = {ArrowLeft: week.at - 1, ArrowRight: week.at + 1, ArrowUp: week.at - 24, ArrowDown: week.at + 24, Home: 0, End: 167}[e.key];
  if (week.rhythm && to !== undefined) { e.preventDefault(); moveWeek(to); }
}

function weekPointer(e) {
  if (!week.rhythm) return;
  const box = byId("actogram").getBoundingClientRect(), {lead, days} = weekPlan();
  const day = Math.floor((e.clientY - box.top) / (box.height - 22) * days), minute = (e.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right) * DAY_MINUTES;
  moveWeek(Math.floor((day * DAY_MINUTES + Math.max(0, Math.min(DAY_MINUTES - 1, minute)) - lead) / 60));
}

function weekControls() {
  byId("week-view").addEventListener("keydown", weekKeys);
  byId("week-view").addEventListener("click", weekPointer);
  byId("unit-week").addEventListener("change", () => { const file = week.waits; if (file && byId("unit-week").value) sendWeek(file); });
}
