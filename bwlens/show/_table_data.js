// The lens table, first part: small helpers, and the data of a lens unpacked.

const ENDS = ["promoted", "suppressed"];

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Words come from models and are set as text, never as markup. A dollar or backslash in an
// element of its own begins no formula for a page's typesetter.
function say(element, text) {
  if (/[$\\]/.test(text)) {
    element.replaceChildren(...text.split(/([$\\])/).map((piece) => make("span", "", piece)));
  } else if (element.firstChild?.data !== text || element.childNodes.length > 1) {
    element.textContent = text; // most cells of the plain table say the right thing already
  }
  return element;
}

// One leading space belongs to a word; it is shown only where there is room to be exact.
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
  if (value < 1e-3 || value >= 1e5) return value.toExponential(1).replace("e+", "e");
  return value >= 1000 ? value.toFixed(0) : value.toPrecision(3);
}

// What show/pack.py packed. A cell is a number: layer index times width, plus position.
function decode(lens) {
  // Each word begins with as many letters of the one before as its line's first digit says.
  let word = "";
  const next = (line) => (word = word.slice(0, parseInt(line[0], 16)) + line.slice(1));
  const words = ["", ...lens.words.split("\n").map(next)];
  const arrays = [];
  const array = (at) => (arrays[at] ??= numbers(lens.blobs[at]));
  const { k, matrices } = lens;
  const width = lens.tokens.length;
  const reading = (state) => matrices[state.matrix].readings[state.reading];
  return {
    ...lens,
    width,
    size: width * lens.layers.length,
    layerOf: (cell) => Math.floor(cell / width),
    posOf: (cell) => cell % width,
    // The trust that speaks of what is shown: norms are exact in every layer.
    judged: (state) => lens.trust && lens.trust.matrix === state.matrix
      && lens.trust.reading === state.reading ? lens.trust : null,
    through: (state) => matrices[state.matrix].through,
    delta: (state) => array(matrices[state.matrix].delta),
    x: (state) => array(matrices[state.matrix].x),
    faint: (state) => array(reading(state).faint),
    has: (state, who) => who in reading(state),
    rank: (state, who, cell) => array(reading(state)[who])[cell] - 1, // -1 is none
    best: (state, end, cell) => array(reading(state)[end].ids)[cell * k],
    word: (index) => words[index],
    list(state, end, cell) {
      const { ids, scores, low, step } = reading(state)[end];
      const found = [];
      for (let at = cell * k; at < cell * k + k && array(ids)[at]; at++) {
        found.push({ index: array(ids)[at], score: low + array(scores)[at] * step });
      }
      return found;
    },
  };
}

// "f4:" and floats, or "u14:" and integers of fourteen bits each, in base64.
function numbers(blob) {
  const [kind, text] = blob.split(":");
  const bytes = Uint8Array.fromBase64?.(text) ?? bytesOf(atob(text));
  return kind === "f4" ? new Float32Array(bytes.buffer) : integers(bytes, Number(kind.slice(1)));
}

function integers(bytes, width) {
  const found = new Uint32Array(Math.floor((bytes.length * 8) / width));
  let held = 0; // bits that are read and not yet used, and their number
  let many = 0;
  for (let at = 0, next = 0; at < found.length; at++) {
    for (; many < width; many += 8) held = (held << 8) | bytes[next++];
    many -= width;
    found[at] = held >>> many;
    held &= (1 << many) - 1;
  }
  return found;
}

function bytesOf(text) {
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}
