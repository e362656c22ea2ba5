// The page itself: who is signed in, sending files, watching jobs.
"use strict";

const byId = id => document.getElementById(id);
const session = {key: sessionStorage.getItem("key") || "", actions: []};
const watched = new Map(); // job id -> AbortController of its event stream

function item(text) { const li = document.createElement("li"); li.textContent = text; return li; }
function say(text, bad = false) { const m = byId("message"); m.textContent = text; m.classList.toggle("error", bad); }
function complain(e) { say(e.remedy ? `${e.message} → ${e.remedy}` : e.message || "The service can't be reached.", true); }

class Refusal extends Error {
  constructor(problem) {
    super([problem.where, problem.detail].filter(Boolean).join(": ") || problem.title || "refused");
    Object.assign(this, {code: problem.code, remedy: problem.remedy, status: problem.status});
  }
}

async function refusalOf(text, status) {
  try { return new Refusal(JSON.parse(text)); } catch { return new Refusal({detail: `the service answered ${status}`, status}); }
}

async function ask(url, options = {}) {
  const answer = await fetch(url, {...options, headers: {...options.headers, Authorization: `Bearer ${session.key}`}});
  if (answer.ok) return answer;
  if (answer.status === 401) signOut();
  throw await refusalOf(await answer.text(), answer.status);
}

async function signIn() {
  try {
    const me = await (await ask("/v1/me")).json();
    session.actions = me.actions;
    sessionStorage.setItem("key", session.key);
    byId("whoami").textContent = `${me.tenant}: ${me.roles.join(", ")}`;
    byId("statement").textContent = me.statement;
    byId("sign-in").hidden = true; byId("who").hidden = byId("main").hidden = false;
    say("");
    byId("drop-night").hidden = !me.actions.includes("nights.submit"); byId("drop-week").hidden = !me.actions.includes("weeks.explain");
    await fillModels();
    if (me.actions.includes("results.read")) await listJobs(); else byId("jobs").hidden = true;
  } catch (e) { session.key = ""; complain(e); }
}

function signOut() {
  sessionStorage.removeItem("key");
  session.key = ""; session.actions = [];
  for (const c of watched.values()) c.abort();
  watched.clear(); Object.assign(night, {id: null, result: null}); forgetWeek();
  for (const id of ["main", "who", "night", "week"]) byId(id).hidden = true;
  byId("job-list").replaceChildren(); byId("sign-in").hidden = false; byId("key").value = ""; byId("key").focus();
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
  for (const j of jobs) if (["queued", "running"].includes(j.state)) watch(j.id);
}

function row(job) {
  const li = document.createElement("li"), what = document.createElement("span"), bar = document.createElement("progress");
  li.id = `job-${job.id}`; what.className = "what";
  const reason = job.error ? `: ${[job.error.problem, job.error.remedy].filter(Boolean).join(" → ")}` : job.message && job.state === "running" ? `: ${job.message}` : "";
  what.textContent = `${job.created.slice(0, 16).replace("T", " ")} UTC, ${job.model || "model"}: ${job.state}${reason}`;
  li.append(what);
  if (["queued", "running"].includes(job.state)) {
    bar.max = 1; bar.value = job.progress; bar.setAttribute("aria-label", "progress"); li.append(bar);
    if (session.actions.includes("jobs.cancel")) li.append(button("Cancel", () => ask(`/v1/jobs/${job.id}`, {method: "DELETE"}).then(a => a.json()).then(update).catch(complain)));
  }
  if (job.state === "done" && session.actions.includes("nights.read")) li.append(button("Open", () => openNight(job.id).then(() => byId("night-title").focus()).catch(complain)));
  return li;
}

function button(text, action) { const b = document.createElement("button"); b.type = "button"; b.textContent = text; b.addEventListener("click", action); return b; }

function update(job) {
  const old = byId(`job-${job.id}`), now = row(job);
  if (!old) byId("job-list").prepend(now);
  else { const had = old.contains(document.activeElement); old.replaceWith(now); if (had) now.querySelector("button")?.focus(); }
}

// Server-sent events through fetch, since EventSource can't send a key. A broken line is taken up again.
async function watch(id) {
  if (watched.has(id)) return;
  const stop = new AbortController();
  watched.set(id, stop);
  for (let pause = 1; !stop.signal.aborted; pause = Math.min(pause * 2, 30)) {
    try {
      const answer = await ask(`/v1/jobs/${id}/events`, {signal: stop.signal});
      const state = await follow(answer.body.pipeThrough(new TextDecoderStream()).getReader(), () => { pause = 1; });
      if (["done", "failed", "cancelled", "gone"].includes(state)) { if (state === "gone") byId(`job-${id}`)?.remove(); if (state === "done") say("A night is staged."); break; }
    } catch (e) { if (e.status === 404 || e.status === 401) break; }
    if (!stop.signal.aborted) await new Promise(r => setTimeout(r, 1000 * pause));
  }
  watched.delete(id);
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
    x.addEventListener("load", async () => x.status < 300 ? resolve(JSON.parse(x.responseText)) : reject(await refusalOf(x.responseText, x.status)));
    x.addEventListener("error", () => reject(new Refusal({detail: "the service can't be reached"})));
    x.send(file);
  });
}

async function sendNight(file) {
  const query = new URLSearchParams({model: byId("model-night").value, subject: byId("subject-night").value, allow_missing: byId("missing-night").checked});
  try {
    const job = await send(`/v1/nights?${query}`, file, {"Content-Type": "application/octet-stream", "Idempotency-Key": crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`}, f => say(`Sending: ${(100 * f).toFixed(0)} %`));
    say("The night was received."); update(job); watch(job.id);
  } catch (e) { complain(e); }
}

function takes(kind, action) {
  const zone = byId(`drop-${kind}`), input = byId(`file-${kind}`);
  input.addEventListener("change", () => { if (input.files[0]) action(input.files[0]); input.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) zone.addEventListener(name, e => { e.preventDefault(); zone.classList.toggle("over", name === "dragover"); });
  zone.addEventListener("drop", e => e.dataTransfer.files[0] && action(e.dataTransfer.files[0]));
}

addEventListener("DOMContentLoaded", () => {
  byId("sign-in").addEventListener("submit", e => { e.preventDefault(); session.key = byId("key").value.trim(); signIn(); });
  byId("sign-out").addEventListener("click", () => { signOut(); say("Signed out."); });
  takes("night", sendNight); takes("week", sendWeek);
  byId("night-view").addEventListener("keydown", nightKeys);
  for (const name of ["click", "pointermove"]) byId("night-view").addEventListener(name, nightPointer);
  byId("night-view").addEventListener("pointerleave", () => night.result && tellEpoch(night.result));
  for (const b of document.querySelectorAll("[data-format]")) b.addEventListener("click", () => exportNight(b.dataset.format).catch(complain));
  byId("week-view").addEventListener("keydown", weekKeys); byId("week-view").addEventListener("click", weekPointer);
  addEventListener("resize", () => { drawNight(); drawWeek(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawNight(); drawWeek(); });
  if (session.key) signIn(); else byId("key").focus();
});
