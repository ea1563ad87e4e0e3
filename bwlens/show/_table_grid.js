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
  const { lens, scroll } = each;
  const { columns } = widget;
  const table = make("table", "bw-grid");
  const attributes = {
    role: "grid", dir: "ltr", "aria-readonly": "true", "aria-labelledby": each.caption.id,
    "aria-colcount": lens.width + 1,
  };
  for (const [name, value] of Object.entries(attributes)) table.setAttribute(name, value);
  each.cols = [0, ...columns].map(() => make("col"));
  each.heads = columns.map((pos) => {
    const head = make("th", pos >= lens.given ? "bw-forced" : "");
    head.scope = "col";
    head.title = `position ${lens.at[pos]}: ${exact(lens.tokens[pos])}`;
    const text = bare(lens.tokens[pos]);
    if (lens.subject.includes(pos)) head.append(say(make("u"), text));
    else say(head, text);
    return head;
  });
  each.rows = lens.layers.map((layer) => {
    const name = make("th", "", String(layer));
    name.scope = "row";
    if (lens.trust) {
      const strip = make("i", "bw-trust");
      strip.setAttribute("role", "img");
      name.append(strip);
    }
    return make("tr", "", name, ...columns.map(() => make("td")));
  });
  const corner = make("th", "", "layer");
  corner.scope = "col";
  const head = make("thead", "", make("tr", "", corner, ...each.heads));
  each.body = make("tbody", "", ...each.rows);
  table.append(make("colgroup", "", ...each.cols), head, each.body);
  table.style.setProperty("--n", lens.layers.length);
  each.table = table;
  each.entry = undefined;
  each.at = new Map(each.rows.map((row, at) => [row, at]));
  each.cells = each.rows.flatMap((row) => [...row.cells].slice(1));
  each.frame = make("div", "bw-frame");
  each.frame.setAttribute("aria-hidden", "true");
  scroll.replaceChildren(table, each.frame);
}

// The cell of a table, if its column is drawn.
function cellOf(widget, each, at) {
  const column = widget.columns.indexOf(each.lens.posOf(at));
  return column < 0 ? undefined : each.cells[each.lens.layerOf(at) * widget.columns.length + column];
}

function numberOf(widget, each, cell) {
  const row = each.at.get(cell?.parentElement);
  if (row === undefined || cell.tagName !== "TD") return undefined;
  return row * each.lens.width + widget.columns[cell.cellIndex - 1];
}

// The frame around the cell in focus.
function frame(widget, each, at) {
  const column = widget.columns.indexOf(each.lens.posOf(at));
  const cell = cellOf(widget, each, at);
  each.frame.hidden = !cell;
  if (!cell || !each.tops) return;
  const row = cell.parentElement;
  each.frame.classList.toggle("bw-pinned", widget.pinned);
  each.frame.style.width = `${widget.widths[column + 1]}px`;
  each.frame.style.height = `${each.height}px`;
  const top = each.tops.get(row);
  each.frame.style.transform = `translate(${widget.lefts[column]}px, ${top}px)`;
}

