// The lens table, second part: its rows, cells and columns. A widget is { lenses, views, state,
// columns, ... }; `columns` are the positions that are drawn, the same in all views.

// The plain table gives way to one whose columns have widths of their own: what changes in a cell
// moves nothing else.
function view(widget, part, which) {
  const lens = widget.lenses[which];
  const scroll = make("div", "bw-scroll");
  const plain = part.querySelector("table");
  (plain.parentElement === part ? plain : plain.parentElement).replaceWith(scroll);
  part.querySelector(".bw-note").remove();
  const caption = part.querySelector(".bw-caption");
  caption.id = `${widget.id}-caption-${which}`;
  return { part, lens, scroll, caption, detail: detail(widget, lens) };
}

function build(widget, each) {
  const { lens } = each;
  const table = make("table", "bw-grid");
  const attributes = {
    role: "grid", dir: "ltr", "aria-readonly": "true", "aria-labelledby": each.caption.id,
    "aria-colcount": lens.width + 1,
  };
  for (const [name, value] of Object.entries(attributes)) table.setAttribute(name, value);
  each.rows = lens.layers.map((layer) => {
    const name = make("th", "", String(layer));
    name.scope = "row";
    if (lens.trust) {
      const strip = make("i", "bw-trust");
      strip.setAttribute("role", "img");
      name.append(strip);
    }
    return make("tr", "", name);
  });
  const corner = make("th", "", "layer");
  corner.scope = "col";
  each.head = make("tr", "", corner);
  each.cols = make("colgroup", "", make("col"));
  each.body = make("tbody", "", ...each.rows);
  table.append(each.cols, make("thead", "", each.head), each.body);
  table.style.setProperty("--n", lens.layers.length);
  each.table = table;
  [each.from, each.to] = [0, 0];
  each.scrolled = 0;
  each.entry = undefined;
  each.at = new Map(each.rows.map((row, at) => [row, at]));
  each.frame = make("div", "bw-frame");
  each.frame.setAttribute("aria-hidden", "true");
  each.unseen = make("div", "bw-unseen", ...widget.columns.map(() => make("div")));
  each.unseen.setAttribute("aria-hidden", "true");
  each.sheet = make("div", "bw-sheet", table, each.frame, each.unseen);
  each.scroll.replaceChildren(each.sheet);
}

// Of a wide table the page holds the columns that are in sight and some on both sides: a browser
// lays out and paints all that is there. The rest of the sheet is empty.
const CELLS = 900;

function draw(widget, each, from, to) {
  const lines = [each.cols, each.head, ...each.rows]; // a column has a part in each
  const focused = each.entry?.matches(":focus");
  const apart = to <= each.from || from >= each.to;
  const drop = (at) => lines.forEach(({ children }) => children[at].remove());
  for (; apart ? each.to > each.from : each.to > to; each.to--) drop(each.to - each.from);
  if (apart) each.from = each.to = from;
  for (; each.from < from; each.from++) drop(1);
  while (each.from > from) {
    each.from--;
    columnOf(widget, each, each.from).forEach((part, at) => lines[at].children[0].after(part));
  }
  for (; each.to < to; each.to++) {
    columnOf(widget, each, each.to).forEach((part, at) => lines[at].append(part));
  }
  const { widths, lefts, gap } = widget;
  [...each.unseen.children].forEach((part, column) => {
    // What the browser's search has found stays, to be seen.
    if (!drawn(each, column)) part.hidden = "until-found";
    else if (part.hidden) part.hidden = true;
  });
  each.table.style.marginLeft = `${lefts[from] - lefts[0]}px`;
  each.table.style.width = `${lefts[to - 1] + widths[to] + gap - lefts[from] + lefts[0]}px`;
  if (widget.current < 0) return;
  cellOf(widget, each, widget.current)?.classList.add("bw-at");
  if (widget.here >= 0) headOf(widget, each, widget.here)?.classList.add("bw-here");
  enter(widget, each);
  if (focused) each.entry.focus({ preventScroll: true });
}

// The words of columns that are not drawn, where the browser's own search finds them, and lays them
// open over the cells that are drawn as it scrolls there.
function writeUnseen(widget, { lens, unseen, looks }) {
  const { columns, lefts, widths, state } = widget;
  [...unseen.children].forEach((part, column) => {
    const words = lens.layers.map((_, layer) =>
      looks[layer * columns.length + column].lines.map(({ text }) => text).join(" "));
    if (state.top === "last") words.reverse();
    say(part, [bare(lens.tokens[columns[column]]), ...words].join("\n"));
    part.style.left = `${lefts[column]}px`;
    part.style.width = `${widths[column + 1]}px`;
    part.hidden = "until-found";
  });
}

