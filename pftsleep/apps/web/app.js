// The page itself: who is signed in, sending files, watching jobs.
"use strict";

const byId = id => document.getElementById(id);
const session = {key: sessionStorage.getItem("key") || "", actions: []};
const watched = new Map(); // job id -> AbortController of its event stream
const files = new Map(); // job id -> name of the file that was sent from here; it never leaves this page

function item(text) { const li = document.createElement("li"); li.textContent = text; return li; }
function say(text, bad = false) { const m = byId("message"); m.textContent = text; m.classList.toggle("error", bad); if (bad && m.getBoundingClientRect().bottom < 0) m.scrollIntoView({block: "nearest"}); }
function complain(e) { if (e.name !== "AbortError") say(`Error: ${e.remedy ? `${e.message} → ${e.remedy}` : e instanceof Refusal ? e.message : "the service can't be reached"}`, true); }

class Refusal extends Error {
  constructor(problem) {
    super([problem.where, problem.detail].filter(Boolean).join(": ") || problem.title || "refused");
    Object.assign(this, {code: problem.code, remedy: problem.remedy, status: problem.status});
  }
}

function refusalOf(text, status) {
  try { return new Refusal(JSON.parse(text)); } catch { return new Refusal({detail: `the service answered ${status}`, status}); }
}

async function ask(url, options = {}) {
  const key = session.key, answer = await fetch(url, {...options, headers: {...options.headers, Authorization: `Bearer ${key}`}});
  if (answer.ok) return answer;
  if (answer.status === 401 && key === session.key) signOut();
  throw refusalOf(await answer.text(), answer.status);
}

async function signIn(byHand) {
  try {
    const me = await (await ask("/v1/me")).json(), can = a => me.actions.includes(a);
    session.actions = me.actions;
    sessionStorage.setItem("key", session.key);
    byId("whoami").textContent = `${me.tenant}: ${me.roles.join(", ")}`;
    byId("statement").textContent = me.statement;
    byId("key").value = ""; byId("sign-in").hidden = true; byId("who").hidden = byId("main").hidden = false;
    say("Signed in.");
    byId("drop-night").hidden = !can("nights.submit"); byId("drop-week").hidden = !can("weeks.explain"); byId("jobs").hidden = !can("results.read");
    if (byHand) byId("main").focus({preventScroll: true}); // the form that had it is gone
    if (!can("nights.submit") && !can("weeks.explain") && !can("results.read")) say("Your key may neither send nor read recordings. Its routes are listed in the interface for programs, below.");
    await fillModels();
    if (can("results.read")) await listJobs();
  } catch (e) { if (!session.actions.length) session.key = ""; complain(e); }
}

function signOut() {
  sessionStorage.removeItem("key");
  session.key = ""; session.actions = [];
  for (const c of watched.values()) c.abort();
  watched.clear(); files.clear(); Object.assign(night, {id: null, result: null, at: 0}); forgetWeek();
  for (const id of ["main", "who", "night", "week"]) byId(id).hidden = true;
  for (const id of ["job-list", "night-warnings", "week-warnings"]) byId(id).replaceChildren();
  for (const id of ["night-about", "night-title", "night-summary", "epoch", "week-about", "week-title", "hour", "whoami"]) byId(id).textContent = "";
  for (const id of ["statistics", "rhythm"]) fillTable(byId(id), []);
  byId("corrections").querySelector("ol").replaceChildren();
  for (const id of ["hypnogram", "hypnodensity", "spectrogram", "actogram"]) byId(id).width = 1; // empties it
  for (const id of ["night-view", "week-view"]) byId(id).removeAttribute("aria-valuetext");
  byId("sign-in").hidden = false; byId("key").value = byId("subject-night").value = byId("channels-night").value = ""; byId("key").focus();
}

async function fillModels() {
  const models = (await (await ask("/v1/models")).json()).models.filter(m => m.state === "ready" && m.default);
  for (const [id, kind] of [["model-night", "stager"], ["model-week", "week_encoder"]]) {
    const names = [...new Set(models.filter(m => m.kind === kind).map(m => m.name))];
    byId(id).replaceChildren(...(names.length ? names : [""]).map(name => { const o = document.createElement("option"); o.value = name; o.textContent = name || "none is ready"; return o; }));
  }
}

async function listJobs() {
  const jobs = (await (await ask("/v1/jobs?limit=20")).json()).jobs.filter(j => j.kind === "night");
  byId("job-list").replaceChildren(...jobs.map(row));
  byId("no-jobs").hidden = !!jobs.length;
  for (const j of jobs) if (["queued", "running"].includes(j.state)) watch(j.id);
}

function row(job) {
  const li = document.createElement("li"), what = document.createElement("span"), bar = document.createElement("progress");
  li.id = `job-${job.id}`; what.className = "what"; li.classList.toggle("shown", job.id === night.id);
  const reason = job.error ? `: ${[job.error.problem, job.error.remedy].filter(Boolean).join(" → ")}` : job.state === "running" ? `, ${(100 * job.progress).toFixed(0)} %${job.message ? ": " + job.message : ""}` : "";
  what.textContent = `${files.has(job.id) ? files.get(job.id) + ", " : ""}${job.created.slice(0, 16).replace("T", " ")} UTC, ${job.model || "model"}: ${job.state}${reason}`;
  const about = files.get(job.id) || `the night of ${job.created.slice(0, 16).replace("T", " ")}`;
  li.append(what);
  if (["queued", "running"].includes(job.state)) {
    bar.max = 1; bar.value = job.progress; bar.setAttribute("aria-label", `progress of ${about}`); li.append(bar);
    if (session.actions.includes("jobs.cancel")) li.append(button("Cancel", () => ask(`/v1/jobs/${job.id}`, {method: "DELETE"}).then(a => a.json()).then(update).catch(complain), `Cancel ${about}`));
  }
  if (job.state === "done" && session.actions.includes("nights.read")) li.append(button("Open", () => openNight(job.id).then(() => { byId("night-title").focus(); byId("night").scrollIntoView(); }).catch(complain), `Open ${about}`));
  return li;
}

