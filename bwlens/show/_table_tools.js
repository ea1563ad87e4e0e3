// The lens table, fifth part: words to follow, the overview of a long prompt.

// A word as it is typed: with its leading blank it is that token alone, without it either.
function sameWord({ word }, token) {
  return word[0] === " " ? token === word : bare(token) === word;
}

const isFollowed = (widget, token) => Boolean(widget.word) && sameWord(widget, token);

function follow(widget, word) {
  widget.word = word === widget.word ? "" : word;
  if (widget.input) widget.input.value = widget.word;
  paint(widget, false);
}

// To the next cell that holds the followed word, or the one before: token by token, in each from
// the top; also where it is not the first of a cell's words.
function step(widget, back) {
  const { holding, columns, lenses: [lens], state, current } = widget;
  const up = state.top === "last" ? -1 : 1;
  const place = (cell) =>
    columns.indexOf(lens.posOf(cell)) * lens.layers.length + up * lens.layerOf(cell);
  const order = [...holding.keys()].sort((a, b) => (place(a) - place(b)) * (back ? -1 : 1));
  if (!order.length) return;
  const here = place(current);
  const next = order.find((cell) => (back ? place(cell) < here : place(cell) > here)) ?? order[0];
  look(widget, next);
  for (const each of widget.views) bringIntoView(widget, each);
  widget.spoken.textContent = spokenOf(lens, state, next);
}

function following(widget) {
  const input = make("input");
  input.type = "search";
  input.placeholder = "a word";
  input.size = 9;
  input.setAttribute("aria-label", "Follow a word: mark every cell that promotes or suppresses it");
  input.title = "Enter goes to the next cell that holds the word, Shift+Enter to the one before";
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    widget.keyed = true;
    step(widget, event.shiftKey);
  });
  input.addEventListener("input", () => {
    widget.word = input.value;
    paint(widget, false);
  });
  input.value = widget.word;
  const options = [...new Set(widget.lenses.flatMap((each) =>
    [...each.follow, each.target, each.answer].map((index) => each.word(index))))].filter(Boolean);
  const list = make("datalist", "", ...options.map((word) => {
    const option = make("option");
    option.value = word;
    return option;
  }));
  list.id = `${widget.id}-words`;
  input.setAttribute("list", list.id);
  widget.input = input;
  return make("fieldset", "bw-follow", make("legend", "", "Follow"), input, list);
}

// The view as a grid of texts, rows as they are shown.
function gridOf(widget, each) {
  const { columns, state } = widget;
  const heads = columns.map((pos) => exact(each.lens.tokens[pos]));
  const rows = each.lens.layers.map((layer, at) => ({
    name: String(layer),
    texts: each.looks.slice(at * columns.length, (at + 1) * columns.length)
      .map(({ className, lines }) => ({
        hit: className.includes("bw-hit"),
        text: lines.map((line) => (line.className ? "\u2423" : "") + line.text).join(" / "),
      })),
  }));
  return { heads, rows: state.top === "last" ? rows.reverse() : rows };
}

