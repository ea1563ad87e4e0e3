// The lens table, last part: the switches, the mouse and the keys; takes over the plain tables that show/table.py wrote.
//
// Every output of a notebook carries this script. The first copy that runs is the one that mounts,
// and every copy mounts the tables that are still plain, so that any number of copies does no harm.

let mounted = 0;
const ROOMY = 20; // layers; more of them are drawn densely, so that all are on one screen

// A colour in any of the ways of writing one, as red, green, blue and opacity up to 255.
function pixel(color) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.fillStyle = color;
  pen.fillRect(0, 0, 1, 1);
  return pen.getImageData(0, 0, 1, 1).data;
}

// A page is light or dark as what is painted behind the table says; no list of hosts is whole.
function scheme(root) {
  const judge = () => {
    let box = root.parentElement ?? root.getRootNode().host;
    let color;
    for (; box && !(color?.[3] > 128); box = box.parentElement ?? box.getRootNode().host) {
      color = pixel(getComputedStyle(box).backgroundColor);
    }
    if (!(color?.[3] > 128)) return;
    const [red, green, blue] = [...color].map((value) => (value / 255) ** 2.2);
    const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    root.style.colorScheme = light < 0.18 ? "dark" : "light";
    const plain = light < 0.03 || light > 0.75; // dark ink and light are readable on it
    const [r, g, b] = color;
    root.style.setProperty("--page", plain ? `rgb(${r} ${g} ${b})` : "");
  };
  judge();
  const watch = new MutationObserver(() => requestAnimationFrame(judge));
  for (const element of [document.documentElement, document.body]) {
    watch.observe(element, { attributes: true });
    element.addEventListener("transitionend", ({ target }) => target === element && judge());
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", judge);
}

async function mount(root) {
  root.dataset.taken = "";
  const number = ++mounted; // in the page's order, whichever is unpacked first
  try {
    const packed = root.querySelector("script[type='application/gzip']").textContent;
    start(root, (await unpack(packed)).map(decode), number);
  } catch (error) {
    const why = `Only the plain table is shown, as this browser could not unpack the rest (${error}).`;
    root.append(make("p", "bw-doubt", why));
  }
  root.dataset.live = "";
}

function start(root, lenses, number) {
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
    rows: lens.layers.length > ROOMY ? "dense" : "roomy",
  };
  const widget = {
    number,
    id: `${NAME}-${number}`,
    root,
    lenses,
    state,
    columns: lens.columns,
    word: lens.word(lens.follow[0] ?? 0), // a word that is followed, "" for none
    who(of) {
      const held = (of.follow ?? []).findIndex((index) => isFollowed(widget, of.word(index)));
      return held >= 0 ? held : of.has(state, "target") ? "target" : "answer";
    },
    legend: make("div", "bw-legend"),
    box: make("div", "bw-tip"),
    panelSeen: true,
    current: -1,
    pinned: false,
    keyed: false, // whether a key came after the last move of the mouse
  };
  scheme(root);
  widget.views = [...root.querySelectorAll(".bw-part")].map((part, at) => view(widget, part, at));
  const defaults = { ...state, word: widget.word, columns: widget.columns.join(".") };
  widget.spoken = make("p", "bw-spoken");
  widget.spoken.setAttribute("aria-live", "polite");
  const hint = make("p", "bw-hint", "Arrow keys move, a click or Enter pins, Escape lets go.");
  const panel = make("aside", "bw-panel", ...widget.views.map((each) => each.detail.element), hint);
  panel.setAttribute("aria-label", "The cell in focus");
  widget.box.popover = "manual";

  const stage = make("div", "bw-stage");
  widget.views[0].part.before(stage);
  const parts = make("div", "bw-parts", ...widget.views.map((each) => each.part));
  stage.append(make("div", "bw-left", parts), make("div", "bw-right", widget.legend, panel));
  // A single lens has its heading above the switches, two have one above each table.
  if (lenses.length === 1) {
    stage.before(root.querySelector(".bw-head"));
    panel.after(root.querySelector(".bw-about"));
  }
  widget.inputs = {};
  stage.before(switches(widget, matrices, readings));
  if (lens.width > MANY) stage.before(overview(widget));
  widget.memory = remembering(widget, defaults);
  const recalled = widget.memory.recall();
  widget.views.forEach((each) => build(widget, each));
  stage.after(widget.spoken, widget.box);
  root.classList.toggle("bw-pair", lenses.length > 1);
  root.classList.toggle("bw-tall", lens.layers.length > 15);
  // JupyterLab and Notebook look at the element that has the focus, and then outwards: keys that
  // are pressed in here are ours, not the notebook's.
  root.addEventListener("focusin", ({ target }) => {
    target.setAttribute("data-lm-suppress-shortcuts", "true");
  });

  for (const each of widget.views) listen(widget, each);
  widget.current = recalled ?? opening(widget);
  paint(widget);
  new ResizeObserver(() => {
    const hidden = !widget.room; // until now, as in a tab
    widget.room = root.clientWidth;
    measure(widget);
    for (const each of widget.views) (hidden ? bringIntoView : drawSeen)(widget, each);
  }).observe(root);
  new IntersectionObserver(([{ isIntersecting }]) => {
    widget.panelSeen = isIntersecting;
  }, { threshold: 0.5 }).observe(widget.views[0].detail.element.querySelector(".bw-cell"));
  const paper = matchMedia("print");
  paper.addEventListener("change", () => printing(widget, paper.matches));
  window.addEventListener("beforeprint", () => printing(widget, true));
  window.addEventListener("afterprint", () => printing(widget, false));
}

