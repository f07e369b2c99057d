// The page of a run: it asks for what changed and adds it.

import { Chart } from "./chart.js";
import { address, ask, badge, element, mood, plain, progress, refill, repeatedly, short, span, whole } from "./common.js";
import { player, release } from "./listen.js";

const name = location.pathname.split("/").slice(2).map(decodeURIComponent).join("/");
const at = (selector) => document.querySelector(selector);
const charts = new Map();
const trouble = {};
let newest = null;
let chosen = decodeURIComponent(location.hash.slice(1)); // the stage; empty: the one that runs
let curves = null; // what is known of the chosen stage's
let range = null;

document.title = `${name} · S-PRESSO`;
at("#name").textContent = name;

// ---- which chart shows which curves

const ORDER = ["loss", "terms of the loss", "loss by noise level", "directions of z", "what the codes lose of z", "lr", "grad_norm", "samples_per_second", "mfu"];
const TITLES = {
  z_rank: "directions of z", lr: "learning rate", grad_norm: "gradient norm", samples_per_second: "samples a second",
  tokens_per_second: "tokens a second", tflops: "TFLOP/s of a rank", mfu: "MFU", data_wait: "waiting for data",
  save_stall_seconds: "stalled by saving (s)", peak_gib: "peak memory (GiB)",
};
const GROUPS = {
  train_terms: "terms of the loss", train_by_noise_level: "loss by noise level", held_out_z_error: "what the codes lose of z",
  average_z_error: "what the codes lose of z, by average",
};

const NOISY = new Set(["loss", "terms of the loss", TITLES.grad_norm]); // what may be smoothed
const MARKS = { requeue: "requeued, restarted or ended", gap: "nothing logged for long", incident: "a step skipped, or the run rewound" };

/** The chart and the label of a curve, which is called as in TensorBoard: `train/loss`, `train_terms/denoising`. */
function placed(kind, curve) {
  const [group, inner] = [curve.slice(0, curve.indexOf("/")), curve.slice(curve.indexOf("/") + 1)];
  if (group !== kind) return [GROUPS[group] ?? group.replaceAll("_", " "), inner.replaceAll("_", " ")];
  if (kind === "average") return [`by average: ${TITLES[inner] ?? inner.replaceAll("_", " ")}`, inner];
  return [TITLES[inner] ?? inner.replaceAll("_", " "), { train: "training", held_out: "held out" }[kind] ?? kind];
}

function showCurves() {
  const found = new Map();
  for (const [kind, each] of Object.entries(curves?.kinds ?? {})) {
    for (const [curve, { x, y }] of Object.entries(each)) {
      const [title, label] = placed(kind, curve);
      if (!found.has(title)) found.set(title, []);
      found.get(title).push({ label, x, y, dots: kind !== "train" });
    }
  }
  const place = (title) => {
    const known = ORDER.map((key) => TITLES[key] ?? key).indexOf(title);
    return known < 0 ? ORDER.length : known;
  };
  const titles = [...found.keys()].sort((a, b) => place(a) - place(b));
  for (const title of titles) if (!charts.has(title)) charts.set(title, new Chart(title, zoom));
  const figures = titles.map((title) => charts.get(title).figure);
  const target = at("#charts");
  if (figures.length !== target.children.length || figures.some((figure, n) => figure !== target.children[n])) target.replaceChildren(...figures);
  const marked = marks();
  for (const title of titles) charts.get(title).show(found.get(title), marked, range, at("#smooth").checked && NOISY.has(title));
  const kinds = Object.keys(MARKS).filter((kind) => marked.some((mark) => mark.kind === kind));
  refill(at("#marks"), kinds, () => kinds.map((kind) => element("span", { class: kind }, MARKS[kind])));
  at("#no-curves").hidden = titles.length > 0 || !curves;
  at("#whole").hidden = range === null;
}

function marks() {
  const stage = newest?.stages.find((each) => each.stage === chosen);
  const incidents = (newest?.incidents ?? []).filter((each) => each.stage === chosen && Number.isFinite(each.samples));
  return [
    ...(stage?.marks ?? []).map((mark) => ({ ...mark, kind: "requeue" })),
    ...(curves?.gaps ?? []).map((gap) => ({ samples: gap.samples, text: `nothing logged for ${span(gap.seconds)}`, kind: "gap" })),
    ...incidents.map((each) => ({ samples: each.samples, text: each.what, kind: "incident" })),
  ];
}

function zoom(low, high) {
  range = low === undefined ? null : [Math.max(0, low), high];
  curves = null;
  turnCurves();
}

