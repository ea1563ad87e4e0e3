// The lens table, third part: what a state of the switches looks like. `who` is whose place is
// shown: a followed word's, else the target's if any, else the answer's.

// Draws everything as the state says; with `bring` the cell in focus comes into sight.
function paint(widget, bring = true) {
  const { state, views, columns } = widget;
  widget.room = widget.root.clientWidth; // read before anything is written
  for (const each of views) {
    each.space ??= widget.room;
    Object.assign(each.table.dataset, { show: state.show, rows: state.rows });
  }
  const scale = shades(widget);
  const classes = new Set();
  let count = 0;
  if (widget.lenses.length > 1) {
    for (let at = 0; at < widget.lenses[0].size; at++) count += differs(widget, at);
  }
  // Where almost every cell differs, to mark those that do says nothing.
  widget.differing = count;
  widget.few = count <= widget.lenses[0].size / 2;
  const shown = columns.map(() => new Map());
  widget.holding = new Map(); // cells that hold the followed word, and the ends that do
  for (const each of views) {
    const { lens, table, body, rows, caption } = each;
    const delta = lens.delta(state);
    const wanted = widget.word ? lens.words.flatMap((word, at) => sameWord(widget, word) ? [at] : [])
      : [];
    each.looks = lens.layers.flatMap((_, layer) => columns.map((pos, column) => {
      const at = layer * lens.width + pos;
      const look = cellNow(widget, each, scale, at, delta[at], wanted);
      classes.add(look.className);
      if (look.held.length) {
        widget.holding.set(at, [...(widget.holding.get(at) ?? []), ...look.held]);
      }
      const bold = look.className.includes("bw-hit");
      for (const { text, className } of look.lines) {
        // The sign of a blank takes about as much room as an "i".
        const as = className ? `i ${text}` : text;
        if (bold || !shown[column].has(as)) shown[column].set(as, bold);
      }
      return look;
    }));
    const trust = lens.judged(state);
    table.classList.toggle("bw-judged", Boolean(trust));
    rows.forEach((row, at) => {
      row.classList.toggle("bw-pale", Boolean(trust?.pale[at]));
      const strip = trust && row.querySelector(".bw-trust");
      if (!strip) return;
      strip.style.setProperty("--r", trust.r[at]);
      strip.title = trust.says[at];
      strip.setAttribute("aria-label", trust.says[at]);
    });
    if (trust) classes.add("bw-trust bw-chance");
    say(caption, sentence(widget, lens));
    const inOrder = state.top === "last" ? [...rows].reverse() : rows;
    if (body.rows[0] !== inOrder[0]) body.append(...inOrder);
  }
  const before = widget.lefts;
  const others = fit(widget, shown);
  for (const each of views) {
    const [from, to] = [each.from, each.to];
    const old = others ? kept(widget, each, before) : each.scrolled;
    scrollTo(widget, each, bring ? aim(widget, each, old) : old);
    writeUnseen(widget, each);
    drawSeen(widget, each, true);
    // The columns that stay; others are written as they are made.
    for (let column = Math.max(from, each.from); column < Math.min(to, each.to); column++) {
      const [head, ...cells] = [each.head, ...each.rows].map(({ children }) =>
        children[1 + column - each.from]);
      writeColumn(widget, each, column, head, cells);
    }
  }
  widget.drawStrip?.();
  drawLegend(widget, scale, new Set([...classes].flatMap((each) => each.split(" "))));
  look(widget, widget.current);
  measure(widget);
  if (bring) for (const each of views) bringIntoView(widget, each, each.scrolled);
}

function writeColumn(widget, { looks }, column, head, cells) {
  // A box that clips costs at every paint: only where a word is longer than its column.
  const cut = widget.cut.has(widget.columns[column]);
  head.classList.toggle("bw-cut", cut);
  cells.forEach((cell, layer) => {
    const { className, label, lines } = looks[layer * widget.columns.length + column];
    const name = cut ? `${className} bw-cut` : className;
    if (cell.className !== name) cell.className = name;
    if (label) cell.setAttribute("aria-label", label);
    else if (cell.hasAttribute("aria-label")) cell.removeAttribute("aria-label");
    if (lines.length === 1) say(cell, lines[0].text);
    else {
      cell.replaceChildren(...lines.map(({ text, className, tag }) =>
        say(make(tag, className), text)));
    }
  });
}

