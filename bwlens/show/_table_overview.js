// The lens table, sixth part: a prompt of many tokens as a strip, and which columns are drawn.

const MANY = 40; // tokens; from there on there are a strip and a choice of columns
const WINDOW = 30; // columns around one that was picked

// Other columns: the tables are built anew, the cell in focus stays if it can.
function redraw(widget, columns) {
  const [lens] = widget.lenses;
  const pos = lens.posOf(widget.current);
  const near = columns.reduce((best, each) =>
    Math.abs(each - pos) < Math.abs(best - pos) ? each : best);
  widget.columns = columns;
  widget.current += near - pos;
  widget.views.forEach((each) => build(widget, each));
  paint(widget);
}

function strengths({ lenses, state }) {
  const [lens] = lenses;
  const most = new Float64Array(lens.width);
  lens.delta(state).forEach((norm, at) => {
    const pos = lens.posOf(at);
    if (norm > most[pos]) most[pos] = norm;
  });
  return most;
}

function around(pos, width) {
  const first = Math.max(0, Math.min(pos - WINDOW / 2, width - WINDOW));
  return Array.from({ length: Math.min(WINDOW, width) }, (_, at) => first + at);
}

function overview(widget) {
  const [lens] = widget.lenses;
  const { width } = lens;
  const own = [0, ...lens.subject, ...Array.from({ length: width }, (_, pos) => pos)
    .slice(lens.given - 1)].filter((pos) => pos < width);
  const sorted = (list) => [...new Set(list)].sort((a, b) => a - b);
  const choices = {
    ...(width <= DRAWN ? { all: () => Array.from({ length: width }, (_, pos) => pos) } : {}),
    "strongest 20"() {
      const norms = strengths(widget);
      const order = [...norms.keys()].sort((a, b) => norms[b] - norms[a]);
      return sorted([...order.slice(0, 20), ...own]);
    },
    "subject and last": () => sorted(own),
  };
  const buttons = Object.entries(choices).map(([name, list]) =>
    button(name, () => redraw(widget, list()), "bw-choice"));
  const [drawn, bars, subject] = ["drawn", "bars", "subject"].map((name) =>
    svg("path", { class: `bw-${name}` }));
  const picture = svg("svg", {
    viewBox: `0 0 ${width} 30`, preserveAspectRatio: "none", role: "img",
    "aria-label": "norm of each token; a click shows it, with Shift adds it",
  }, drawn, bars, subject);
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const at = Math.floor(((event.clientX - box.left) / box.width) * width);
    const pos = Math.min(Math.max(at, 0), width - 1);
    widget.current = lens.layerOf(widget.current) * width + pos;
    const { columns } = widget;
    if (event.shiftKey) {
      const others = columns.filter((each) => each !== pos);
      redraw(widget, sorted(others.length < columns.length && others.length ? others
        : [...columns, pos]));
    } else redraw(widget, columns.includes(pos) ? columns : around(pos, width));
  });
  widget.drawStrip = () => {
    const norms = strengths(widget);
    const top = lens.top(widget.state);
    const bar = (pos) => `M${pos} 26v${(-25 * Math.min(1, norms[pos] / top)).toFixed(1)}h.8V26z`;
    bars.setAttribute("d", Array.from(norms.keys(), bar).join(""));
    drawn.setAttribute("d", widget.columns.map((pos) => `M${pos} 0h1v30h-1z`).join(""));
    subject.setAttribute("d", lens.subject.map((pos) => `M${pos} 28h1v2h-1z`).join(""));
  };
  return make("div", "bw-overview", make("span", "", "Tokens "), ...buttons, picture);
}
