// The lens table, second part: what a state of the switches looks like. A widget is
// { lenses, views, state, who, legend }; `who` is whose rank is shown, the target's if any.

function paint(widget) {
  const { state, views } = widget;
  const scale = shades(widget);
  const seen = new Set();
  for (const { lens, table, body, rows, cells, caption } of views) {
    const delta = lens.delta(state);
    for (let at = 0; at < lens.size; at++) {
      const cell = cells[at];
      cell.removeAttribute("aria-label");
      if (!delta[at]) {
        seen.add("bw-nil");
        cell.className = "bw-nil";
        cell.setAttribute("aria-label", "no gradient");
        say(cell, state.show === "shade" ? "" : "\u00b7");
        continue;
      }
      const best = endsOf(state).map((end) => lens.best(state, end, at));
      const marks = [`s${Math.round(scale.share(lens, at) * (STEPS - 1))}`];
      if (lens.target && best.includes(lens.target)) marks.push("bw-hit");
      else if (best.includes(lens.answer)) marks.push("bw-own");
      if (lens.left(state, at) >= 0) marks.push("bw-faint");
      if (differs(widget, at)) marks.push("bw-other");
      for (const mark of marks) seen.add(mark);
      cell.className = marks.join(" ");
      if (state.show !== "norm" && state.show !== "shade" && !best.some(Boolean)) {
        seen.add("bw-nil");
        cell.setAttribute("aria-label", "not read");
        say(cell, "\u00b7");
      } else if (state.show === "rank") say(cell, whole(lens.rank(state, widget.who, at)));
      else if (state.show === "norm") say(cell, short(delta[at]));
      else if (state.show === "shade") say(cell, "");
      else if (best.length === 1) say(cell, bare(lens.word(best[0])));
      else {
        const line = (index) => make(index === lens.target ? "b" : "div");
        cell.replaceChildren(...best.map((index) => say(line(index), bare(lens.word(index)))));
      }
    }
    table.dataset.show = state.show;
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
    if (trust) seen.add("bw-trust").add("bw-chance");
    say(caption, sentence(widget, lens));
    const inOrder = state.top === "last" ? [...rows].reverse() : rows;
    if (body.rows[0] !== inOrder[0]) body.append(...inOrder);
  }
  drawLegend(widget, scale, seen);
}

// Of a target of several tokens, marks and ranks are the first one's.
const several = (lens) => (lens.said ?? "the target") !== "the target";
const named = (lens, who) => (who === "target" ? lens.said : undefined) ?? `the ${who}`;

const endsOf = (state) => (state.end === "both" ? ENDS : [state.end]);

// How deep a cell is shaded, from 0 to 1, and what the scale's ends are called.
function shades({ lenses, state, who }) {
  const log = state.scale === "log";
  if (state.show === "rank") {
    const places = Math.max(2, lenses[0].vocab);
    const far = log ? Math.log(places) : places - 1;
    const end = state.end === "suppressed" ? "suppressed" : "promoted";
    return {
      share(lens, at) {
        const place = fromEnd(lens, state, lens.rank(state, who, at), end);
        return 1 - (log ? Math.log(1 + place) : place) / far;
      },
      title: `place of ${named(lenses[0], who)} from the ${end} end`,
      ticks: [places, Math.round(log ? Math.sqrt(places) : places / 2), 1].map(whole),
    };
  }
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
      share: (lens, at) => Math.max(0, Math.log(lens.delta(state)[at] / low) / far),
      title,
      ticks: [low, Math.sqrt(low * high), high].map(short),
    };
  }
  return {
    share: (lens, at) => lens.delta(state)[at] / high,
    title,
    ticks: [0, high / 2, high].map(short),
  };
}

// A step subtracts: it promotes what is least probable in delta, but stamps x in as it is, and an
// effect is measured as it is.
function fromEnd(lens, state, rank, end) {
  const fromTop = (lens.through(state) !== "delta") === (end === "promoted");
  return fromTop ? rank : lens.vocab - 1 - rank;
}

// Whether what a cell shows is not the same in both of two lenses.
function differs({ lenses, state, who }, at) {
  if (lenses.length < 2) return false;
  const [a, b] = lenses;
  const [norm, other] = [a.delta(state)[at], b.delta(state)[at]];
  if (!norm || !other) return Boolean(norm || other);
  if (state.show === "norm") return Math.abs(norm - other) > 0.05 * Math.max(norm, other);
  if (state.show === "rank") return a.rank(state, who, at) !== b.rank(state, who, at);
  const word = (lens, end) => lens.word(lens.best(state, end, at));
  return endsOf(state).some((end) => word(a, end) !== word(b, end));
}

