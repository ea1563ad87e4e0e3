// The lens table, last part: takes over the plain tables that show/table.py wrote.
//
// Every output of a notebook carries this script. The first copy that runs is the one that mounts,
// and every copy mounts the tables that are still plain, so that any number of copies does no harm.

let mounted = 0;

async function mount(root) {
  root.dataset.taken = "";
  try {
    const packed = root.querySelector("script[type='application/gzip']").textContent;
    start(root, (await unpack(packed)).map(decode));
  } catch (error) {
    const why = `Only the plain table is shown, as this browser could not unpack the rest (${error}).`;
    root.append(make("p", "bw-doubt", why));
  }
  root.dataset.live = "";
}

function start(root, lenses) {
  const [lens] = lenses;
  const matrices = Object.keys(lens.matrices);
  const readings = Object.keys(lens.matrices[matrices[0]].readings);
  const state = {
    matrix: matrices.includes("W_out") ? "W_out" : matrices[0],
    end: "promoted",
    reading: readings[0],
    show: "words",
    scale: "linear",
    top: "last",
  };
  const widget = {
    id: `${NAME}-${++mounted}`,
    lenses,
    state,
    who: lens.has(state, "target") ? "target" : "answer",
    legend: make("div", "bw-legend"),
    current: -1,
    pinned: false,
    typed: -Infinity, // when the last key was pressed
  };
  widget.views = [...root.querySelectorAll(".bw-part")].map((part, at) => view(widget, part, at));
  widget.spoken = make("p", "bw-spoken");
  widget.spoken.setAttribute("aria-live", "polite");
  const hint = make("p", "bw-hint", "Arrow keys move, a click or Enter pins, Escape lets go.");
  const panel = make("aside", "bw-panel", ...widget.views.map((each) => each.detail.element), hint);
  panel.setAttribute("aria-label", "The cell in focus");

  const stage = make("div", "bw-stage");
  widget.views[0].part.before(stage);
  const parts = make("div", "bw-parts", ...widget.views.map((each) => each.part));
  stage.append(make("div", "bw-left", parts, widget.legend), panel);
  // A single lens has its heading above the switches, two have one above each table.
  if (lenses.length === 1) stage.before(root.querySelector(".bw-head"));
  stage.before(switches(widget, matrices, readings));
  stage.after(widget.spoken);
  root.classList.toggle("bw-pair", lenses.length > 1);
  root.classList.toggle("bw-tall", lens.layers.length > 15);
  // JupyterLab: keys pressed in here are ours, not the notebook's.
  root.setAttribute("data-lm-suppress-shortcuts", "true");

  for (const each of widget.views) listen(widget, each);
  paint(widget);
  look(widget, opening(lens, state));
  for (const each of widget.views) enter(widget, each);
  requestAnimationFrame(() => widget.views.forEach((each) => bringIntoView(widget, each)));
}

function switches(widget, matrices, readings) {
  const { state } = widget;
  const named = (...texts) => texts.map((text) => [text, text]);
  const shown = [["words", "words"], ["rank", `${widget.who} rank`], ...named("norm", "shade")];
  const groups = [
    ["matrix", "Matrix", named(...matrices)],
    ["end", "Words", named("promoted", "suppressed", "both")],
    ["reading", "Reading", named(...readings)],
    ["show", "Cells", shown],
    ["scale", "Scale", named("linear", "log")],
    ["top", "On top", [["last", "last layer"], ["first", "first layer"]]],
  ];
  const bar = make("div", "bw-bar");
  for (const [key, title, options] of groups) {
    if (options.length < 2) continue;
    const group = make("fieldset", "", make("legend", "", title));
    for (const [value, text] of options) {
      const input = make("input");
      input.type = "radio";
      input.name = `${widget.id}-${key}`;
      input.value = value;
      input.checked = state[key] === value;
      input.addEventListener("change", () => {
        state[key] = value;
        paint(widget);
        look(widget, widget.current);
        for (const each of widget.views) bringIntoView(widget, each);
      });
      group.append(make("label", "", input, make("span", "", text)));
    }
    bar.append(group);
  }
  return bar;
}

// Takes one plain table over: its rows by layer, its cells by number.
function view(widget, part, which) {
  const lens = widget.lenses[which];
  const table = part.querySelector("table");
  const body = table.tBodies[0];
  const rows = [...body.rows].reverse(); // the plain table has the last layer on top
  const cells = rows.flatMap((row) => [...row.cells].slice(1));
  const heads = [...table.tHead.rows[0].cells].slice(1);
  // What was written for viewers without styles gives way to the style sheet.
  for (const element of body.querySelectorAll("[style]")) element.removeAttribute("style");
  part.querySelector(".bw-note").remove();
  heads.forEach((head, pos) => {
    head.title = `position ${pos}: ${exact(lens.tokens[pos])}`;
    if (pos >= lens.given) head.classList.add("bw-forced");
  });
  const caption = part.querySelector(".bw-caption");
  caption.id = `${widget.id}-caption-${which}`;
  table.className = "bw-grid";
  table.setAttribute("role", "grid");
  table.setAttribute("aria-readonly", "true");
  table.setAttribute("aria-labelledby", caption.id);
  const scroll = make("div", "bw-scroll");
  table.before(scroll);
  scroll.append(table);
  const places = new Map(cells.map((cell, at) => [cell, at]));
  const shown = detail(widget, lens);
  return { part, lens, table, body, rows, cells, heads, places, caption, scroll, detail: shown };
}