// What one cell looks like and says: its marks also have names, for those who do not see them.
function cellNow(widget, { lens }, scale, at, norm, wanted) {
  const { state } = widget;
  if (!norm) {
    const text = state.show === "shade" ? "" : "\u00b7";
    return { className: "bw-nil", label: "no gradient", lines: [{ text }], held: [] };
  }
  const best = endsOf(state).map((end) => lens.best(state, end, at));
  const words = best.some(Boolean);
  const marks = [scale.className(lens, at)];
  const names = [];
  const mark = (className, name) => {
    marks.push(className);
    names.push(name);
  };
  if (lens.target && best.includes(lens.target)) mark("bw-hit", named(lens, "target"));
  else if (best.includes(lens.answer)) mark("bw-own", "the model\u2019s answer");
  if (lens.left(state, at) >= 0) mark("bw-faint", "doubtful");
  if (scale.signed) names.push(scale.say(at));
  if (scale.beyond(lens, at)) mark("bw-beyond", `beyond the scale, norm ${short(norm)}`);
  if (widget.few && !scale.signed && differs(widget, at)) mark("bw-other", "not the same in the other table");
  const held = ENDS.filter((end) => wanted.some((index) => lens.holds(state, end, at, index)));
  for (const end of held) {
    mark(`bw-${end === "promoted" ? "up" : "down"}`, `${end}: ${exact(widget.word)}`);
  }
  let lines;
  if (state.show !== "norm" && state.show !== "shade" && !words) {
    marks.push("bw-nil");
    names.unshift("not read");
    marks.shift();
    lines = [{ text: "\u00b7" }];
  } else if (state.show === "rank") {
    lines = [{ text: `#${whole(lens.place(state, widget.who(lens), at))}` }];
  } else if (state.show === "norm") lines = [{ text: short(norm) }];
  else if (state.show === "shade") lines = [{ text: "" }];
  else {
    lines = best.map((index) => ({
      text: bare(lens.word(index)),
      className: lens.word(index)[0] === " " ? "bw-word" : "",
      tag: index === lens.target ? "b" : "div",
    }));
    if (lines.length === 1 && lines[0].className) marks.push("bw-word");
    const part = partOf(lens.word(best[0]));
    if (part) names.push(part);
  }
  const text = lines.map((line) => line.text).filter((line) => line !== "\u00b7").join(", ");
  const label = names.length ? [text, ...names].filter(Boolean).join(", ") : "";
  return { className: marks.join(" "), label, lines, held };
}

// Of a target of several tokens, marks and ranks are the first one's.
const several = (lens) => (lens.said ?? "the target") !== "the target";
const whose = (widget, lens) => {
  const who = widget.who(lens);
  return typeof who === "number" ? `"${lens.word(lens.follow[who])}"` : named(lens, who);
};
const named = (lens, who) => (who === "target" ? lens.said : undefined) ?? `the ${who}`;

const endsOf = (state) => (state.end === "both" ? ENDS : [state.end]);

// How a cell is shaded, and what the scale's ends are called.
function shades(widget) {
  const { lenses, state } = widget;
  const log = state.scale === "log";
  const step = (share) => `s${Math.round(Math.min(Math.max(share, 0), 1) * (STEPS - 1))}`;
  if (state.show === "rank") {
    const places = Math.max(2, lenses[0].vocab);
    const far = log ? Math.log(places) : places - 1;
    return {
      className(lens, at) {
        const place = Math.max(1, lens.place(state, widget.who(lens), at));
        return step(1 - (log ? Math.log(place) : place - 1) / far);
      },
      beyond: () => false,
      title: `place of ${whose(widget, lenses[0])} from the promoted end`,
      ticks: [places, Math.round(log ? Math.sqrt(places) : places / 2), 1].map(whole),
    };
  }
  if (state.show.startsWith("change")) return change(widget);
  let high = 0;
  let low = Infinity;
  for (const lens of lenses) {
    for (const norm of lens.delta(state)) {
      if (norm > high) high = norm;
      if (norm && norm < low) low = norm;
    }
  }
  const title = `norm of \u03b4, ${state.matrix}`;
  if (log && low < high) {
    low = Math.max(low, high / 1e4);
    const far = Math.log(high / low);
    return {
      className: (lens, at) => step(Math.log(lens.delta(state)[at] / low) / far),
      beyond: () => false,
      title,
      ticks: [low, Math.sqrt(low * high), high].map(short),
    };
  }
  // A few norms far beyond the rest do not turn the rest white: the scale ends before them.
  const top = state.scale === "whole" ? high : Math.max(...lenses.map((lens) => lens.top(state)));
  return {
    className: (lens, at) => step(lens.delta(state)[at] / top),
    beyond: (lens, at) => lens.delta(state)[at] > 1.0001 * top,
    title,
    ticks: [0, top / 2, top].map(short),
    high,
  };
}

