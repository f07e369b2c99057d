// What both pages share: building elements, asking the server again and again, and formatting numbers.
// Text of a run gets into the page as text alone: nothing here, or in what uses it, sets markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element; `on…` are listeners, `data`/`aria-…` and others are attributes, null ones are left out. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** Replace an element's children only if `state` differs from last time, so that focus and selection stay. */
export function refill(target, state, make) {
  const text = JSON.stringify(state);
  if (target.shown === text) return;
  target.shown = text;
  target.replaceChildren(...make().flat().filter((child) => child !== null && child !== undefined));
}

/** Ask the server for JSON; an error's message is the line that the server sent. */
export async function ask(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const answer = await fetch(query ? `${path}?${query}` : path, { signal: AbortSignal.timeout(30_000) });
  if (answer.ok) return answer.json();
  throw new Error((await answer.text()).trim() || `the server answered ${answer.status}`);
}

/** Call `work` again and again, each time `seconds()` after its end; not while the page is out of sight. */
export function repeatedly(work, seconds, told) {
  let running = false;
  let timer = 0;
  async function turn() {
    clearTimeout(timer);
    if (running || document.hidden) return;
    running = true;
    try {
      await work();
      told("");
    } catch (error) {
      told(error instanceof TypeError || error.name === "TimeoutError"
        ? "no answer: does spresso dashboard still run, and is the ssh tunnel open?"
        : error.message);
    }
    running = false;
    timer = setTimeout(turn, 1000 * seconds());
  }
  document.addEventListener("visibilitychange", turn);
  turn();
  return turn;
}

/** The address of a run, below a prefix; a run of a sweep has two parts. */
export const address = (prefix, name) => `${prefix}/${name.split("/").map(encodeURIComponent).join("/")}`;

export function short(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "";
  const size = Math.abs(number);
  for (const [unit, one] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= one) return `${plain(number / one, 4)}${unit}`;
  }
  return plain(number, 4);
}

export function plain(number, digits = 5) {
  if (number !== 0 && (Math.abs(number) < 1e-3 || Math.abs(number) >= 1e6)) return number.toExponential(digits > 4 ? 3 : 1);
  return String(Number(number.toPrecision(digits)));
}

export const whole = (number) => (number ?? 0).toLocaleString("en");

export function span(seconds) {
  for (const [unit, one, until] of [["s", 1, 90], ["min", 60, 90], ["h", 3600, 48]]) {
    if (seconds / one < until) return `${Math.max(0, seconds / one).toFixed(0)} ${unit}`;
  }
  return `${(seconds / 86400).toFixed(0)} days`;
}

/** A word's mood, which colours it. */
export function mood(state) {
  if (["running", "running?"].includes(state)) return "good";
  if (["failed", "died", "no export", "unreadable", "gone", "silent"].includes(state)) return "bad";
  return state === "done" ? "done" : "waits";
}

export const badge = (state) => element("span", { class: `badge ${mood(state)}` }, state ?? "…");

export function progress(part, of) {
  const share = of ? Math.min(1, (part ?? 0) / of) : 0;
  const made = element("progress", { max: "1", value: String(share) });
  made.setAttribute("aria-label", `${(100 * share).toFixed(0)} %`);
  return made;
}