async function followCurves() {
  if (!chosen) return;
  const [stage, asked] = [chosen, range];
  const width = Math.max(200, at("#charts").clientWidth > 700 ? Math.round(at("#charts").clientWidth / 2) : at("#charts").clientWidth);
  const bounds = asked ? { low: asked[0], high: asked[1] } : {};
  const answer = await ask(address("/api/curves", name), { stage, width, since: curves?.token ?? "", ...bounds });
  if (stage !== chosen || asked !== range) return; // another stage or zoom was chosen meanwhile
  const isLong = merge(answer, 4 * width);
  trouble.file = answer.problem;
  at("#foot").textContent = answer.damaged ? `${answer.damaged} damaged lines of metrics.jsonl are passed over.` : "";
  reading = answer.read;
  if (answer.whole || Object.keys(answer.kinds).some((kind) => Object.keys(answer.kinds[kind]).length)) showCurves();
  if (isLong) curves.token = ""; // thin it again next time
}

let reading = null;

/** Take over an answer: all of the curves, or what is new of them. Return whether they have become long. */
function merge(answer, most) {
  if (answer.whole || !curves) {
    curves = answer;
    return false;
  }
  Object.assign(curves, { token: answer.token, gaps: answer.gaps });
  let longest = 0;
  for (const [kind, each] of Object.entries(answer.kinds)) {
    curves.kinds[kind] ??= {};
    for (const [curve, { x, y }] of Object.entries(each)) {
      const known = (curves.kinds[kind][curve] ??= { x: [], y: [] });
      known.x.push(...x);
      known.y.push(...y);
      longest = Math.max(longest, known.x.length);
    }
  }
  return longest > most;
}

// ---- beside the curves

async function followRun() {
  newest = { ...(await ask(address("/api/run", name))), received: Date.now() / 1000 };
  const stages = newest.stages.map((each) => each.stage);
  if (!stages.includes(chosen)) choose(current(), false);
  refill(at("#stages"), [newest.stages.map((each) => [each.stage, each.state]), chosen], () => newest.stages.map((each) => element("button", {
    type: "button", "aria-pressed": String(each.stage === chosen), onclick: () => choose(each.stage, true),
  }, element("i", { class: `dot ${mood(each.state)}`, "aria-hidden": "true" }), each.stage, element("small", {}, each.state))));
  showStage();
  showSounds();
  texts("#starts", "#start-list", newest.starts);
  texts("#incidents", "#incident-list", newest.incidents.map(told));
  at("#evaluation").hidden = !newest.evaluation && !newest.page;
  at("#evaluation-text").hidden = !newest.evaluation;
  if (at("#evaluation-text").textContent !== newest.evaluation) at("#evaluation-text").textContent = newest.evaluation;
  at("#page-link").hidden = !newest.page;
  if (newest.page) at("#page-address").href = newest.page;
}

function current() {
  const trained = newest.stages.filter((each) => each.trained);
  const running = newest.stages.filter((each) => mood(each.state) === "good");
  const logged = trained.filter((each) => each.time !== null);
  return (running.at(-1) ?? logged.at(-1) ?? newest.stages.at(-1))?.stage ?? "";
}

function choose(stage, byHand) {
  [chosen, curves, range] = [stage, null, null];
  if (byHand) history.replaceState(null, "", `#${encodeURIComponent(stage)}`);
  charts.clear();
  at("#charts").replaceChildren();
  at("#step").value = "";
  if (newest && byHand) turnRun();
  turnCurves();
  if (at("#log").open) turnLog();
}

function showStage() {
  const stage = newest.stages.find((each) => each.stage === chosen);
  const isLive = stage && mood(stage.state) === "good";
  const use = stage?.mfu ? `MFU ${(100 * stage.mfu).toFixed(1)} %` : stage?.tflops ? `${plain(stage.tflops, 3)} TFLOP/s a rank` : "";
  const share = stage?.of ? `${((100 * (stage.samples ?? 0)) / stage.of).toFixed(1)} %` : "";
  const tiles = stage ? [
    ["State", badge(stage.state), [stage.nodes, stage.job].filter(Boolean).join(" · ")],
    stage.of ? ["Progress", [share, progress(stage.samples, stage.of)], `${whole(stage.samples)} of ${whole(stage.of)} ${stage.unit}`] : null,
    stage.expected ? ["Expected end", stage.expected, stage.saved ? `saved ${stage.saved}` : ""] : stage.saved ? ["Saved", stage.saved, ""] : null,
    stage.loss !== null ? ["Loss", plain(stage.loss, 4), stage.time ? `${span(newest.time - stage.time)} ago` : ""] : null,
    stage.samples_per_second ? ["Speed", `${plain(stage.samples_per_second, 3)}/s`, [isLive ? "samples a second" : "at the end", use].filter(Boolean).join(" · ")] : null,
  ].filter(Boolean) : [];
  refill(at("#tiles"), [stage, tiles.map((tile) => tile[2])], () => tiles.map(([label, value, detail]) => element("div", { class: "tile" },
    element("p", { class: "label" }, label), element("div", { class: "value" }, value), element("p", { class: "detail" }, detail))));
  at("#tiles").hidden = !tiles.length;
  refill(at("#remarks"), stage?.remarks ?? [], () => (stage?.remarks ?? []).map((text) => element("li", {}, text)));
  at("#curves").hidden = stage ? !stage.trained : true;
}

