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

// What show/pack.py packed: JSON, gzip, base64.
async function unpack(text) {
  const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// A lens that answers for its cells. A cell is a number: layer index times width, plus position.
function decode(lens) {
  const { k, matrices, words } = lens;
  const width = lens.tokens.length;
  const reading = (state) => lens.readings[matrices[state.matrix].readings[state.reading]];
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
    left: (state, cell) => reading(state).faint[cell], // -1 where there is no doubt
    has: (state, who) => who in reading(state),
    rank: (state, who, cell) => reading(state)[who][cell], // -1 is none
    best: (state, end, cell) => reading(state)[end].ids[cell * k],
    word: (index) => words[index],
    list(state, end, cell) {
      const { ids, scores } = reading(state)[end];
      const places = Array.from({ length: k }, (_, at) => cell * k + at);
      const entries = places.map((at) => ({ index: ids[at], score: scores[at] / 100 }));
      return entries.filter(({ index }) => index);
    },
  };
}