// How a cell changed from the first lens to the second: its norm, or how many times nearer to the
// promoted end a word has come. 0 where one of the two has no gradient.
function changed({ lenses: [a, b], state, who }, at) {
  if (state.show === "change of norm") {
    const [one, other] = [a, b].map((lens) => lens.delta(state)[at]);
    return one && other ? other - one : 0;
  }
  const [one, other] = [a, b].map((lens) => lens.place(state, who(lens), at));
  return one && other ? Math.log(one / other) : 0;
}

function change(widget) {
  const { state, lenses: [lens] } = widget;
  const all = Array.from({ length: lens.size }, (_, at) => Math.abs(changed(widget, at)));
  const most = all.reduce((one, other) => Math.max(one, other), 0) || 1;
  const norm = state.show === "change of norm";
  const middle = (CHANGES - 1) / 2;
  const say = norm ? (value) => (value > 0 ? "+" : "") + short(value)
    : (value) => (value < 0 ? `${times(-value)} further` : `${times(value)} nearer`);
  const times = (value) => `${short(Math.exp(value))}\u00d7`;
  return {
    className: (_, at) => `d${Math.round(middle + (middle * changed(widget, at)) / most)}`,
    beyond: () => false,
    title: norm ? `change of the norm of \u03b4, ${state.matrix}`
      : `place of ${whose(widget, lens)}: how many times nearer to #1`,
    ticks: [-most, 0, most].map((value) => (value ? say(value) : norm ? "0" : "as before")),
    signed: true,
    say: (at) => say(changed(widget, at)),
    most: all.map((_, at) => at).filter((at) => all[at]).sort((a, b) => all[b] - all[a]).slice(0, 10),
  };
}

// Whether what a cell shows is not the same in both of two lenses.
function differs(widget, at) {
  const { lenses, state } = widget;
  if (lenses.length < 2) return false;
  const [a, b] = lenses;
  const [norm, other] = [a.delta(state)[at], b.delta(state)[at]];
  if (!norm || !other) return Boolean(norm || other);
  if (state.show === "norm") return Math.abs(norm - other) > 0.05 * Math.max(norm, other);
  if (state.show === "rank") {
    return a.place(state, widget.who(a), at) !== b.place(state, widget.who(b), at);
  }
  const word = (lens, end) => lens.word(lens.best(state, end, at));
  return endsOf(state).some((end) => word(a, end) !== word(b, end));
}

// What a word in a cell is, by what was read and which end is shown; STEP is one gradient step.
const SAYS = {
  delta: {
    promoted: "The word that STEP promotes most: \u03b4\u2019s least probable.",
    suppressed: "The word that STEP suppresses most: \u03b4\u2019s most probable.",
    both: "The words that STEP promotes most (above) and suppresses most (below).",
    most: "promotes most",
  },
  x: {
    promoted: "The word that STEP stamps in most: x\u2019s most probable.",
    suppressed: "The word least like what STEP stamps in: x\u2019s least probable.",
    both: "The words that STEP stamps in most (above) and suppresses most (below).",
    most: "stamps in most",
  },
  effect: {
    promoted: "The word whose log-probability STEP raises most, measured.",
    suppressed: "The word whose log-probability STEP lowers most, measured.",
    both: "The words that STEP raises (above) and lowers (below) most, measured.",
    most: "raises most, measured",
  },
};