function told(incident) {
  const { stage, what, samples, ...rest } = incident;
  const facts = Object.entries(rest).filter(([, value]) => typeof value !== "object").map(([key, value]) => `${key.replaceAll("_", " ")}: ${value}`);
  return `${stage}: ${what}${Number.isFinite(samples) ? ` after ${whole(samples)} samples` : ""}${facts.length ? ` (${facts.join(", ")})` : ""}`;
}

function texts(part, list, lines) {
  at(part).hidden = !lines.length;
  refill(at(list), lines, () => lines.map((text) => element("li", {}, text)));
}

// ---- sounds

function showSounds() {
  const clips = newest.clips.filter((each) => each.stage === chosen);
  const steps = [...new Set(clips.filter((each) => each.kind !== "original").map((each) => each.samples))].sort((a, b) => b - a);
  at("#sounds").hidden = !clips.length;
  const step = at("#step");
  const followed = step.value === "" || step.selectedIndex === 0; // the newest is followed until another one is chosen
  const kept = Number(step.value);
  refill(step, steps, () => steps.map((samples) => element("option", { value: String(samples) }, `${whole(samples)} samples`)));
  step.value = String(!followed && steps.includes(kept) ? kept : steps[0] ?? "");
  showClips(clips);
}

function showClips(clips) {
  const wanted = Number(at("#step").value);
  const heard = clips.filter((each) => each.kind === "original" || each.samples === wanted);
  const names = [...new Set(heard.map((each) => each.clip))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  refill(at("#clips"), [heard, chosen], () => release(at("#clips")) ?? names.map((clip) => {
    const kinds = heard.filter((each) => each.clip === clip).sort((a, b) => (a.kind === "original" ? 0 : 1) - (b.kind === "original" ? 0 : 1));
    const players = kinds.map((each) => player(`${address("/sound", name)}/${each.path.split("/").map(encodeURIComponent).join("/")}`, each.kind));
    return element("div", { class: "clip", role: "group", "aria-label": clip }, element("h3", {}, clip.replaceAll("_", " ")), ...players);
  }));
}

// ---- log and config

async function followLog() {
  if (!at("#log").open) return;
  const answer = await ask(address("/api/log", name), chosen ? { stage: chosen } : {});
  at("#log-file").textContent = answer.file;
  const text = at("#log-text");
  if (text.textContent === answer.text) return;
  const isAtEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
  text.textContent = answer.text;
  if (isAtEnd) text.scrollTop = text.scrollHeight;
}

function facts() {
  const target = at("#facts");
  const problem = Object.values(trouble).find(Boolean) ?? "";
  target.classList.toggle("bad", problem !== "");
  const share = reading ? ` · reading the curves, ${((100 * reading[0]) / Math.max(1, reading[1])).toFixed(0)} %` : "";
  const last = newest ? new Date(1000 * newest.received).toLocaleTimeString() : "";
  target.textContent = problem ? `${problem}${newest ? ` · last answer ${last}` : ""}` : newest ? `updated ${last}${share}` : "";
}

const tell = (part) => (text) => { trouble[part] = text; facts(); };
at("#smooth").addEventListener("change", showCurves);
at("#whole").addEventListener("click", () => zoom());
at("#step").addEventListener("change", () => showClips(newest.clips.filter((each) => each.stage === chosen)));
at("#config").addEventListener("toggle", async () => {
  if (at("#config").open) at("#config-text").textContent = (await ask(address("/api/config", name))).text;
});
at("#log").addEventListener("toggle", () => turnLog());
const pace = () => (newest?.stages.some((each) => mood(each.state) !== "done") ? 1 : 5);
let turnCurves = () => {};
let turnLog = () => {};
const turnRun = repeatedly(followRun, () => 3 * pace(), tell("run"));
turnCurves = repeatedly(followCurves, () => (reading ? 0.05 : 2 * pace()), tell("curves"));
turnLog = repeatedly(followLog, () => 3, tell("log"));