// What a way to show cells sets their text in, and texts' widths in it: asked once.
function type(widget) {
  const { state: { show, rows }, views: [{ table, heads }] } = widget;
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
      heads: parseFloat(getComputedStyle(heads[0]).fontSize),
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

// Widths that hold the words that are shown, the same in two tables side by side.
function fit(widget, shown) {
  const { state, views, columns } = widget;
  const { size, heads, gap, wide } = type(widget);
  const longest = 11 * Math.max(size, heads);
  const tile = state.show === "shade";
  const least = tile ? 15 : 2.6 * size;
  const widths = columns.map((pos, column) => {
    if (tile) return least;
    let most = 0;
    for (const { lens } of views) most = Math.max(most, wide(bare(lens.tokens[pos]), 600, heads));
    for (const [text, bold] of shown[column]) most = Math.max(most, wide(text, bold ? 700 : 400));
    return most + 14;
  }).map((width) => Math.round(Math.min(Math.max(width, least), longest)));
  const first = Math.round(wide("layer", 400, heads) + 12 + 15 * views.some(({ lens }) => lens.trust));
  widget.widths = [first, ...widths];
  widget.lefts = [];
  let left = 2 * gap + first;
  for (const width of widths) {
    widget.lefts.push(left);
    left += width + gap;
  }
  for (const { table, cols } of views) {
    widget.widths.forEach((width, at) => {
      const wanted = `${width}px`;
      if (cols[at].style.width !== wanted) cols[at].style.width = wanted;
    });
    table.style.width = `${left}px`;
  }
}

// Where rows are, once they are laid out.
function measure(widget) {
  const { gap } = type(widget);
  for (const each of widget.views) {
    each.gap = gap;
    each.tops = new Map([...each.body.rows].map((row) => [row, row.offsetTop]));
    each.height = each.rows[0].offsetHeight;
  }
}

// Scrolls a table, and nothing around it, to the current cell; a column is seen whole or not.
function bringIntoView(widget, { lens, table, scroll }) {
  const column = widget.columns.indexOf(lens.posOf(widget.current));
  if (column < 0) return;
  const { gap } = viewOf(widget, table);
  const ends = [0];
  for (const width of widget.widths.slice(1)) ends.push(ends.at(-1) + width + gap);
  const room = scroll.clientWidth - widget.widths[0] - 2 * gap;
  const left = ends[column] < scroll.scrollLeft;
  if (left || ends[column + 1] > scroll.scrollLeft + room) {
    const from = left ? ends[column] : ends.find((end) => end >= ends[column + 1] - room) ?? 0;
    const to = Math.min(from, ends[column]);
    const edge = `${Math.max(0, to + room - ends.at(-1))}px`;
    if (table.style.marginRight !== edge) table.style.marginRight = edge;
    scroll.scrollLeft = to;
  }
  const each = viewOf(widget, table);
  const top = each.tops.get(cellOf(widget, each, widget.current).parentElement);
  const head = each.tops.get(each.body.rows[0]) - gap;
  const seen = [scroll.scrollTop, scroll.clientHeight];
  if (top < seen[0] + head + gap) scroll.scrollTop = top - head - gap;
  else if (top + each.height > seen[0] + seen[1]) {
    scroll.scrollTop = top + each.height + gap - seen[1];
  }
}

const viewOf = (widget, table) => widget.views.find((each) => each.table === table);

// On paper nothing scrolls: tables as wide as the page, one below the other.
function printing(widget, on, room = 660) {
  if (on) fillAll(widget);
  for (const { scroll, table } of widget.views) {
    scroll.parentElement.querySelector(".bw-paper")?.remove();
    if (!on || table.offsetWidth <= room) continue;
    const blocks = [[]];
    let used = widget.widths[0] + 4;
    widget.widths.slice(1).forEach((width, column) => {
      if (blocks.at(-1).length && used + width + 2 > room) {
        blocks.push([]);
        used = widget.widths[0] + 4;
      }
      blocks.at(-1).push(column);
      used += width + 2;
    });
    const pages = blocks.map((block) => {
      const copy = table.cloneNode(true);
      const keep = new Set([0, ...block.map((column) => column + 1)]);
      for (const row of [copy.querySelector("colgroup"), ...copy.rows]) {
        [...row.children].forEach((cell, at) => keep.has(at) || cell.remove());
      }
      copy.removeAttribute("aria-labelledby");
      const all = block.reduce((sum, column) => sum + widget.widths[column + 1] + 2, 0);
      copy.style.width = `${widget.widths[0] + 4 + all}px`;
      return copy;
    });
    const paper = make("div", "bw-paper", ...pages);
    paper.setAttribute("aria-hidden", "true");
    scroll.after(paper);
  }
}
