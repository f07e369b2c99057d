"use strict";
(() => {
  // One audio element serves all players: starting one stops the other, and nothing loads before it is asked for.
  const audio = new Audio();
  audio.preload = "none";
  let current = null;

  const slider = (player) => player.querySelector("input");

  function show(player, seconds) {
    const range = slider(player);
    range.value = seconds;
    range.setAttribute("aria-valuetext", `${seconds.toFixed(1)} of ${Number(range.max).toFixed(1)} seconds`);
    player.style.setProperty("--at", Math.min(1, seconds / range.max));
  }

  function leave() {
    if (!current) return;
    current.classList.remove("current", "playing");
    label(current, "Play");
    show(current, 0);
    current = null;
  }

  function label(player, verb) {
    const button = player.querySelector(".play");
    button.ariaLabel = button.ariaLabel.replace(/^(Play|Pause)/, verb);
  }

  function start(player, seconds) {
    if (current !== player) {
      leave();
      current = player;
      current.classList.add("current");
      audio.src = player.dataset.audio;
    }
    audio.currentTime = seconds;
    resume();
  }

  // Another player may be started before this one has: the promise is then refused, which is as it should be.
  const resume = () => audio.play().catch(() => {});

  function toggle(player) {
    if (current !== player) start(player, Number(slider(player).value));
    else if (audio.paused) resume();
    else audio.pause();
  }

  function choose(button) {
    const player = button.closest(".player");
    if (current === player) leave();
    player.dataset.audio = button.dataset.audio;
    player.querySelector("img").src = button.dataset.image;
    slider(player).max = button.dataset.seconds;
    for (const other of button.parentElement.children) other.ariaPressed = String(other === button);
    start(player, 0);
  }

  function follow() {
    if (!current) return;
    show(current, audio.currentTime);
    if (!audio.paused) requestAnimationFrame(follow);
  }

  audio.addEventListener("play", () => {
    if (!current) return;
    current.classList.add("playing");
    label(current, "Pause");
    follow();
  });
  audio.addEventListener("pause", () => {
    if (!current) return;
    current.classList.remove("playing");
    label(current, "Play");
  });
  audio.addEventListener("ended", leave);
  audio.addEventListener("error", () => {
    if (!current) return;
    current.classList.add("broken");
    current.querySelector(".play").title = "This browser cannot play the file";
    leave();
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".play, .takes button");
    if (button) button.matches(".play") ? toggle(button.closest(".player")) : choose(button);
  });
  document.addEventListener("input", (event) => {
    const player = event.target.closest(".player");
    if (player) start(player, Number(event.target.value));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || !event.target.matches(".track input")) return;
    event.preventDefault();
    toggle(event.target.closest(".player"));
  });

  // Notes behind the question marks: by pointer, by keyboard, by touch.
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.role = "tooltip";
  tip.hidden = true;

  function explain(hint) {
    tip.textContent = hint.dataset.note;
    tip.hidden = false;
    tip.style.left = tip.style.top = "0";
    const place = hint.getBoundingClientRect();
    const most = document.documentElement.clientWidth - tip.offsetWidth - 16;
    const left = Math.max(16, Math.min(most, place.left + place.width / 2 - tip.offsetWidth / 2));
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${place.bottom + scrollY + 10}px`;
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
