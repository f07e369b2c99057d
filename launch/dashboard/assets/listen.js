// A sound: its spectrogram, drawn here from the samples, with a player below. The same bands and colours as the
// listening page's (trainer/spectrogram.py), so that the server needs neither torch nor a picture.

import { element } from "./common.js";

const SIZE = 2048;
const BANDS = 112;
const COLUMNS = 440;
const FLOOR = 70; // dB below the loudest
const ANCHORS = ["0c0b1c", "2b144f", "541b79", "94167f", "ca3267", "ee5e53", "ff9047", "ffc76f", "fff6c8"]
  .map((text) => [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16)));

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    entry.target.draw();
  }
}, { rootMargin: "200px" });

/** A figure with the spectrogram and the player of a sound. */
export function player(address, name) {
  const canvas = element("canvas", { width: COLUMNS, height: BANDS, role: "img", "aria-label": `Spectrogram: ${name}` });
  const audio = element("audio", { controls: "", "aria-label": name });
  const head = element("span", { class: "playhead", hidden: "" });
  const picture = element("div", { class: "picture" }, canvas, head);
  const note = element("small", {}, "");
  picture.draw = () => draw(canvas, audio, address).catch(() => { note.textContent = "The sound can't be read (now)."; });
  near.observe(picture);
  canvas.addEventListener("click", (event) => {
    const share = event.offsetX / canvas.clientWidth;
    const seek = () => { audio.currentTime = share * audio.duration; };
    if (Number.isFinite(audio.duration)) seek();
    else audio.addEventListener("loadedmetadata", seek, { once: true });
    audio.play();
  });
  const move = () => {
    head.hidden = !audio.currentTime;
    head.style.left = `${100 * audio.currentTime / (audio.duration || 1)}%`;
    if (!audio.paused) requestAnimationFrame(move);
  };
  audio.addEventListener("seeked", move);
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
    move();
  });
  return element("figure", { class: "sound" }, element("figcaption", {}, name), picture, audio, note);
}

/** Forget the sounds of players that are about to go. */
export function release(players) {
  for (const audio of players.querySelectorAll("audio[src]")) URL.revokeObjectURL(audio.src);
}

/** Get a sound once, to see and to hear. */
async function draw(canvas, audio, address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error();
  const content = await answer.arrayBuffer();
  // at the file's own rate, which its header has, so that nothing is resampled
  const [a, b, c] = new Uint8Array(content, 18, 3);
  const sound = await new OfflineAudioContext(1, 1, (a << 12) | (b << 4) | (c >> 4)).decodeAudioData(content);
  audio.src = URL.createObjectURL(wave(sound)); // Chromium fails to seek in a FLAC file without a table of places
  const samples = Float32Array.from(sound.getChannelData(0));
  for (let channel = 1; channel < sound.numberOfChannels; channel += 1) {
    const other = sound.getChannelData(channel);
    for (let n = 0; n < samples.length; n += 1) samples[n] += other[n];
  }
  paint(canvas, energies(samples, bank(sound.sampleRate)));
  canvas.dataset.drawn = "";
}

