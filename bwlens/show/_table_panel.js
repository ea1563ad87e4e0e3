// The lens table, fourth part: what is known of one cell, in the panel and, where that is out of
// sight, in a box at the cell.

// { element, fill(cell, pinned) }
function detail(widget, lens) {
  const { state } = widget;
  const title = make("p", "bw-cell");
  const facts = make("dl", "bw-facts");
  const curve = make("div", "bw-curve");
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
  list.addEventListener("click", ({ target }) => {
    const word = target.closest("button")?.bwWord;
    if (word !== undefined) follow(widget, word);
  });

  function fact(name, ...said) {
    const [term, value] = [make("dt", "", name), make("dd", "", ...said)];
    facts.append(term, value);
    return { term, value };
  }
  const aside = (text) => (text ? [" ", make("small", "", text)] : []);

  function fill(at, pinned) {
    const pos = lens.posOf(at);
    const where = `layer ${lens.layers[lens.layerOf(at)]} \u00b7 position ${lens.at[pos]}`;
    title.replaceChildren(sayExactly(make("b"), lens.tokens[pos]), make("span", "", where));
    if (pinned) title.append(make("em", "", "pinned"));
    const norm = lens.delta(state)[at];
    facts.replaceChildren();
    const beyond = norm > 1.0001 * lens.top(state) ? "beyond the scale" : "";
    fact("norm of \u03b4", short(norm), ...aside(beyond));
    fact("norm of x", short(lens.x(state)[at]));
    for (const [who, name] of followed(widget, lens)) {
      const place = lens.place(state, who, at);
      const said = place ? [`#${whole(place)}`, ...aside(`of ${whole(lens.vocab)}`)] : ["none"];
      fact(name, ...said).term.className = `bw-line-${who}`; // as its curve
    }
    const neurons = lens.neurons(state)?.[at];
    if (neurons?.length) {
      const value = state.matrix === "W_out" ? "activation" : "\u03b4";
      const heads = ["index", value, neurons.some(([, , word]) => word) ? "word" : ""];
      const lines = neurons.map(([name, value, word]) => make("span", "bw-neuron", name, " ",
        make("span", "", short(value)), " ", sayExactly(make("b"), lens.word(word))));
      const { value: list } = fact("neurons", ...heads.map((head) => make("small", "", head)), ...lines);
      list.className = "bw-neurons";
    } else if (neurons) fact("neurons", "none");
    ENDS.forEach((end, which) => {
      const found = norm ? lens.list(state, end, at) : [];
      rows.forEach((row, place) => {
        const [cell, score] = [...row.cells].slice(1 + 2 * which);
        const entry = found[place];
        const index = entry?.index ?? 0;
        const word = button("");
        word.bwWord = lens.word(index);
        word.title = [partOf(lens.word(index)), "follow this word"].filter(Boolean).join("; ");
        cell.replaceChildren(...(index ? [sayExactly(word, lens.word(index))] : []));
        const mark = index === lens.target ? "bw-hit" : index === lens.answer ? "bw-own" : "";
        cell.className = index ? mark : "";
        if (index && isFollowed(widget, lens.word(index))) cell.classList.add("bw-followed");
        score.textContent = entry ? signed(entry.score) : "";
      });
    });
    for (const at of [2, 4]) heads[at].textContent = lens.unit(state);
    note.textContent = [trusted(lens, state, at), doubt(lens, state, at)].filter(Boolean).join(" ");
    curve.replaceChildren(...curves(widget, lens, at));
  }

  const left = make("div", "", title, facts, curve);
  return { element: make("div", "bw-detail", left, list, note), fill };
}

// How far the words of a cell's layer can be trusted, where that was measured.
function trusted(lens, state, at) {
  return lens.judged(state)?.says[lens.layerOf(at)].replace(/^Layer \d+: /, "Trust: ") ?? "";
}