function sentence(widget, lens) {
  const { state: { matrix, end, show }, columns } = widget;
  const says = SAYS[lens.through(widget.state)];
  const norm = `Norm of \u03b4, the gradient that comes back to ${matrix}.`;
  const who = whose(widget, lens);
  const said = {
    words: says[end],
    rank: `Place of ${who} among ${whole(lens.vocab)} words: #1 is what STEP ${says.most}.`,
    norm,
    shade: norm,
    "change of norm": `Shade: how the norm of \u03b4 of ${matrix} changed from the first lens to the second.`,
    "change of rank": `Shade: how the place of ${who} changed from the first to the second.`,
  }[show];
  const some = columns.length < lens.width ? ` ${columns.length} of ${lens.width} tokens.` : "";
  return said.replace("STEP", () => `one gradient step on ${matrix}`) + some;
}

// The cells that changed most, in order, to go to.
function largest(widget, scale) {
  const [lens] = widget.lenses;
  const buttons = scale.most.map((at) => {
    const token = exact(lens.tokens[lens.posOf(at)]);
    const name = `layer ${lens.layers[lens.layerOf(at)]}, ${token}: ${scale.say(at)}`;
    return make("li", "", button(name, () => {
      widget.pinned = true;
      look(widget, at);
      for (const each of widget.views) bringIntoView(widget, each);
    }));
  });
  return make("div", "bw-most", "changed most:", make("ol", "", ...buttons));
}

function drawLegend(widget, scale, seen) {
  const { lenses, state, legend } = widget;
  const [lens] = lenses;
  const ramp = make("span", "bw-ramp");
  const steps = scale.signed ? CHANGES : STEPS;
  for (let step = 0; step < steps; step++) {
    ramp.append(make("i", `${scale.signed ? "d" : "s"}${step}`));
  }
  const ticks = scale.ticks.map((tick) => make("span", "", tick));
  const title = make("span", "bw-title", scale.title);
  const bar = make("div", "bw-scale", title, ramp, make("span", "bw-ticks", ...ticks));
  const keys = make("div", "bw-keys");
  const key = (mark, ...text) => {
    if (seen.has(mark)) keys.append(make("span", "", make("i", `bw-key ${mark}`), ...text));
  };
  // The word itself, where it is the same in all tables.
  const name = (field) => {
    const word = lens.word(lens[field]);
    const same = lenses.every((each) => each.word(each[field]) === word);
    return same ? [" ", say(make("b"), `"${word}"`)] : [];
  };
  key("bw-hit", several(lens) ? "the target\u2019s first token" : "the target", ...name("target"));
  key("bw-own", "the model\u2019s own answer", ...name("answer"));
  if (seen.has("bw-beyond")) key("bw-beyond", `beyond the scale: up to ${short(scale.high)}`);
  if (lenses.length > 1) {
    const count = widget.differing;
    const what = { norm: "norms more than 5 % apart", rank: "another rank" }[state.show];
    seen.add("bw-other");
    key("bw-other", `${what ?? "another word"} (${count} of ${lens.size} cells)`);
  }
  key("bw-faint", lens.through(state) === "effect"
    ? "steps of different sizes disagree"
    : "vector so short that the final norm\u2019s epsilon outweighs it");
  key("bw-nil", "no gradient, or not read");
  if (widget.word) {
    const word = make("b", "", exact(widget.word));
    const count = (end) => [...widget.holding.values()].filter((held) => held.includes(end)).length;
    key("bw-up", "promotes ", word.cloneNode(true), ` (${count("promoted")})`);
    key("bw-down", "suppresses ", word.cloneNode(true), ` (${count("suppressed")})`);
    if (!widget.holding.size) keys.append(make("span", "", "no cell holds ", word));
  }
  key("bw-word", "a blank before the word");
  const trust = lenses.map((each) => each.judged(state)).find(Boolean);
  key("bw-trust", trust?.key);
  key("bw-chance", trust?.why);
  legend.replaceChildren(bar, keys);
  if (scale.signed) legend.append(largest(widget, scale));
}