// One column: its width, its heading, its cells.
function columnOf(widget, each, column) {
  const { lens, rows } = each;
  const pos = widget.columns[column];
  const head = make("th", pos >= lens.given ? "bw-forced" : "");
  head.scope = "col";
  head.title = `position ${lens.at[pos]}: ${exact(lens.tokens[pos])}`;
  const text = bare(lens.tokens[pos]);
  if (lens.subject.includes(pos)) head.append(say(make("u"), text));
  else say(head, text);
  const col = make("col");
  col.style.width = `${widget.widths[column + 1]}px`;
  const cells = rows.map(() => make("td"));
  for (const cell of [head, ...cells]) cell.setAttribute("aria-colindex", pos + 2);
  writeColumn(widget, each, column, head, cells);
  return [col, head, ...cells];
}

function seen({ widths, lefts, room, columns }, { scrolled }) {
  const shown = [...columns.keys()].filter((column) =>
    lefts[column] < scrolled + room && lefts[column] + widths[column + 1] > scrolled);
  return [shown[0] ?? 0, (shown.at(-1) ?? 0) + 1];
}

// Draws what is in sight, where something of it is not drawn yet or everything `anew`.
function drawSeen(widget, each, anew = false) {
  const [from, to] = seen(widget, each);
  if (!anew && from >= each.from && to <= each.to) return;
  const n = widget.columns.length;
  const all = CELLS / widget.views.length / each.rows.length;
  const spare = Math.max(2, Math.ceil((all - to + from) / 2));
  const first = Math.max(0, Math.min(from - spare, n - Math.floor(all)));
  draw(widget, each, first, Math.min(n, Math.max(to + spare, Math.floor(all))));
}

const drawAll = (widget) => widget.views.forEach((each) =>
  draw(widget, each, 0, widget.columns.length));

const drawn = (each, column) => column >= each.from && column < each.to;

// The cell of a table, if its column is drawn.
function cellOf(widget, each, at) {
  const column = widget.columns.indexOf(each.lens.posOf(at));
  return drawn(each, column)
    ? each.rows[each.lens.layerOf(at)].children[1 + column - each.from] : undefined;
}

function headOf(widget, each, at) {
  const column = widget.columns.indexOf(each.lens.posOf(at));
  return drawn(each, column) ? each.head.children[1 + column - each.from] : undefined;
}

function numberOf(widget, each, cell) {
  const row = each.at.get(cell?.parentElement);
  if (row === undefined || cell.tagName !== "TD") return undefined;
  return row * each.lens.width + widget.columns[each.from + cell.cellIndex - 1];
}

// The frame around the cell in focus.
function frame(widget, each, at) {
  const column = widget.columns.indexOf(each.lens.posOf(at));
  each.frame.hidden = column < 0;
  if (column < 0 || !each.tops) return;
  each.frame.classList.toggle("bw-pinned", widget.pinned);
  each.frame.style.width = `${widget.widths[column + 1]}px`;
  each.frame.style.height = `${each.height}px`;
  const top = each.tops[each.lens.layerOf(at)];
  each.frame.style.transform = `translate(${widget.lefts[column]}px, ${top}px)`;
}

// What a way to show cells sets their text in, and texts' widths in it: asked once.
function type(widget) {
  const { state: { show, rows }, views: [{ table, head }] } = widget;
  const key = show === "shade" ? show : rows;
  widget.types ??= new Map();
  if (!widget.types.has(key)) {
    const style = getComputedStyle(table);
    const known = new Map();
    const pen = document.createElement("canvas").getContext("2d");
    const size = parseFloat(style.fontSize);
    const family = style.fontFamily;
    widget.types.set(key, {
      size,
      heads: parseFloat(getComputedStyle(head.firstChild).fontSize),
      gap: parseFloat(style.borderSpacing) || 0,
      wide(text, weight, px = size) {
        const font = `${weight} ${px}px ${family}`;
        const width = known.get(font + text) ?? ((pen.font = font), pen.measureText(text).width);
        known.set(font + text, width);
        return width;
      },
    });
  }
  return widget.types.get(key);
}

