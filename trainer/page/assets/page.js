// The players, the keyboard shortcuts and the bar. All players share one deck.
(() => {
  let deck, shelf, context;
  let chosen = null; // the player to which the bar, the keys and the playhead apply
  let wanted = false; // whether the chosen player should play: true while its recording is still loading
  let request = 0;

  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const groupOf = (player) => player.closest("[data-clip]");
  const clipOf = (player) => groupOf(player).dataset.clip;
  const slider = (player) => player.querySelector("input");
  const bar = document.querySelector(".bar");

  function wake() {
    if (!context) {
      context = new AudioContext({ sampleRate: Number(document.body.dataset.sampleRate), latencyHint: "interactive" });
      shelf = new Shelf(context);
      deck = new Deck(context);
      deck.onend = () => { wanted = false; show(); };
    }
    if (context.state !== "running") context.resume();
  }

  // ---- actions

  /** Choose a player. If it is of another clip, the position starts at zero. */
  function choose(player) {
    wake();
    if (player === chosen) return;
    const samePlace = chosen && clipOf(chosen) === clipOf(player);
    if (!samePlace) {
      if (deck.playing) deck.pause();
      deck.seconds = 0;
    }
    if (chosen) leave(chosen, player);
    chosen = player;
    player.classList.add("current");
    groupOf(player).classList.add("here");
    fillBar();
    show();
  }

  function leave(player, next) {
    player.classList.remove("current", "playing", "loading");
    label(player, "Play");
    place(player, 0);
    if (!next || groupOf(next) !== groupOf(player)) groupOf(player).classList.remove("here");
  }

  /** Play from a position, or else from the clip's current one; the previous recording plays until this is loaded. */
  async function hear(player, seconds) {
    choose(player);
    if (seconds !== undefined) deck.seconds = seconds;
    wanted = true;
    const mine = ++request;
    player.classList.add("loading");
    show();
    try {
      const buffer = await shelf.get(player.dataset.sound);
      if (mine !== request) return;
      deck.play(buffer, seconds);
      wanted = true; // the previous recording may have ended meanwhile
      player.classList.remove("broken");
      fetchRest(player);
    } catch {
      if (mine !== request) return;
      stop();
      player.classList.add("broken");
      player.querySelector(".play").title = "This browser cannot play the recording";
    } finally {
      player.classList.remove("loading");
      show();
    }
  }

  function stop() {
    request++;
    wanted = false;
    if (deck.playing) deck.pause();
    show();
  }

  function toggle(player) {
    if (player === chosen && wanted) stop();
    else hear(player);
  }

  /** Move to another player, and keep playing if the previous player was playing. */
  function goTo(player) {
    if (!player) return;
    if (wanted) hear(player);
    else choose(player);
    player.querySelector(".play").focus({ preventScroll: true });
    player.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function chooseTake(button, sounding = true) {
    const player = button.closest(".player");
    choose(player);
    player.dataset.sound = button.dataset.sound;
    player.querySelector("img").src = `images/${button.dataset.sound}.png`;
    player.style.setProperty("--seconds", button.dataset.seconds);
    slider(player).max = button.dataset.seconds;
    for (const other of button.parentElement.children) other.ariaPressed = String(other === button);
    fillBar();
    if (sounding) hear(player);
  }

  function setLoop(on) {
    wake();
    deck.loop = on;
    bar.querySelector(".loop").ariaPressed = String(on);
  }

  function close() {
    if (!chosen) return;
    stop();
    deck.seconds = 0;
    leave(chosen);
    chosen = null;
    bar.hidden = true;
  }

  /** Preload the clip's other systems, then this player's other takes, one by one until something else is played. */
  async function fetchRest(player) {
    const others = all(".player", groupOf(player)).map((other) => other.dataset.sound);
    const takes = all(".takes button", player).map((button) => button.dataset.sound);
    const mine = request;
    for (const name of [...others, ...takes]) {
      if (mine !== request) return;
      await shelf.get(name).catch(() => {});
    }
  }

  // ---- display

  function label(player, verb) {
    const button = player.querySelector(".play");
    button.ariaLabel = button.ariaLabel.replace(/^(Play|Pause)/, verb);
  }

  function place(player, seconds) {
    const range = slider(player);
    range.value = seconds;
    range.setAttribute("aria-valuetext", `${seconds.toFixed(1)} of ${Number(range.max).toFixed(1)} seconds`);
    groupOf(player).style.setProperty("--at", seconds.toFixed(4));
  }

  let frame = 0;
  function follow() {
    frame = 0;
    if (!chosen) return;
    const seconds = deck.heard;
    place(chosen, seconds);
    bar.querySelector(".time").value = `${seconds.toFixed(1)} / ${Number(slider(chosen).max).toFixed(1)} s`;
    if (deck.playing) frame = requestAnimationFrame(follow);
  }

  function show() {
    if (!chosen) return;
    for (const part of [chosen, bar]) {
      part.classList.toggle("playing", wanted);
      label(part, wanted ? "Pause" : "Play");
    }
    if (!frame) frame = requestAnimationFrame(follow);
  }

  function fillBar() {
    const group = groupOf(chosen);
    const take = all(".takes [aria-pressed=true]", chosen)[0];
    const [caption, title] = all(".what p", bar);
    caption.textContent = group.dataset.caption;
    title.textContent = chosen.dataset.title + (take ? `, decode ${take.textContent}` : "");
    fillSystems([...new Set([all(".player", group)[0], ...all(".player", chosen.closest("tr"))])]);
    bar.hidden = false;
  }

  /** Fill the bar with buttons of the original and of all players in the row of the chosen one. */
  function fillSystems(players) {
    const systems = bar.querySelector(".systems");
    if (players.some((player, n) => player !== systems.children[n]?.player) || players.length < systems.children.length)
      systems.replaceChildren(...players.map(systemButton));
    for (const button of systems.children) button.ariaPressed = String(button.player === chosen);
    const lit = systems.querySelector("[aria-pressed=true]");
    systems.scrollTo({ left: lit.offsetLeft - (systems.clientWidth - lit.offsetWidth) / 2 });
  }

  function systemButton(player) {
    const button = document.createElement("button");
    button.type = "button";
    button.player = player;
    button.textContent = player.dataset.label;
    button.onclick = () => (player === chosen ? toggle(player) : hear(player));
    return button;
  }

  // ---- keys

  const inView = ({ top, bottom }) => bottom > 0 && top < innerHeight;
  const firstInView = () => all(".player").find((player) => inView(player.getBoundingClientRect()));

  function neighbour(player, step) {
    const players = all(".player", groupOf(player));
    return players[players.indexOf(player) + step];
  }

  /** The player of the next clip (among decodes: of the next rate) in the same column, else the first of that row. */
  function below(player, step) {
    const lines = all(".clips tbody tr").filter((line) => line.querySelector(".player"));
    const players = all(".player", lines[lines.indexOf(player.closest("tr")) + step] ?? document.createElement("i"));
    return players.find((other) => other.dataset.column === player.dataset.column) ?? players[0];
  }

  function take(player, number) {
    const buttons = all(".takes button", player);
    if (buttons.length) return buttons[number - 1] && chooseTake(buttons[number - 1], wanted);
    return goTo(all(".player", player.closest("tr")).find((other) => other.dataset.column === String(number)));
  }

  function seekBy(player, step) {
    const end = Number(slider(player).max);
    const from = player === chosen ? deck.seconds : 0;
    hear(player, Math.max(0, Math.min(end, from + step * Math.max(0.1, end / 20))));
  }

  const KEYS = {
    " ": toggle,
    ArrowRight: (player) => goTo(neighbour(player, 1)),
    ArrowLeft: (player) => goTo(neighbour(player, -1)),
    ArrowDown: (player) => goTo(below(player, 1)),
    ArrowUp: (player) => goTo(below(player, -1)),
    l: () => setLoop(!deck?.loop),
    Escape: close,
  };
  for (let n = 1; n <= 9; n++) KEYS[n] = (player) => take(player, n);
  const SHIFTED = { ArrowRight: (player) => seekBy(player, 1), ArrowLeft: (player) => seekBy(player, -1) };

  let held = false; // whether the space bar is down: in some browsers its release would press a button again

  document.addEventListener("keydown", (event) => {
    const { key, shiftKey, target } = event;
    const act = (shiftKey ? SHIFTED : KEYS)[key.length === 1 ? key.toLowerCase() : key];
    if (!act || event.ctrlKey || event.altKey || event.metaKey || target.closest("a, summary, pre")) return;
    const isSpace = key === " ";
    if (isSpace && target.closest("button") && !target.closest(".play")) return;
    const own = target.closest(".player");
    const player = (isSpace && own) || chosen || own || (isSpace && firstInView());
    if (!player || (key.startsWith("Arrow") && !inView(player.getBoundingClientRect()))) return;
    event.preventDefault();
    held = isSpace;
    act(player);
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " " && held) event.preventDefault();
    held = false;
  });

  // ---- pointers

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".play, .takes button, .loop");
    if (!button) return;
    if (button.matches(".loop")) setLoop(!deck.loop);
    else if (button.matches(".takes button")) chooseTake(button);
    else toggle(button.closest(".player") ?? chosen);
  });
  document.addEventListener("input", (event) => {
    const player = event.target.closest(".player");
    if (player) hear(player, Number(event.target.value));
  });

  // ---- notes behind the question marks, for pointer, keyboard and touch

  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.role = "tooltip";
  tip.hidden = true;

  function explain(hint) {
    tip.textContent = hint.dataset.note;
    tip.hidden = false;
    tip.style.left = tip.style.top = "0";
    const spot = hint.getBoundingClientRect();
    const most = document.documentElement.clientWidth - tip.offsetWidth - 16;
    const left = Math.max(16, Math.min(most, spot.left + spot.width / 2 - tip.offsetWidth / 2));
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${spot.bottom + scrollY + 10}px`;
  }

  for (const type of ["pointerover", "focusin", "click"]) {
    document.addEventListener(type, (event) => {
      const hint = event.target.closest(".hint");
      if (hint) explain(hint);
      else tip.hidden = true;
    });
  }
  document.addEventListener("focusout", () => { tip.hidden = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
})();
