"use strict";

// The page's audio. A Shelf loads recordings; a Deck plays them and switches between them without a gap.
// Each recording is a script that passes its bytes to a callback: a page opened from disk may not read files otherwise.

const awaited = new Map();
window.spressoSound = (name, base64) => awaited.get(name)?.(base64);

function loadScript(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    awaited.set(name, resolve);
    script.onload = script.onerror = () => {
      script.remove();
      awaited.delete(name);
      reject(new Error(`no sound in ${script.src}`)); // has no effect if the sound has arrived
    };
    script.src = `audio/${name}.js`;
    document.head.append(script);
  });
}

class Shelf {
  static MOST_SECONDS = 600; // of decoded audio that is kept, least recently used first out: 115 MB at 48 kHz mono

  #context;
  #sounds = new Map(); // name → {promise, seconds}, the most recently used last

  constructor(context) { this.#context = context; }

  get(name) {
    const sound = this.#sounds.get(name) ?? { promise: this.#load(name), seconds: 0 };
    this.#sounds.delete(name);
    this.#sounds.set(name, sound);
    return sound.promise;
  }

  async #load(name) {
    try {
      const bytes = Uint8Array.from(atob(await loadScript(name)), (letter) => letter.charCodeAt(0));
      const buffer = await this.#context.decodeAudioData(bytes.buffer);
      if (this.#sounds.has(name)) this.#sounds.get(name).seconds = buffer.duration;
      this.#makeRoom();
      return buffer;
    } catch (error) {
      this.#sounds.delete(name);
      throw error;
    }
  }

  #makeRoom() {
    let seconds = 0;
    for (const sound of this.#sounds.values()) seconds += sound.seconds;
    for (const [name, sound] of this.#sounds) {
      if (seconds <= Shelf.MOST_SECONDS) return;
      if (!sound.seconds) continue;
      seconds -= sound.seconds;
      this.#sounds.delete(name);
    }
  }
}

/** Gain curves of a constant-power crossfade: cosine and sine, normalized by the correlation of the two recordings. */
function fadeCurves(correlation) {
  const rise = new Float32Array(65);
  const fall = new Float32Array(65);
  for (let i = 0; i < 65; i++) {
    const angle = (i / 64) * (Math.PI / 2);
    const power = 1 + correlation * Math.sin(2 * angle);
    rise[i] = Math.sin(angle) / Math.sqrt(power);
    fall[i] = Math.cos(angle) / Math.sqrt(power);
  }
  return { rise, fall };
}

/** The correlation of two recordings, from 0 to 1, over the length of a fade that starts at the given positions. */
function likeness(one, from, other, otherFrom) {
  const piece = (buffer, seconds) => {
    const start = Math.round(seconds * buffer.sampleRate);
    return buffer.getChannelData(0).subarray(start, start + Math.round(Deck.FADE * buffer.sampleRate));
  };
  const a = piece(one, from);
  const b = piece(other, otherFrom);
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < Math.min(a.length, b.length); i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return aa && bb ? Math.max(0, ab / Math.sqrt(aa * bb)) : 0;
}

class Deck {
  static FADE = 0.015; // length of a crossfade in seconds
  static AHEAD = 0.02; // seconds by which a change is scheduled ahead, so that it is exact to the sample

  onend = () => {};
  #context;
  #voice = null;
  #pausedAt = 0;
  #loop = false;

  constructor(context) { this.#context = context; }

  get playing() { return this.#voice !== null; }
  get loop() { return this.#loop; }
  get seconds() { return this.#secondsAt(this.#context.currentTime); }

  /** The position that is audible now: the playing position minus the latency of the output device. */
  get heard() {
    const late = this.#context.outputLatency || 0;
    return this.#secondsAt(this.#context.currentTime - late);
  }

  set seconds(value) {
    if (!this.#voice) this.#pausedAt = value;
  }

  set loop(on) {
    const voice = this.#voice;
    if (voice && this.#context.currentTime > voice.at) {
      Object.assign(voice, { from: this.seconds, at: this.#context.currentTime, least: 0 }); // forget earlier loops
    }
    if (voice) voice.source.loop = on;
    this.#loop = on;
  }

  #secondsAt(time) {
    if (!this.#voice) return this.#pausedAt;
    const { at, from, least, source } = this.#voice;
    const seconds = Math.max(least, from + time - at);
    return source.loop ? seconds % source.buffer.duration : Math.min(seconds, source.buffer.duration);
  }

  /** Play a recording from a position, or else from the current position; crossfade from the previous recording. */
  play(buffer, seconds) {
    const context = this.#context;
    const toSample = (time) => Math.round(time * context.sampleRate) / context.sampleRate; // avoids interpolation
    const at = toSample(context.currentTime + Deck.AHEAD);
    const goesOn = this.#voice && seconds === undefined;
    const from = Math.min(toSample(seconds ?? this.#secondsAt(at)), buffer.duration);
    const source = new AudioBufferSourceNode(context, { buffer, loop: this.#loop });
    const rise = new GainNode(context);
    const fall = new GainNode(context);
    const curves = fadeCurves(this.#voice ? likeness(this.#voice.source.buffer, this.#secondsAt(at), buffer, from) : 0);
    if (this.#voice || from > 0) rise.gain.setValueCurveAtTime(curves.rise, at, Deck.FADE);
    source.connect(rise).connect(fall).connect(context.destination);
    source.start(at, from);
    this.#release(at, curves.fall);
    const voice = { source, fall, at, from, least: goesOn ? 0 : from };
    this.#voice = voice;
    source.onended = () => {
      fall.disconnect();
      if (this.#voice !== voice) return;
      this.#voice = null;
      this.#pausedAt = 0;
      this.onend();
    };
  }

  pause() {
    const at = this.#context.currentTime + Deck.AHEAD;
    this.#pausedAt = this.#secondsAt(at) % this.#voice.source.buffer.duration;
    this.#release(at, fadeCurves(0).fall);
    this.#voice = null;
  }

  #release(at, curve) {
    if (!this.#voice) return;
    this.#voice.fall.gain.setValueCurveAtTime(curve, at, Deck.FADE);
    this.#voice.source.stop(at + Deck.FADE);
  }
}