/** A WAV file of 32-bit floats: the samples as they were decoded. */
function wave(sound) {
  const { length, numberOfChannels, sampleRate } = sound;
  const bytes = 4 * length * numberOfChannels;
  const view = new DataView(new ArrayBuffer(44 + bytes));
  const text = (at, letters) => [...letters].forEach((letter, n) => view.setUint8(at + n, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 3, true);
  view.setUint16(22, numberOfChannels, true);
  view.setUint32(24, sampleRate, true);
  view.setUint32(28, 4 * numberOfChannels * sampleRate, true);
  view.setUint16(32, 4 * numberOfChannels, true);
  view.setUint16(34, 32, true);
  text(36, "data");
  view.setUint32(40, bytes, true);
  for (let channel = 0; channel < numberOfChannels; channel += 1) {
    sound.getChannelData(channel).forEach((value, n) => view.setFloat32(44 + 4 * (n * numberOfChannels + channel), value, true));
  }
  return new Blob([view], { type: "audio/wav" });
}

/** The energies of each band in each column. */
function energies(samples, filters) {
  const found = [];
  const real = new Float64Array(SIZE);
  const imaginary = new Float64Array(SIZE);
  for (let column = 0; column < COLUMNS; column += 1) {
    const begin = Math.round((column / (COLUMNS - 1)) * samples.length) - SIZE / 2;
    for (let n = 0; n < SIZE; n += 1) {
      real[n] = (samples[begin + n] ?? 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * n) / SIZE));
    }
    imaginary.fill(0);
    transform(real, imaginary);
    found.push(filters.map(({ from, weights }) => {
      let sum = 0;
      for (let n = 0; n < weights.length; n += 1) sum += weights[n] * (real[from + n] ** 2 + imaginary[from + n] ** 2);
      return sum;
    }));
  }
  return found;
}

/** Triangular filters on the mel scale. */
function bank(rate) {
  const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
  const edge = (n) => (700 * (10 ** ((mel(rate / 2) * n) / (BANDS + 1) / 2595) - 1) * SIZE) / rate;
  return Array.from({ length: BANDS }, (_, n) => {
    const [low, middle, high] = [edge(n), edge(n + 1), edge(n + 2)];
    const from = Math.floor(low);
    const weights = Array.from({ length: Math.ceil(high) - from + 1 }, (_, k) =>
      Math.max(0, Math.min((from + k - low) / (middle - low), (high - from - k) / (high - middle))));
    if (!weights.some(Boolean)) weights[Math.round(middle) - from] = 1; // a band narrower than a bin
    return { from, weights };
  });
}

/** The Fourier transform of SIZE numbers, in place. */
function transform(real, imaginary) {
  for (let n = 1, turned = 0; n < SIZE; n += 1) {
    let bit = SIZE >> 1;
    for (; turned & bit; bit >>= 1) turned ^= bit;
    turned ^= bit;
    if (n < turned) [real[n], real[turned]] = [real[turned], real[n]];
  }
  for (let length = 2; length <= SIZE; length *= 2) {
    const [stepReal, stepImaginary] = [Math.cos((-2 * Math.PI) / length), Math.sin((-2 * Math.PI) / length)];
    for (let begin = 0; begin < SIZE; begin += length) {
      let [wr, wi] = [1, 0];
      for (let n = begin; n < begin + length / 2; n += 1) {
        const other = n + length / 2;
        const [r, i] = [real[other] * wr - imaginary[other] * wi, real[other] * wi + imaginary[other] * wr];
        [real[other], imaginary[other]] = [real[n] - r, imaginary[n] - i];
        [real[n], imaginary[n]] = [real[n] + r, imaginary[n] + i];
        [wr, wi] = [wr * stepReal - wi * stepImaginary, wr * stepImaginary + wi * stepReal];
      }
    }
  }
}

function paint(canvas, columns) {
  let loudest = 1e-8;
  for (const column of columns) for (const energy of column) loudest = Math.max(loudest, energy);
  const drawing = canvas.getContext("2d");
  const image = drawing.createImageData(COLUMNS, BANDS);
  columns.forEach((column, x) => column.forEach((energy, band) => {
    const level = Math.max(0, 1 + (10 * Math.log10(energy / loudest + 1e-12)) / FLOOR);
    const place = Math.min(ANCHORS.length - 1.001, level * (ANCHORS.length - 1));
    const [low, high] = [ANCHORS[Math.floor(place)], ANCHORS[Math.floor(place) + 1]];
    const at = 4 * ((BANDS - 1 - band) * COLUMNS + x);
    for (let n = 0; n < 3; n += 1) image.data[at + n] = low[n] + (high[n] - low[n]) * (place % 1);
    image.data[at + 3] = 255;
  }));
  drawing.putImageData(image, 0, 0);
}