function switches(widget, matrices, readings) {
  const { state, lenses } = widget;
  const named = (...texts) => texts.map((text) => [text, text]);
  const who = widget.who(lenses[0]);
  const ranked = typeof who === "number" ? bare(widget.word) : who;
  const shown = [["words", "words"], ["rank", `${ranked} rank`], ...named("norm", "shade")];
  if (lenses.length > 1) shown.push(...named("change of norm", "change of rank"));
  const far = lenses.some((lens) => matrices.some((name) => {
    const { delta, top } = lens.matrices[name];
    return delta.some((norm) => norm > 1.0001 * top);
  }));
  const groups = [
    ["matrix", "Matrix", named(...matrices)],
    ["end", "Words", named("promoted", "suppressed", "both")],
    ["reading", "Reading", named(...readings)],
    ["show", "Cells", shown],
    ["scale", "Scale", named("linear", ...(far ? ["whole"] : []), "log")],
    ["top", "On top", [["last", "last layer"], ["first", "first layer"]]],
    ["rows", "Rows", lenses[0].layers.length > ROOMY ? named("dense", "roomy") : []],
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
      (widget.inputs[key] ??= []).push(input);
      input.addEventListener("change", () => {
        state[key] = value;
        paint(widget);
      });
      group.append(make("label", "", input, make("span", "", text)));
    }
    bar.append(group);
  }
  bar.append(following(widget), taking(widget));
  return bar;
}

// The cell to begin with: the strongest that promotes the target, else the strongest.
function opening({ lenses: [lens], state, columns }) {
  const delta = lens.delta(state);
  const drawn = new Set(columns);
  const hit = (at) =>
    Boolean(lens.target && delta[at]) && lens.best(state, "promoted", at) === lens.target;
  let best = columns[0];
  for (let at = 0; at < lens.size; at++) {
    if (!drawn.has(lens.posOf(at))) continue;
    if (hit(at) !== hit(best) ? hit(at) : delta[at] > delta[best]) best = at;
  }
  return best;
}

