// The page looks every two seconds. Whatever comes from a model, a user or a worker becomes text, never markup.
"use strict";

const LOOK_MILLISECONDS = 2000;
const at = (id) => document.getElementById(id);
let csrf = "";
let shown = null; // the job whose life is shown

async function ask(path, options = {}) {
  const reply = await fetch(path, { credentials: "same-origin", ...options });
  const body = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(body.error.message), { status: reply.status });
  return body;
}

const post = (path, body = {}) =>
  ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(body),
  });

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const place = document.createElement("td");
    if (cell instanceof Node) place.append(cell);
    else place.textContent = cell ?? "";
    line.append(place);
  }
  return line;
}

const fill = (id, rows) => at(id).replaceChildren(...rows.map(row));

function state(name) {
  const word = document.createElement("span");
  word.textContent = name;
  word.className = name;
  return word;
}

function opener(job) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = job.id.slice(-12);
  button.title = job.id;
  button.addEventListener("click", () => show(job.id));
  return button;
}

const clock = (moment) => new Date(moment).toLocaleTimeString();
const took = (job) =>
  job.finished_at ? `${((new Date(job.finished_at) - new Date(job.created_at)) / 1000).toFixed(2)} s` : "";

async function look() {
  const chosen = at("state").value;
  const seen = await ask(`/ui/now${chosen ? `?state=${encodeURIComponent(chosen)}` : ""}`);
  fill("jobs", seen.jobs.map((job) => [opener(job), state(job.state), job.model, job.endpoint, clock(job.created_at), took(job)]));
  fill("batches", seen.batches.map((batch) => {
    const counts = batch.request_counts;
    return [batch.id, state(batch.status), batch.endpoint, counts.completed, counts.failed, counts.total];
  }));
  at("room").hidden = !seen.workers;
  if (seen.workers) {
    fill("workers", seen.workers.map((one) => [one.model, state(one.ready ? one.state : "not ready"), one.host, one.running, one.slots, one.busy_seconds.toFixed(1),
      one.cpu_cores.toFixed(1), gib(one.resident_bytes), gpu(one.gpu)]));
    fill("queues", Object.entries(seen.queues));
  }
  if (shown) await detail();
}

function gib(bytes) {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

function gpu(one) {
  if (!one) return "";
  const busy = one.utilization === null ? "" : `${Math.round(100 * one.utilization)} %, `;
  return `${busy}${(one.memory_used_bytes / 2 ** 30).toFixed(1)} of ${gib(one.memory_total_bytes)}`;
}

function facts(job) {
  const seconds = Object.entries(job.timings ?? {}).filter(([, value]) => value !== null);
  return [
    ["state", job.state], ["model", job.model], ["route", job.endpoint], ["attempts", `${job.attempts} of ${job.max_attempts}`],
    ["created", job.created_at], ["started", job.started_at], ["finished", job.finished_at], ["served by", job.served_by],
    ["error", job.error && `${job.error.code}: ${job.error.message}`],
    ["tokens", job.usage && `${job.usage.prompt_tokens} asked (${job.usage.cached_tokens} cached), ${job.usage.completion_tokens} answered`],
    ["cost", job.cost && `$${job.cost.token_dollars} by tokens, $${job.cost.machine_dollars} by machine time`],
    ...seconds.map(([name, value]) => [name.replaceAll("_", " "), value.toFixed(4)]),
  ].filter(([, value]) => value !== null && value !== undefined);
}

// Messages, or token ids.
function words(asked) {
  return asked.map((one) => (one.role ? `${one.role}: ${one.content}` : one)).join(asked[0]?.role ? "\n\n" : " ");
}

async function detail() {
  const job = await ask(`/ui/jobs/${shown}`);
  const open = ["queued", "blocked", "running"].includes(job.state);
  at("name").textContent = `Job ${job.id}`;
  at("facts").replaceChildren(...facts(job).flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    return [term, said];
  }));
  at("asked").textContent = typeof job.asked === "string" ? job.asked : words(job.asked);
  at("answered").textContent = job.answers.join("\n\n");
  at("cancel").hidden = !open;
  at("retry").hidden = open;
  at("detail").hidden = false;
}

async function show(id) {
  shown = id;
  if (await tried(detail)) at("detail").scrollIntoView({ block: "nearest" });
}

async function tried(work) {
  try {
    await work();
    at("trouble").hidden = true;
    return true;
  } catch (error) {
    if (error.status === 401) outside();
    else trouble(error.message);
    return false;
  }
}

function trouble(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = false;
}

function outside() {
  for (const id of ["now", "leave", "who"]) at(id).hidden = true;
  at("enter").hidden = false;
}

async function inside() {
  const session = await ask("/ui/session");
  csrf = session.csrf;
  at("who").textContent = `tenant ${session.tenant} (${session.roles.join(", ")})`;
  for (const id of ["now", "leave", "who"]) at(id).hidden = false;
  at("enter").hidden = true;
  await look();
}

at("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = at("key").value;
  at("key").value = "";
  try {
    await post("/login", { key });
    await inside();
    at("trouble").hidden = true;
  } catch (error) {
    trouble(error.message);
  }
});
at("leave").addEventListener("click", () => tried(async () => { await post("/ui/logout"); outside(); }));
at("state").addEventListener("change", () => tried(look));
at("close").addEventListener("click", () => { shown = null; at("detail").hidden = true; });
at("cancel").addEventListener("click", () => tried(async () => { await post(`/ui/jobs/${shown}/cancel`); await look(); }));
at("retry").addEventListener("click", () => tried(async () => { shown = (await post(`/ui/jobs/${shown}/retry`)).id; await look(); }));

tried(inside);
setInterval(() => { if (!at("now").hidden && !document.hidden) tried(look); }, LOOK_MILLISECONDS);
