// The lens table, first part: small helpers, and the data of a lens unpacked.

const ENDS = ["promoted", "suppressed"];

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(text, job, className = "") {
  const element = make("button", className, text);
  element.type = "button";
  if (job) element.addEventListener("click", job);
  return element;
}

// Words come from models and are set as text, never as markup. A dollar or backslash in an
// element of its own begins no formula for a page's typesetter.
function say(element, text) {
  if (/[$\\]/.test(text)) {
    element.replaceChildren(...text.split(/([$\\])/).map((piece) => make("span", "", piece)));
  } else if (element.firstChild?.data !== text || element.childNodes.length > 1) {
    element.textContent = text;
  }
  return element;
}

// One leading space belongs to a word: a sign before it, in cells by the style sheet.
const bare = (word) => word.replace(/^ /, "");
const exact = (word) => word.replace(/^ /, "\u2423");

function sayExactly(element, word) {
  say(element, bare(word));
  if (word[0] === " ") element.prepend(make("span", "bw-space", "\u2423"));
  return element;
}

const whole = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");
const signed = (value) => value.toFixed(Math.abs(value) < 1000 ? 2 : 0).replace("-", "\u2212");

function short(value) {
  if (value === 0) return "0";
  if (value < 0) return `\u2212${short(-value)}`;
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) return value.toExponential(1).replace("e+", "e");
  return Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3);
}

// What a word of bytes that are no whole character belongs to, as its first byte says.
function partOf(word) {
  const bytes = /\u27e8x([0-9A-F]{2})\u27e9?(?:\u27e8x)?([0-9A-F]{2})?/.exec(word);
  if (!bytes) return "";
  const first = parseInt(bytes[1], 16);
  if (first < 0xc2) return "the end of a character";
  const size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  const second = bytes[2] === undefined ? undefined : parseInt(bytes[2], 16);
  const at = (fill) => {
    let code = first & (0x7f >> size);
    code = (code << 6) | (second === undefined ? fill : second & 0x3f);
    for (let more = 2; more < size; more++) code = (code << 6) | fill;
    return code.toString(16).toUpperCase().padStart(4, "0");
  };
  return `the beginning of a character (U+${at(0)} to U+${at(0x3f)})`;
}

// What show/pack.py packed: JSON, a zero, then the bytes of arrays; gzip, base64.
async function unpack(text) {
  const packed = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const end = bytes.indexOf(0);
  const numbers = ([start, length, size]) => {
    const out = new { 1: Int8Array, 2: Int16Array, 4: Int32Array }[size](length);
    const from = end + 1 + start;
    for (let part = 0; part < size; part++) {
      for (let at = 0; at < length; at++) out[at] |= bytes[from + part * length + at] << (8 * part);
    }
    return out;
  };
  return JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)), (_, value) =>
    (value?.$ ? numbers(value.$) : value));
}

// A lens that answers for its cells. A cell is a number: layer index times width, plus position.
function decode(lens) {
  const { k, matrices, words } = lens;
  const width = lens.tokens.length;
  const reading = (state) => lens.readings[matrices[state.matrix].readings[state.reading]];
  // A followed word, by its number, has places; target and answer have ranks.
  const ranks = (state, who) =>
    typeof who === "number" ? reading(state).follow?.[who] : reading(state)[who];
  return {
    ...lens,
    width,
    size: width * lens.layers.length,
    layerOf: (cell) => Math.floor(cell / width),
    posOf: (cell) => cell % width,
    // The trust that speaks of what is shown: norms are exact in every layer.
    judged(state) {
      const trust = lens.trust?.[state.reading];
      return trust?.matrix === state.matrix ? trust : null;
    },
    through: (state) => reading(state).through,
    unit: (state) => reading(state).unit,
    delta: (state) => matrices[state.matrix].delta,
    x: (state) => matrices[state.matrix].x,
    neurons: (state) => matrices[state.matrix].neurons, // [name, value, word] of each cell's
    top: (state) => matrices[state.matrix].top,
    left: (state, cell) => reading(state).faint[cell], // -1 where there is no doubt
    has: (state, who) => ranks(state, who) !== undefined,
    // The place of a word from the promoted end, 1 the most promoted; 0 is none. A step subtracts:
    // it promotes what is least probable in delta, but stamps x in, and an effect is, as measured.
    place(state, who, cell) {
      const rank = ranks(state, who)[cell];
      if (typeof who === "number") return rank;
      if (rank < 0) return 0;
      return reading(state).through === "delta" ? lens.vocab - rank : rank + 1;
    },
    best: (state, end, cell) => reading(state)[end].ids[cell * k],
    word: (index) => words[index],
    list(state, end, cell) {
      const { ids, scores } = reading(state)[end];
      const entries = [];
      let score = 0;
      for (let at = cell * k; at < (cell + 1) * k; at++) {
        score += scores[at];
        if (ids[at]) entries.push({ index: ids[at], score: score / 100 });
      }
      return entries;
    },
    // Whether a word is among those of a cell's end.
    holds(state, end, cell, index) {
      const { ids } = reading(state)[end];
      for (let at = cell * k; at < (cell + 1) * k; at++) if (ids[at] === index) return true;
      return false;
    },
  };
}