// Widths that hold the words that are shown, the same in two tables side by side; true if they are
// others than before.
function fit(widget, shown) {
  const { state, views, columns } = widget;
  const { size, heads, gap, wide } = type(widget);
  const longest = 11 * Math.max(size, heads);
  const tile = state.show === "shade";
  const least = tile ? 15 : 2.6 * size;
  const wanted = columns.map((pos, column) => {
    if (tile) return least;
    let most = 0;
    for (const { lens } of views) most = Math.max(most, wide(bare(lens.tokens[pos]), 600, heads));
    for (const [text, bold] of shown[column]) most = Math.max(most, wide(text, bold ? 700 : 400));
    return most + 14;
  });
  widget.cut = new Set(columns.filter((_, column) => wanted[column] > longest));
  const widths = wanted.map((width) => Math.round(Math.min(Math.max(width, least), longest)));
  const first = Math.round(wide("layer", 400, heads) + 12 + 15 * views.some(({ lens }) => lens.trust));
  const same = String(widget.widths) === String([first, ...widths]);
  widget.widths = [first, ...widths];
  widget.gap = gap;
  widget.lefts = [];
  let left = 2 * gap + first;
  for (const width of widths) {
    widget.lefts.push(left);
    left += width + gap;
  }
  widget.wide = left;
  for (const each of views) {
    widget.widths.slice(each.from + 1, each.to + 1).forEach((width, at) => {
      each.cols.children[at + 1].style.width = `${width}px`;
    });
    each.cols.children[0].style.width = `${first}px`;
  }
  return !same;
}

// Where rows are, once they are laid out, and so the frame.
function measure(widget) {
  for (const each of widget.views) {
    each.tops = each.rows.map((row) => row.offsetTop);
    each.height = each.rows[0].offsetHeight;
    const row = each.height + (widget.gap ?? 0);
    each.unseen.style.top = `${Math.min(...each.tops) - row}px`;
    each.unseen.style.lineHeight = `${row}px`;
  }
  for (const each of widget.views) frame(widget, each, widget.current);
}

// How far a table that is scrolled so far has to be for the current cell: a column is seen whole or
// not, and no further than all columns need.
function aim({ columns, current, lefts, wide }, { lens, space }, scrolled) {
  const ends = [...lefts, wide].map((left) => left - lefts[0]);
  const most = Math.max(0, space - lefts[0]);
  const before = (right) => ends.find((end) => end >= right - most);
  const from = Math.min(scrolled, before(ends.at(-1)));
  const column = columns.indexOf(lens.posOf(current));
  if (column < 0 || ends[column] < from) return ends[column] ?? from;
  return ends[column + 1] <= from + most ? from : Math.min(before(ends[column + 1]), ends[column]);
}

// Where a table of other widths is scrolled to, so that the current cell stays about where it was.
function kept({ columns, current, lefts }, { lens, scrolled }, before) {
  const column = columns.indexOf(lens.posOf(current));
  const wanted = scrolled + lefts[column] - (before?.[column] ?? lefts[column]);
  return lefts.findLast((left) => left - lefts[0] <= wanted) - lefts[0] || 0;
}

// The sheet is as wide as its columns, and wider where the last ones are seen from a whole one on.
function scrollTo(widget, each, scrolled) {
  each.scrolled = scrolled;
  each.sheet.style.width = `${scrolled ? Math.max(widget.wide, scrolled + each.space) : widget.wide}px`;
}

// Scrolls a table, and nothing around it, to the current cell.
function bringIntoView(widget, each, from = each.scroll.scrollLeft) {
  const { lens, scroll, tops, height } = each;
  const { gap } = widget;
  each.space = scroll.clientWidth;
  scrollTo(widget, each, aim(widget, each, from));
  if (scroll.scrollLeft !== each.scrolled) scroll.scrollLeft = each.scrolled;
  const top = tops[lens.layerOf(widget.current)];
  const head = Math.min(...tops) - gap;
  const seenTop = scroll.scrollTop;
  if (top < seenTop + head + gap) scroll.scrollTop = top - head - gap;
  else if (top + height > seenTop + scroll.clientHeight) {
    scroll.scrollTop = top + height + gap - scroll.clientHeight;
  }
  drawSeen(widget, each);
}

// On paper nothing scrolls: a table that is wider than the page as several, one below the other.
function printing(widget, on, room = 660) {
  const { lefts, widths, gap } = widget;
  const starts = [0];
  lefts.forEach((left, column) => {
    const whole = left + widths[column + 1] + gap - lefts[starts.at(-1)] + lefts[0];
    if (whole > room && column > starts.at(-1)) starts.push(column);
  });
  for (const each of widget.views) {
    each.part.querySelector(".bw-paper")?.remove();
    if (!on) drawSeen(widget, each, true);
    else if (starts.length > 1) {
      const paper = make("div", "bw-paper", ...starts.map((from, at) => {
        draw(widget, each, from, starts[at + 1] ?? lefts.length);
        return each.table.cloneNode(true);
      }));
      paper.setAttribute("aria-hidden", "true");
      each.scroll.after(paper);
    } else draw(widget, each, 0, lefts.length);
  }
  if (!on) measure(widget);
}