function sentence({ state, who }, lens) {
  const { matrix, end, show } = state;
  if (lens.through(state) === "effect" && (show === "rank" || show === "words")) {
    const step = `one gradient step on ${matrix}`;
    if (show === "rank") {
      return `Rank of ${named(lens, who)} among ${whole(lens.vocab)} words by what ${step} does,`
        + " measured: 0 is raised most.";
    }
    const does = { promoted: "raises", suppressed: "lowers" }[end];
    return does
      ? `The word whose log-probability ${step} ${does} most, measured.`
      : `The words that ${step} raises (above) and lowers (below) most, measured.`;
  }
  const delta = lens.through(state) === "delta";
  const read = delta ? "\u03b4" : "x";
  const step = `one gradient step on ${matrix}`;
  const pole = delta ? "least" : "most";
  if (show === "rank") {
    return `Rank of ${named(lens, who)} among ${whole(lens.vocab)} words in the reading of ${read}: 0 is`
      + ` the most probable; a step on ${matrix} promotes the ${pole} probable.`;
  }
  if (show !== "words") return `Norm of \u03b4, the gradient that comes back to ${matrix}.`;
  const promotes = delta ? "promotes" : "stamps in";
  if (end === "both") {
    return `The words that ${step} ${promotes} most (above) and suppresses most (below).`;
  }
  if (end === "promoted") {
    return `The word that ${step} ${promotes} most: ${read}\u2019s ${pole} probable.`;
  }
  return delta
    ? `The word that ${step} suppresses most: \u03b4\u2019s most probable.`
    : `The word least like what ${step} stamps in: x\u2019s least probable.`;
}

function drawLegend(widget, scale, seen) {
  const { lenses, state, views, legend } = widget;
  const [lens] = lenses;
  const ramp = make("span", "bw-ramp");
  for (let step = 0; step < STEPS; step++) ramp.append(make("i", `s${step}`));
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
  if (lenses.length > 1) {
    const count = views[0].cells.filter((_, at) => differs(widget, at)).length;
    const what = { norm: "norms more than 5 % apart", rank: "another rank" }[state.show];
    seen.add("bw-other");
    key("bw-other", `${what ?? "another word"} (${count} of ${lens.size} cells)`);
  }
  key("bw-faint", lens.through(state) === "effect"
    ? "steps of different sizes disagree"
    : "vector so short that the final norm\u2019s epsilon outweighs it");
  key("bw-nil", "no gradient, or not read");
  const trust = lenses.map((each) => each.judged(state)).find(Boolean);
  key("bw-trust", trust?.key);
  key("bw-chance", trust?.why);
  legend.replaceChildren(bar, keys);
}

// What is known of one cell: { element, fill(cell, pinned) }.
function detail({ state }, lens) {
  const title = make("p", "bw-cell");
  const facts = make("dl", "bw-facts");
  const note = make("p", "bw-doubt");
  const heads = ["#", "promoted", "", "suppressed", ""].map((text) => {
    const head = make("th", "", text);
    head.scope = "col";
    return head;
  });
  const rows = Array.from({ length: lens.k }, (_, place) =>
    make("tr", "", make("td", "", String(place + 1)), ...[1, 2, 3, 4].map(() => make("td"))));
  const head = make("thead", "", make("tr", "", ...heads));
  const list = make("table", "bw-words", head, make("tbody", "", ...rows));

  function fact(name, value, more = "") {
    const value_ = make("dd", "", value, more && make("small", "", more));
    facts.append(make("dt", "", name), value_);
  }

  function fill(at, pinned) {
    const pos = lens.posOf(at);
    const where = `layer ${lens.layers[lens.layerOf(at)]} \u00b7 position ${pos}`;
    title.replaceChildren(sayExactly(make("b"), lens.tokens[pos]), make("span", "", where));
    if (pinned) title.append(make("em", "", "pinned"));
    const norm = lens.delta(state)[at];
    facts.replaceChildren();
    fact("norm of \u03b4", short(norm));
    fact("norm of x", short(lens.x(state)[at]));
    for (const who of ["target", "answer"]) {
      if (!lens.has(state, who)) continue;
      const rank = lens.rank(state, who, at);
      const place = `promoted #${whole(1 + fromEnd(lens, state, rank, "promoted"))}`;
      const title = who === "target" && several(lens) ? "first token\u2019s rank" : `${who} rank`;
      fact(title, rank < 0 ? "none" : whole(rank), rank < 0 ? "" : place);
    }
    const trust = lens.judged(state);
    if (trust) fact("trust", trust.says[lens.layerOf(at)].replace(/^Layer \d+: /, ""));
    ENDS.forEach((end, which) => {
      const found = norm ? lens.list(state, end, at) : [];
      rows.forEach((row, place) => {
        const [cell, score] = [...row.cells].slice(1 + 2 * which);
        const entry = found[place];
        const index = entry?.index ?? 0;
        sayExactly(cell, lens.word(index));
        const mark = index === lens.target ? "bw-hit" : index === lens.answer ? "bw-own" : "";
        cell.className = index ? mark : "";
        score.textContent = entry ? signed(entry.score) : "";
      });
    });
    for (const at of [2, 4]) heads[at].textContent = lens.unit(state);
    note.textContent = doubt(lens, state, at);
  }

  return { element: make("div", "bw-detail", make("div", "", title, facts), list, note), fill };
}

function doubt(lens, state, at) {
  if (!lens.delta(state)[at]) return "No gradient reaches this cell: a step writes nothing here.";
  const left = lens.left(state, at);
  if (left < 0) return "";
  if (lens.through(state) === "effect") {
    return "Steps of different sizes disagree, or the loss falls otherwise than predicted: these"
      + " words are not to be relied on.";
  }
  const advice = "normalised" in lens.matrices[state.matrix].readings
    ? "the normalised lens reads it at unit length" : "a normalised lens would not shrink it";
  return "A very short vector: the final norm\u2019s epsilon leaves"
    + ` ${left} % of its length, so these words may be the`
    + ` norm\u2019s bias; ${advice}.`;
}