function button(text, action, label = "") {
  const b = document.createElement("button");
  b.type = "button"; b.textContent = text; b.addEventListener("click", action);
  if (label) b.setAttribute("aria-label", label);
  return b;
}

function markShown(id) { for (const li of byId("job-list").children) li.classList.toggle("shown", li.id === `job-${id}`); }

function update(job) {
  const old = byId(`job-${job.id}`), now = row(job);
  byId("no-jobs").hidden = true;
  if (!old) { byId("job-list").prepend(now); return; }
  const had = old.contains(document.activeElement);
  old.replaceWith(now);
  if (had) (now.querySelector("button") || byId("jobs-title")).focus();
}

// Server-sent events through fetch, since EventSource can't send a key. A broken line is taken up again.
async function watch(id) {
  if (watched.has(id)) return;
  const stop = new AbortController(), name = files.get(id) || "A night";
  watched.set(id, stop);
  for (let pause = 1; !stop.signal.aborted; pause = Math.min(pause * 2, 30)) {
    try {
      const answer = await ask(`/v1/jobs/${id}/events`, {signal: stop.signal});
      const state = await follow(answer.body.pipeThrough(new TextDecoderStream()).getReader(), () => { pause = 1; });
      if (state === "gone") byId(`job-${id}`)?.remove();
      if (state === "done") say(`${name} is staged.`);
      if (state === "failed") say(`${name} could not be staged; the list says why.`, true);
      if (["done", "failed", "cancelled", "gone"].includes(state)) break;
    } catch (e) { if (e.status === 404 || e.status === 401 || e.status === 403) break; }
    if (!stop.signal.aborted) await new Promise(r => setTimeout(r, 1000 * pause));
  }
  if (watched.get(id) === stop) watched.delete(id);
}

async function follow(reader, heard) {
  let text = "", state = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return state;
    heard(); text += value;
    const parts = text.split("\n\n"); text = parts.pop();
    for (const part of parts) {
      const event = /^event: (.*)$/m.exec(part), data = /^data: (.*)$/m.exec(part);
      if (!event || !data) continue;
      state = event[1];
      if (!["gone", "unavailable"].includes(state)) update(JSON.parse(data[1]));
    }
  }
}

// XMLHttpRequest, since fetch can't tell how much of a file has left.
function send(url, file, headers, progress) {
  return new Promise((resolve, reject) => {
    const x = new XMLHttpRequest();
    x.open("POST", url);
    for (const [k, v] of Object.entries({...headers, Authorization: `Bearer ${session.key}`})) x.setRequestHeader(k, v);
    x.upload.addEventListener("progress", e => e.lengthComputable && progress(e.loaded / e.total));
    x.addEventListener("load", () => x.status < 300 ? resolve(JSON.parse(x.responseText)) : reject(refusalOf(x.responseText, x.status)));
    x.addEventListener("error", () => reject(new Refusal({detail: "the service can't be reached"})));
    x.send(file);
  });
}

const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, "0")).join("");

async function sendNight(file) {
  const query = new URLSearchParams({model: byId("model-night").value, subject: byId("subject-night").value, channels: byId("channels-night").value.split(",").map(c => c.trim()).filter(Boolean).join(","), allow_missing: byId("missing-night").checked}), mine = session.key;
  let told = -1;
  try {
    const job = await send(`/v1/nights?${query}`, file, {"Content-Type": "application/octet-stream", "Idempotency-Key": newKey()}, f => { const tenth = Math.floor(10 * f); if (tenth > told) { told = tenth; say(`Sending ${file.name}: ${10 * tenth} %`); } });
    if (session.key !== mine) return;
    files.set(job.id, file.name); say(`${file.name} was received.`); update(job); watch(job.id);
  } catch (e) { if (e.status === 401) signOut(); complain(e); }
}

async function sendAll(action, chosen, many) {
  if (!many && chosen.length > 1) say("Only the first of these files is read.");
  for (const file of many ? chosen : chosen.slice(0, 1)) await action(file);
}

function takes(kind, action, many) {
  const zone = byId(`drop-${kind}`), input = byId(`file-${kind}`);
  input.multiple = many;
  input.addEventListener("change", () => { const chosen = [...input.files]; input.value = ""; sendAll(action, chosen, many); });
  for (const name of ["dragover", "dragleave", "drop"]) zone.addEventListener(name, e => { e.preventDefault(); zone.classList.toggle("over", name === "dragover"); });
  zone.addEventListener("drop", e => sendAll(action, [...e.dataTransfer.files], many));
}

addEventListener("DOMContentLoaded", () => {
  byId("sign-in").addEventListener("submit", e => { e.preventDefault(); session.key = byId("key").value.trim(); signIn(true); });
  byId("sign-out").addEventListener("click", () => { signOut(); say("Signed out."); });
  takes("night", sendNight, true); takes("week", sendWeek, false);
  nightControls(); weekControls();
  for (const name of ["dragover", "drop"]) addEventListener(name, e => { // elsewhere, the browser would leave this page for the file
    e.preventDefault();
    if (name === "drop" && !e.target.closest?.(".drop")) say("Drop it on one of the two fields.", true);
  });
  const redraw = () => { drawNight(); drawWeek(); };
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  if (session.key) signIn(false); else byId("key").focus();
});