function doubt(lens, state, at) {
  if (!lens.delta(state)[at]) return "No gradient reaches this cell: a step writes nothing here.";
  const less = lens.k < lens.of ? `This page holds ${lens.k} of the lens\u2019 ${lens.of} words. ` : "";
  const left = lens.left(state, at);
  if (left < 0) return less;
  if (lens.through(state) === "effect") {
    return `${less}Steps of different sizes disagree, or the loss falls otherwise than predicted:`
      + " these words are not to be relied on.";
  }
  const advice = "normalised" in lens.matrices[state.matrix].readings
    ? "the normalised lens reads it at unit length" : "a normalised lens would not shrink it";
  return `${less}A very short vector: the final norm\u2019s epsilon leaves`
    + ` ${left} % of its length, so these words may be the`
    + ` norm\u2019s bias; ${advice}.`;
}

// Whose places are known in every cell: [who, what it is called].
function followed(widget, lens) {
  const names = { target: several(lens) ? "first token" : "target", answer: "answer" };
  const known = Object.entries(names).filter(([who]) => lens.has(widget.state, who));
  (lens.follow ?? []).forEach((index, at) => known.push([at, exact(lens.word(index))]));
  return known;
}

// The places of the words that are followed through the layers at one position, #1 on top.
function curves(widget, lens, at) {
  const { state } = widget;
  const known = followed(widget, lens);
  const n = lens.layers.length;
  if (!known.length || n < 3) return [];
  const [width, height, edge] = [200, 54, 4];
  const x = (layer) => edge + ((width - 2 * edge) * layer) / (n - 1);
  const y = (place) => edge + ((height - 2 * edge) * Math.log(place)) / Math.log(lens.vocab);
  const pos = lens.posOf(at);
  const here = x(lens.layerOf(at));
  const lines = known.map(([who]) => {
    let path = "";
    for (let layer = 0; layer < n; layer++) {
      const place = lens.place(state, who, layer * lens.width + pos);
      if (place) path += `${path ? "L" : "M"}${x(layer).toFixed(1)} ${y(place).toFixed(1)}`;
    }
    return svg("path", { d: path, class: `bw-line-${who}` });
  });
  const names = known.map(([, name]) => name).join(", ");
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `place of ${names} from the promoted end, by layer`,
  }, svg("line", { x1: here, x2: here, y1: 0, y2: height, class: "bw-now" }), ...lines);
  const [first, last] = [lens.layers[0], lens.layers[n - 1]];
  return [picture, make("small", "", `#1 on top, log; layers ${first} to ${last}`)];
}

// The box at the cell, for where the panel cannot be seen.
function tip(widget, each, at) {
  const { box, state } = widget;
  const cell = at === undefined ? undefined : cellOf(widget, each, at);
  if (!cell || widget.panelSeen || !box.showPopover) {
    if (box.matches?.(":popover-open")) box.hidePopover();
    return;
  }
  const { lens } = each;
  const norm = lens.delta(state)[at];
  const lines = ENDS.map((end) => {
    const words = norm ? lens.list(state, end, at).slice(0, 5) : [];
    return make("p", "", make("b", "", `${end}: `), words.map(({ index }) => exact(lens.word(index)))
      .join("  ") || "none");
  });
  const places = followed(widget, lens).map(([who, name]) => {
    const place = lens.place(state, who, at);
    return place ? `${name} #${whole(place)}` : "";
  });
  const where = `layer ${lens.layers[lens.layerOf(at)]}, ${exact(lens.tokens[lens.posOf(at)])}`;
  const facts = [where, `norm ${short(norm)}`, ...places].filter(Boolean).join(" \u00b7 ");
  box.replaceChildren(make("p", "bw-facts", facts), ...lines);
  if (!box.matches(":popover-open")) box.showPopover();
  const [from, size] = [cell.getBoundingClientRect(), box.getBoundingClientRect()];
  const left = Math.min(from.left, window.innerWidth - size.width - 8);
  const below = from.bottom + 6 + size.height < window.innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${below ? from.bottom + 6 : Math.max(4, from.top - size.height - 6)}px`;
}
