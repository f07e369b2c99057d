// The overview: a row for each run, kept up to date.

import { address, ask, badge, element, plain, progress, refill, repeatedly, short, span, svg, whole } from "./common.js";

const list = document.querySelector("#runs");
const find = document.querySelector("#find");
const order = document.querySelector("#order");
const rows = new Map();
let newest = null;
let trouble = "";

const ACTIVE = ["running", "running?", "pending", "requeued", "submitted"];
const ORDERS = {
  active: (a, b) => rank(a) - rank(b) || (b.time ?? 0) - (a.time ?? 0) || byName(a, b),
  time: (a, b) => (b.time ?? 0) - (a.time ?? 0) || byName(a, b),
  name: byName,
  loss: (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity) || byName(a, b),
};

function byName(a, b) {
  return a.name.localeCompare(b.name, "en", { numeric: true });
}

function rank(run) {
  const at = ACTIVE.indexOf(run.state);
  return at < 0 ? ACTIVE.length : at;
}

function row(run) {
  const link = element("a", { href: address("/run", run.name) }, run.name);
  const cell = (label, ...content) => element("div",
    { class: label.replace(" ", "-") + (content.some((part) => part.textContent) ? "" : " none") }, element("small", {}, label), ...content);
  const seen = run.of ? `${short(run.samples ?? 0)} of ${short(run.of)}${run.unit === "parts" ? " parts" : ""}` : "";
  const speed = run.samples_per_second && ACTIVE.includes(run.state) ? `${plain(run.samples_per_second, 3)}/s` : "";
  const use = run.mfu ? `MFU ${(100 * run.mfu).toFixed(1)} %` : run.tflops ? `${plain(run.tflops, 3)} TFLOP/s` : "";
  return [
    element("div", { class: "who" }, link, element("span", {}, badge(run.state), run.stage ? ` ${run.stage}` : "",
      run.stages > 1 ? element("small", {}, ` ${run.done} of ${run.stages} stages done`) : null)),
    cell("progress", ...(run.of ? [progress(run.samples, run.of)] : []), element("span", {}, seen)),
    cell("expected end", element("span", {}, run.expected || "")),
    cell("loss", element("span", {}, run.loss === null || run.loss === undefined ? "" : plain(run.loss, 4))),
    cell("speed", element("span", {}, speed), element("small", {}, speed ? use : "")),
    element("div", { class: "spark" }, spark(run.spark ?? [])),
    ...(run.remarks ?? []).map((text) => element("p", { class: "remark" }, text)),
    run.problem ? element("p", { class: "remark bad" }, run.problem) : null,
  ];
}

function spark(values) {
  if (values.length < 2) return "";
  const low = Math.min(...values);
  const range = Math.max(...values) - low || 1;
  const points = values.map((value, n) => `${(118 * n / (values.length - 1) + 1).toFixed(1)},${(29 - 27 * (value - low) / range).toFixed(1)}`);
  return svg("svg", { viewBox: "0 0 120 31", role: "img", "aria-label": `loss from ${plain(values[0], 3)} to ${plain(values.at(-1), 3)}` },
    svg("polyline", { points: points.join(" "), class: "main" }));
}

function show() {
  if (!newest) return;
  const wanted = find.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const text = (run) => [run.name, run.stage, run.state].join(" ").toLowerCase();
  const shown = newest.runs.filter((run) => wanted.every((word) => text(run).includes(word))).sort(ORDERS[order.value]);
  const kept = shown.map((run) => {
    if (!rows.has(run.name)) rows.set(run.name, element("li", { class: "run" }));
    const item = rows.get(run.name);
    refill(item, run, () => row(run));
    return item;
  });
  if (kept.length !== list.children.length || kept.some((item, n) => item !== list.children[n])) list.replaceChildren(...kept);
  const names = new Set(newest.runs.map((run) => run.name));
  for (const name of rows.keys()) if (!names.has(name)) rows.delete(name);
  const nothing = document.querySelector("#nothing");
  nothing.hidden = shown.length > 0;
  nothing.textContent = newest.runs.length ? "No run matches." : `No run has begun in ${newest.folder}.`;
  refill(document.querySelector("#problems"), newest.problems, () => newest.problems.map((text) => element("li", {}, text)));
  facts();
}

function facts() {
  const target = document.querySelector("#facts");
  target.classList.toggle("bad", trouble !== "");
  if (trouble) {
    target.textContent = `${trouble}${newest ? ` · last answer ${span(Date.now() / 1000 - newest.received)} ago` : ""}`;
    return;
  }
  const active = newest.runs.filter((run) => ["running", "running?"].includes(run.state)).length;
  const reading = newest.missing ? ` · reading ${newest.runs.length - newest.missing} of ${newest.runs.length}` : "";
  target.textContent = `${whole(newest.runs.length)} in ${newest.folder} · ${active} running${reading} · updated ${new Date(1000 * newest.time).toLocaleTimeString()}`;
}

find.addEventListener("input", show);
order.addEventListener("change", show);
document.querySelector("#filter").addEventListener("submit", (event) => event.preventDefault());
repeatedly(
  async () => {
    newest = { ...(await ask("/api/runs")), received: Date.now() / 1000 };
    trouble = "";
    show();
  },
  () => (newest?.missing ? 0.1 : 3),
  (text) => {
    trouble = text;
    if (text) facts();
  },
);