// The cell to begin with: the strongest that promotes the target, else the strongest.
function opening(lens, state) {
  const delta = lens.delta(state);
  const hit = (at) =>
    Boolean(lens.target && delta[at]) && lens.best(state, "promoted", at) === lens.target;
  let best = 0;
  for (let at = 1; at < lens.size; at++) {
    if (hit(at) !== hit(best) ? hit(at) : delta[at] > delta[best]) best = at;
  }
  return best;
}

// Shows a cell in the panel, and where it is.
function look(widget, at) {
  for (const { table, rows, cells, heads, lens, detail } of widget.views) {
    for (const [cell, on] of [[widget.current, false], [at, true]]) {
      if (cell < 0) continue;
      cells[cell].classList.toggle("bw-at", on);
      rows[lens.layerOf(cell)].cells[0].classList.toggle("bw-here", on);
      heads[lens.posOf(cell)].classList.toggle("bw-here", on);
    }
    table.classList.toggle("bw-pinned", widget.pinned);
    detail.fill(at, widget.pinned);
  }
  widget.current = at;
}

// Makes the current cell the one that the Tab key finds.
function enter(widget, each) {
  each.cells[each.entry ?? widget.current].removeAttribute("tabindex");
  each.entry = widget.current;
  each.cells[each.entry].tabIndex = 0;
}

// Scrolls a table, and nothing around it, to the current cell; headings cover its edges.
function bringIntoView(widget, { table, scroll, cells }) {
  const cell = cells[widget.current].getBoundingClientRect();
  const corner = table.tHead.rows[0].cells[0].getBoundingClientRect();
  const box = scroll.getBoundingClientRect();
  const by = (low, high, first, last) =>
    low < first + 4 ? low - first - 4 : high > last - 4 ? high - last + 4 : 0;
  const [right, bottom] = [box.left + scroll.clientWidth, box.top + scroll.clientHeight];
  scroll.scrollLeft += by(cell.left, cell.right, box.left + corner.width, right);
  scroll.scrollTop += by(cell.top, cell.bottom, box.top + corner.height, bottom);
}

function listen(widget, each) {
  const { table, scroll, places, cells } = each;
  const under = (event) => places.get(event.target.closest?.("td"));
  table.addEventListener("pointerover", (event) => {
    const at = under(event);
    // Keys scroll cells under a mouse that only rests there.
    const resting = event.timeStamp - widget.typed < 500 || event.pointerType === "touch";
    if (at !== undefined && !widget.pinned && !resting) look(widget, at);
  });
  table.addEventListener("click", (event) => {
    const at = under(event);
    if (at === undefined) return;
    widget.pinned = !(widget.pinned && at === widget.current);
    look(widget, at);
    enter(widget, each);
    cells[at].focus({ preventScroll: true });
  });
  table.addEventListener("focusin", (event) => {
    const at = under(event);
    if (at !== undefined && at !== widget.current) look(widget, at);
  });
  table.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || !press(widget, each.lens, event)) return;
    event.preventDefault();
    event.stopPropagation();
    widget.typed = event.timeStamp;
    bringIntoView(widget, each);
    enter(widget, each);
    cells[widget.current].focus();
    widget.spoken.textContent = spokenOf(each.lens, widget.state, widget.current);
  });
  // Two tables side by side scroll as one.
  scroll.addEventListener("scroll", () => {
    for (const other of widget.views) {
      if (other !== each) other.scroll.scrollTo(scroll.scrollLeft, scroll.scrollTop);
    }
  });
}

// Moves or pins as a key says; whether the key says anything.
function press(widget, lens, { key, ctrlKey }) {
  const [top, right] = [lens.layers.length - 1, lens.width - 1];
  const up = widget.state.top === "last" ? 1 : -1;
  let layer = lens.layerOf(widget.current);
  let pos = lens.posOf(widget.current);
  if (key === "ArrowLeft") pos -= 1;
  else if (key === "ArrowRight") pos += 1;
  else if (key === "ArrowUp") layer += up;
  else if (key === "ArrowDown") layer -= up;
  else if (key === "PageUp") layer += 10 * up;
  else if (key === "PageDown") layer -= 10 * up;
  else if (key === "Home") [pos, layer] = [0, ctrlKey ? up * Infinity : layer];
  else if (key === "End") [pos, layer] = [right, ctrlKey ? -up * Infinity : layer];
  else if (key === "Enter" || key === " ") widget.pinned = !widget.pinned;
  else if (key === "Escape") widget.pinned = false;
  else return false;
  const clip = (value, most) => Math.min(Math.max(value, 0), most);
  look(widget, clip(layer, top) * lens.width + clip(pos, right));
  return true;
}

// What a screen reader says of a cell beside its word and headings.
function spokenOf(lens, state, at) {
  const norm = lens.delta(state)[at];
  if (!norm) return "no gradient";
  const [promoted, suppressed] = ENDS.map((end) => lens.word(lens.best(state, end, at)));
  return `norm ${short(norm)}, promotes ${promoted}, suppresses ${suppressed}`;
}

const NAME = `bwlensTable${FORMAT}`;
const PLAIN = `.bwlens[data-format="${FORMAT}"]:not([data-taken])`;
window[NAME] ??= mount;
const mountAll = () => document.querySelectorAll(PLAIN).forEach(window[NAME]);
mountAll();
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