const asText = {
  text: ({ heads, rows }) => [["layer", ...heads], ...rows.map(({ name, texts }) =>
    [name, ...texts.map(({ text }) => text)])].map((row) => row.join("\t")).join("\n"),
  Markdown({ heads, rows }) {
    const plain = (text) => text.replace(/[\\`*_{}[\]<>()#|~$&]/g, "\\$&");
    const line = (cells) => `| ${cells.join(" | ")} |`;
    return [
      line(["layer", ...heads.map(plain)]),
      line(["---:", ...heads.map(() => "---")]),
      ...rows.map(({ name, texts }) => line([name, ...texts.map(({ text, hit }) =>
        hit ? `**${plain(text)}**` : plain(text))])),
    ].join("\n");
  },
  LaTeX({ heads, rows }) {
    const names = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
      "\u2423": "\\textvisiblespace{}", "<": "\\textless{}", ">": "\\textgreater{}",
      "\u00b7": "$\\cdot$", "\u2212": "$-$" };
    const plain = (text) =>
      text.replace(/[\\~^\u2423<>\u00b7\u2212]|[#$%&_{}]/g, (sign) => names[sign] ?? `\\${sign}`);
    const line = (cells) => `${cells.join(" & ")} \\\\`;
    return [
      `\\begin{tabular}{r${"l".repeat(heads.length)}}`,
      "\\toprule",
      line(["layer", ...heads.map(plain)]),
      "\\midrule",
      ...rows.map(({ name, texts }) => line([name, ...texts.map(({ text, hit }) =>
        hit ? `\\textbf{${plain(text)}}` : plain(text))])),
      "\\bottomrule",
      "\\end{tabular}",
    ].join("\n");
  },
};

function cellText(widget, { lens }) {
  const { state, current: at } = widget;
  const norm = lens.delta(state)[at];
  const words = (end) => (norm ? lens.list(state, end, at) : [])
    .map(({ index, score }) => `${exact(lens.word(index))} ${signed(score)}`).join(", ");
  const where = `layer ${lens.layers[lens.layerOf(at)]}, ${exact(lens.tokens[lens.posOf(at)])}`;
  return [`${where}, ${state.matrix}: norm ${short(norm)}`,
    ...ENDS.map((end) => `${end}: ${words(end)}`)].join("\n");
}

// What a colour of the style sheet is in the page's scheme.
function colorOf({ root }, name) {
  const probe = make("i");
  probe.style.color = `var(${name})`;
  root.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

// The tables as they are shown, as a picture that needs nothing else.
function asSvg(widget) {
  drawAll(widget);
  const quote = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const looks = new Map();
  const lookOf = (cell) => {
    const key = cell.tagName + cell.className + cell.parentElement.className;
    if (!looks.has(key)) {
      const style = getComputedStyle(cell);
      looks.set(key, { back: style.backgroundColor, ink: style.webkitTextFillColor,
        size: parseFloat(style.fontSize), weight: style.fontWeight });
    }
    return looks.get(key);
  };
  const gap = 1;
  const out = [];
  const [target, mark] = ["--target", "--mark"].map((name) => colorOf(widget, name));
  let [left, bottom] = [8, 0];
  for (const each of widget.views) {
    let top = 8;
    const title = each.part.querySelector(".bw-name")?.textContent ?? "";
    const caption = [title, each.caption.textContent].filter(Boolean).join(": ");
    const { ink } = lookOf(each.rows[0].cells[0]);
    out.push(`<text x="${left}" y="${top + 12}" font-size="12" fill="${ink}">${quote(caption)}</text>`);
    top += 22;
    for (const row of each.table.rows) {
      const height = row.offsetHeight;
      let x = left;
      [...row.cells].forEach((cell, at) => {
        const width = widget.widths[at];
        const look = lookOf(cell);
        const box = `x="${x}" y="${top}" width="${width}" height="${height}"`;
        const has = (name) => cell.classList.contains(name);
        if (cell.tagName === "TD" && !has("bw-nil")) {
          const frame = has("bw-hit") ? `stroke="${target}" stroke-width="1.5"`
            : has("bw-own") ? `stroke="${look.ink}" stroke-width="1.5" stroke-dasharray="4 3"` : "";
          out.push(`<rect ${box} rx="2" fill="${look.back}" ${frame}/>`);
          if (has("bw-up") || has("bw-down")) {
            const sides = [x + 3.5, x + width - 3.5].map((at) => `M${at} ${top + 2}v${height - 4}`);
            out.push(`<path d="${sides.join("")}" stroke="${mark}" stroke-width="3" `
              + `stroke-dasharray="${has("bw-up") ? "none" : "3 2"}"/>`);
          }
        }
        const lines = [...cell.querySelectorAll("div, b")];
        (lines.length ? lines : [cell]).forEach((line, number, all) => {
          const sign = line.classList.contains("bw-word") ? "\u2423" : "";
          const text = quote(sign + line.textContent);
          if (!text) return;
          const y = top + (height * (number + 0.5)) / all.length + look.size * 0.36;
          out.push(`<text x="${x + width / 2}" y="${y.toFixed(1)}" text-anchor="middle" `
            + `font-size="${look.size}" font-weight="${look.weight}" fill="${look.ink}">${text}</text>`);
        });
        x += width + gap;
      });
      top += height + gap;
    }
    bottom = Math.max(bottom, top);
    left += widget.widths.reduce((sum, width) => sum + width + gap, 24);
  }
  widget.views.forEach((each) => drawSeen(widget, each, true));
  const paper = getComputedStyle(widget.root).backgroundColor;
  const family = quote(getComputedStyle(widget.root).fontFamily);
  const size = `width="${left}" height="${bottom + 8}"`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size} font-family="${family}">`
    + `<rect ${size} fill="${paper}"/>${out.join("")}</svg>`;
}

function download(name, blob) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function savePng(widget) {
  const image = new Image();
  image.src = `data:image/svg+xml,${encodeURIComponent(asSvg(widget))}`;
  await image.decode();
  const canvas = make("canvas");
  [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  pen.drawImage(image, 0, 0);
  canvas.toBlob((blob) => download("bwlens.png", blob));
}

async function copy(widget, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", "bw-spoken");
    area.value = text;
    widget.root.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  widget.spoken.textContent = "copied";
}

// Copies and pictures of what is shown.
function taking(widget) {
  const tables = (name) => widget.views.map((each) => asText[name](gridOf(widget, each))).join("\n\n");
  const jobs = {
    "copy the cell": () => copy(widget, widget.views.map((each) => cellText(widget, each)).join("\n")),
    ...Object.fromEntries(Object.keys(asText).map((name) =>
      [`copy the table as ${name}`, () => copy(widget, tables(name))])),
    "save as PNG": () => savePng(widget),
    "save as SVG": () =>
      download("bwlens.svg", new Blob([asSvg(widget)], { type: "image/svg+xml" })),
  };
  const menu = make("details", "bw-menu", make("summary", "", "Take along"));
  menu.append(make("div", "", ...Object.entries(jobs).map(([name, job]) => button(name, () => {
    job();
    menu.open = false;
  }))));
  return menu;
}

// On a page of its own, the view is in the address: a link opens it as it was.
function remembering(widget, defaults) {
  const { root, state, lenses: [lens] } = widget;
  if (!root.parentElement?.matches("main") || !("scripts" in document.documentElement.dataset)) {
    return { keep() {}, recall() {} };
  }
  const mark = widget.number > 1 ? `${widget.number}.` : "";
  const all = () => new URLSearchParams(location.hash.slice(1));
  return {
    keep() {
      const parameters = all();
      const put = (key, value, usual) =>
        value === usual ? parameters.delete(mark + key) : parameters.set(mark + key, value);
      for (const key of Object.keys(state)) put(key, state[key], defaults[key]);
      put("word", widget.word, defaults.word);
      put("columns", widget.columns.join("."), defaults.columns);
      const at = widget.current;
      const cell = widget.pinned ? `${lens.layers[lens.layerOf(at)]}.${lens.posOf(at)}` : "";
      put("cell", cell, "");
      const text = parameters.toString();
      if (text === location.hash.slice(1)) return;
      try {
        history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
      } catch {
        // a page without an address, as in a frame
      }
    },
    // What the address says, where it is possible here.
    recall() {
      const parameters = all();
      for (const key of Object.keys(state)) {
        const value = parameters.get(mark + key);
        const input = widget.inputs[key]?.find((each) => each.value === value);
        if (input) {
          state[key] = value;
          input.checked = true;
        }
      }
      widget.word = parameters.get(`${mark}word`) ?? widget.word;
      widget.input.value = widget.word;
      const columns = parameters.get(`${mark}columns`)?.split(".").map(Number)
        .filter((pos) => pos >= 0 && pos < lens.width);
      if (columns?.length) widget.columns = [...new Set(columns)].sort((a, b) => a - b);
      const [layer, pos] = (parameters.get(`${mark}cell`) ?? "").split(".").map(Number);
      const at = lens.layers.indexOf(layer);
      if (at < 0 || !widget.columns.includes(pos)) return undefined;
      widget.pinned = true;
      return at * lens.width + pos;
    },
  };
}