// Shows a cell in the panel, and where it is. The table is neither laid out nor painted anew: a
// frame of its own lies over it, and headings are marked at a key or a click alone.
function look(widget, at, passing = false) {
  for (const each of widget.views) {
    const { rows, lens } = each;
    for (const [cell, on] of [[widget.current, false], [at, true]]) {
      if (cell < 0) continue;
      cellOf(widget, each, cell)?.classList.toggle("bw-at", on);
      if (on ? passing : cell !== widget.here) continue;
      rows[lens.layerOf(cell)].cells[0].classList.toggle("bw-here", on);
      headOf(widget, each, cell)?.classList.toggle("bw-here", on);
    }
    frame(widget, each, at);
    each.detail.fill(at, widget.pinned);
  }
  widget.current = at;
  if (!passing) widget.here = at;
  else if (widget.here !== at) widget.here = -1;
  widget.memory.keep();
}

// Makes the current cell the one that the Tab key finds, or its table where it is not drawn.
function enter(widget, each) {
  const entry = cellOf(widget, each, widget.current) ?? each.scroll;
  if (each.entry === entry) return;
  each.entry?.removeAttribute("tabindex");
  each.entry = entry;
  entry.tabIndex = 0;
}

function listen(widget, each) {
  const { scroll } = each;
  const under = (event) => numberOf(widget, each, event.target.closest?.("td"));
  // Keys scroll cells under a mouse that only rests there.
  let mouse = "";
  const move = ({ clientX, clientY }) => {
    const place = `${clientX} ${clientY}`;
    if (place !== mouse) widget.keyed = false;
    mouse = place;
  };
  scroll.addEventListener("pointermove", move);
  scroll.addEventListener("pointerover", (event) => {
    move(event);
    const at = under(event);
    if (at === undefined || widget.pinned || widget.keyed || event.pointerType === "touch") return;
    look(widget, at, true);
    tip(widget, each, at);
  });
  scroll.addEventListener("pointerleave", () => widget.pinned || tip(widget, each));
  scroll.addEventListener("click", (event) => {
    const at = under(event);
    if (at === undefined) return;
    widget.pinned = !(widget.pinned && at === widget.current);
    look(widget, at);
    enter(widget, each);
    each.entry.focus({ preventScroll: true });
    tip(widget, each, widget.pinned || event.pointerType !== "touch" ? at : undefined);
  });
  scroll.addEventListener("focusin", (event) => {
    const at = under(event);
    if (at !== undefined && at !== widget.current) look(widget, at);
  });
  scroll.addEventListener("focusout", () => tip(widget, each));
  scroll.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || !press(widget, each.lens, event)) return;
    event.preventDefault();
    event.stopPropagation();
    widget.keyed = true;
    bringIntoView(widget, each);
    enter(widget, each);
    each.entry.focus({ preventScroll: true });
    tip(widget, each, event.key === "Escape" ? undefined : widget.current);
    widget.spoken.textContent = spokenOf(each.lens, widget.state, widget.current);
  });
  // Two tables side by side scroll as one.
  scroll.addEventListener("scroll", () => {
    each.scrolled = scroll.scrollLeft;
    drawSeen(widget, each);
    for (const other of widget.views) {
      if (other !== each) other.scroll.scrollTo(scroll.scrollLeft, scroll.scrollTop);
    }
  });
}

// Moves or pins as a key says; whether the key says anything.
function press(widget, lens, { key, ctrlKey }) {
  const [top, right] = [lens.layers.length - 1, widget.columns.length - 1];
  const up = widget.state.top === "last" ? 1 : -1;
  let layer = lens.layerOf(widget.current);
  let pos = widget.columns.indexOf(lens.posOf(widget.current));
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
  // Past the edge of a window on a longer prompt, the window moves along.
  const { columns } = widget;
  const [first, last] = [columns[0], columns.at(-1)];
  if ((pos < 0 || pos > right) && last - first === right && columns.length < lens.width) {
    const next = pos < 0 ? first - 1 : last + 1;
    if (next >= 0 && next < lens.width) {
      redraw(widget, around(next, lens.width));
      look(widget, layer * lens.width + next);
      return true;
    }
  }
  const clip = (value, most) => Math.min(Math.max(value, 0), most);
  look(widget, clip(layer, top) * lens.width + widget.columns[clip(pos, right)]);
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
