// The interactive lens table: takes over the plain tables that show/table.py wrote.
//
// Every output of a notebook carries this script. The first copy defines `mount`, every copy
// mounts the tables that are still plain, so that any number of copies does no harm. Words come
// from models and are set as text, never as markup.
(() => {
  "use strict";
  const NAME = "bwlensTableFORMAT";
  const PLAIN = '.bwlens[data-format="FORMAT"]:not([data-live])';
  window[NAME] ??= define();
  const mountAll = () => document.querySelectorAll(PLAIN).forEach(window[NAME]);
  mountAll();
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);

  function define() {
    const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
    const MINUS = "\u2212";
    let mounted = 0;

    function mount(root) {
      root.dataset.live = "";
      try {
        widget(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
      } catch (error) {
        console.warn("bwlens: the plain table stays as it is:", error);
      }
    }

    // ---- Small helpers -------------------------------------------------------------------

    function make(tag, className, ...children) {
      const element = document.createElement(tag);
      if (className) element.className = className;
      element.append(...children);
      return element;
    }

    // A dollar or backslash in an element of its own begins no formula for a page's typesetter.
    function say(element, text) {
      if (!/[$\\]/.test(text)) {
        // Most cells of the plain table say the right thing already.
        if (element.firstChild?.data !== text || element.childNodes.length > 1) element.textContent = text;
      }
      else element.replaceChildren(...text.split(/([$\\])/).map((s) => make("span", "", s)));
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

    function short(value) {
      const size = Math.abs(value);
      if (size === 0) return "0";
      if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e+", "e");
      return size >= 1000 ? value.toFixed(0) : value.toPrecision(3);
    }
    const signed = (value) => value.toFixed(Math.abs(value) < 1000 ? 2 : 0).replace("-", MINUS);
    const whole = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

    // ---- The data of one lens -------------------------------------------------------------

    function decode(lens) {
      // Each word begins with as many letters of the one before as its line's first digit says.
      let word = "";
      const next = (line) => (word = word.slice(0, parseInt(line[0], 16)) + line.slice(1));
      const words = ["", ...lens.words.split("\n").map(next)];
      const arrays = [];
      const array = (at) => (arrays[at] ??= numbers(lens.blobs[at]));
      const { k, matrices } = lens;
      const width = lens.tokens.length;
      const reading = (state) => matrices[state.matrix].readings[state.reading];
      return {
        ...lens,
        width,
        size: width * lens.layers.length,
        through: (state) => matrices[state.matrix].through,
        delta: (state) => array(matrices[state.matrix].delta),
        x: (state) => array(matrices[state.matrix].x),
        faint: (state) => array(reading(state).faint),
        has: (state, who) => who in reading(state),
        // Ranks are stored from 1; -1 is none.
        rank: (state, who, cell) => array(reading(state)[who])[cell] - 1,
        best: (state, end, cell) => array(reading(state)[end].ids)[cell * k],
        word: (index) => words[index],
        list(state, end, cell) {
          const { ids, scores, low, high } = reading(state)[end];
          const found = [];
          for (let at = cell * k; at < cell * k + k && array(ids)[at]; at++) {
            const score = low + (array(scores)[at] * (high - low)) / 65535;
            found.push({ index: array(ids)[at], score });
          }
          return found;
        },
      };
    }

    function numbers(blob) {
      const held = Uint8Array.fromBase64?.(blob.slice(3)) ?? bytesOf(atob(blob.slice(3)));
      return new ARRAYS[blob.slice(0, 2)](held.buffer);
    }

    function bytesOf(text) {
      const bytes = new Uint8Array(text.length);
      for (let at = 0; at < bytes.length; at++) bytes[at] = text.charCodeAt(at);
      return bytes;
    }

    // ---- The widget -----------------------------------------------------------------------

    function widget(root, data) {
      const id = `${NAME}-${++mounted}`;
      const lenses = data.lenses.map(decode);
      const [lens] = lenses;
      const names = Object.keys(lens.matrices);
      const state = {
        matrix: names.includes("W_out") ? "W_out" : names[0],
        end: "promoted",
        reading: Object.keys(lens.matrices[names[0]].readings)[0],
        show: "words",
        scale: "linear",
        top: "last",
      };
      const who = "target" in lens.matrices[names[0]].readings[state.reading] ? "target" : "answer";
      const views = [...root.querySelectorAll(".bw-part")].map((part, at) => view(part, lenses[at]));
      const hint = make("p", "bw-hint", "Arrow keys move, a click or Enter pins, Escape lets go.");
      const panel = make("aside", "bw-panel", ...views.map((each) => each.detail.element), hint);
      panel.setAttribute("aria-label", "The cell in focus");
      const spoken = make("p", "bw-spoken");
      spoken.setAttribute("aria-live", "polite");
      const legend = make("div", "bw-legend");
      let current = -1;
      let pinned = false;
      let typed = -Infinity; // when the last key was pressed

      const stage = make("div", "bw-stage");
      views[0].part.before(stage);
      const parts = make("div", "bw-parts", ...views.map((each) => each.part));
      stage.append(make("div", "bw-left", parts, legend), panel);
      // A single lens has its heading above the switches, two have one above each table.
      if (views.length === 1) stage.before(views[0].part.querySelector(".bw-head"));
      stage.before(toolbar());
      stage.after(spoken);
      root.classList.toggle("bw-pair", views.length > 1);
      root.classList.toggle("bw-tall", lens.layers.length > 15);
      // JupyterLab: keys pressed in here are ours, not the notebook's.
      root.setAttribute("data-lm-suppress-shortcuts", "true");
      views.forEach(listen);
      paint();
      look(start());
      views.forEach(enter);
      requestAnimationFrame(() => views.forEach(bringIntoView));

      // -- Switches

      function toolbar() {
        const either = (...texts) => texts.map((text) => [text, text]);
        const groups = [
          ["matrix", "Matrix", either(...names)],
          ["end", "Words", either("promoted", "suppressed", "both")],
          ["reading", "Lens", either(...Object.keys(lens.matrices[names[0]].readings))],
          [
            "show",
            "Cells",
            [["words", "words"], ["rank", `${who} rank`], ["norm", "norm"], ["shade", "shade"]],
          ],
          ["scale", "Scale", either("linear", "log")],
          ["top", "On top", [["last", "last layer"], ["first", "first layer"]]],
        ];
        const bar = make("div", "bw-bar");
        for (const [key, title, options] of groups) {
          if (options.length < 2) continue;
          const group = make("fieldset", "", make("legend", "", title));
          for (const [value, text] of options) {
            const input = make("input");
            input.type = "radio";
            input.name = `${id}-${key}`;
            input.value = value;
            input.checked = state[key] === value;
            input.addEventListener("change", () => {
              state[key] = value;
              paint();
              look(current);
              views.forEach(bringIntoView);
            });
            group.append(make("label", "", input, make("span", "", text)));
          }
          bar.append(group);
        }
        return bar;
      }

      // -- Tables

      function view(part, lens) {
        const table = part.querySelector("table");
        const body = table.tBodies[0];
        const rows = [...body.rows].reverse(); // by layer; the plain table has the last on top
        const cells = rows.flatMap((row) => [...row.cells].slice(1));
        const heads = [...table.tHead.rows[0].cells].slice(1);
        const places = new Map(cells.map((cell, at) => [cell, at]));
        // What was written for viewers without styles gives way to the style sheet.
        for (const element of body.querySelectorAll("[style]")) element.removeAttribute("style");
        heads.forEach((head, pos) => {
          head.dataset.pos = pos;
          head.title = `position ${pos}: ${exact(lens.tokens[pos])}`;
          if (pos >= lens.given) head.classList.add("bw-forced");
        });
        table.className = "bw-grid";
        table.setAttribute("role", "grid");
        table.setAttribute("aria-readonly", "true");
        part.querySelector(".bw-note").remove();
        const caption = part.querySelector(".bw-caption");
        caption.id = `${id}-caption-${lenses.indexOf(lens)}`;
        table.setAttribute("aria-labelledby", caption.id);
        const scroll = make("div", "bw-scroll");
        table.before(scroll);
        scroll.append(table);
        return { part, lens, table, body, rows, cells, heads, places, caption, scroll, top: "last", detail: detail(lens) };
      }

      function paint() {
        const scale = shades();
        const seen = new Set();
        for (const { lens, table, body, rows, cells, caption } of views) {
          const delta = lens.delta(state);
          const faint = lens.faint(state);
          for (let at = 0; at < lens.size; at++) {
            const cell = cells[at];
            cell.removeAttribute("aria-label");
            if (!delta[at]) {
              seen.add("bw-nil");
              cell.className = "bw-nil";
              say(cell, state.show === "shade" ? "" : "\u00b7");
              cell.setAttribute("aria-label", "no gradient");
              continue;
            }
            const marks = [`s${Math.round(scale.share(lens, at) * (STEPS - 1))}`];
            const ends = state.end === "both" ? ["promoted", "suppressed"] : [state.end];
            const best = ends.map((end) => lens.best(state, end, at));
            if (lens.target && best.includes(lens.target)) marks.push("bw-hit");
            else if (best.includes(lens.answer)) marks.push("bw-own");
            if (faint[at]) marks.push("bw-faint");
            if (differs(at)) marks.push("bw-other");
            for (const mark of marks) seen.add(mark);
            cell.className = marks.join(" ");
            if (state.show === "rank") say(cell, whole(lens.rank(state, who, at)));
            else if (state.show === "norm") say(cell, short(delta[at]));
            else if (state.show === "shade") say(cell, "");
            else if (best.length === 1) say(cell, bare(lens.word(best[0])));
            else {
              const line = (word) => say(make(word === lens.target ? "b" : "div"), bare(lens.word(word)));
              cell.replaceChildren(...best.map(line));
            }
          }
          table.dataset.show = state.show;
          say(caption, sentence(lens));
          const up = [...rows];
          if (state.top === "last") up.reverse();
          if (body.rows[0] !== up[0]) body.append(...up);
        }
        drawLegend(scale, seen);
      }

      // How deep a cell is shaded, and what the ends of the scale are called.
      function shades() {
        if (state.show === "rank") {
          const places = Math.max(2, lens.vocab);
          const log = state.scale === "log";
          const far = log ? Math.log(places) : places - 1;
          const middle = log ? Math.sqrt(places) : places / 2;
          const end = state.end === "suppressed" ? "suppressed" : "promoted";
          return {
            share(lens, at) {
              const place = fromEnd(lens, lens.rank(state, who, at), end);
              return 1 - (log ? Math.log(1 + place) : place) / far;
            },
            title: `the ${who}'s place from the ${end} end`,
            ticks: [places, Math.round(middle), 1].map(whole),
          };
        }
        let high = 0;
        let low = Infinity;
        for (const each of views) {
          for (const norm of each.lens.delta(state)) {
            if (norm > high) high = norm;
            if (norm && norm < low) low = norm;
          }
        }
        const title = `norm of \u03b4, ${state.matrix}`;
        if (state.scale === "log" && low < high) {
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

      // A step subtracts: it promotes what is least probable in delta, but stamps x in as it is.
      function fromEnd(lens, rank, end) {
        const fromTop = (lens.through(state) === "x") === (end === "promoted");
        return fromTop ? rank : lens.vocab - 1 - rank;
      }

      function differs(at) {
        if (views.length < 2) return false;
        const [a, b] = lenses;
        const [norm, other] = [a.delta(state)[at], b.delta(state)[at]];
        if (!norm || !other) return Boolean(norm || other);
        if (state.show === "norm") return Math.abs(norm - other) > 0.05 * Math.max(norm, other);
        if (state.show === "rank") return a.rank(state, who, at) !== b.rank(state, who, at);
        const ends = state.end === "both" ? ["promoted", "suppressed"] : [state.end];
        return ends.some((e) => a.word(a.best(state, e, at)) !== b.word(b.best(state, e, at)));
      }

      function sentence(lens) {
        const { matrix, end, show } = state;
        const delta = lens.through(state) === "delta";
        const read = delta ? "\u03b4" : "x";
        if (show === "rank") {
          return `Rank of the ${who} among ${whole(lens.vocab)} words in the reading of ${read}: 0 is`
            + ` the most probable; a step on ${matrix} promotes the ${delta ? "least" : "most"} probable.`;
        }
        if (show === "norm") return `Norm of \u03b4, the gradient that comes back to ${matrix}.`;
        const verbs = { promoted: delta ? "promotes" : "stamps in", suppressed: "suppresses" };
        const poles = { promoted: delta ? "least" : "most", suppressed: delta ? "most" : "least" };
        if (end === "both") {
          return `The words that one gradient step on ${matrix} ${verbs.promoted} most (above) and`
            + ` ${verbs.suppressed} most (below).`;
        }
        if (!delta && end === "suppressed") {
          return `The word least like what one gradient step on ${matrix} stamps in: x's least probable.`;
        }
        return `The word that one gradient step on ${matrix} ${verbs[end]} most: ${read}'s`
          + ` ${poles[end]} probable.`;
      }

      function drawLegend(scale, seen) {
        const ramp = make("span", "bw-ramp");
        for (let step = 0; step < STEPS; step++) ramp.append(make("i", `s${step}`));
        const ticks = make("span", "bw-ticks", ...scale.ticks.map((tick) => make("span", "", tick)));
        const bar = make("div", "bw-scale", make("span", "bw-title", scale.title), ramp, ticks);
        const keys = make("div", "bw-keys");
        const key = (mark, ...text) =>
          seen.has(mark) && keys.append(make("span", "", make("i", `bw-key ${mark}`), ...text));
        const name = (index) => say(make("b"), bare(lens.word(index)));
        const same = (field) => lenses.every((each) => each.word(each[field]) === lens.word(lens[field]));
        key("bw-hit", "the target", ...(same("target") ? [" ", name(lens.target)] : []));
        key("bw-own", "the model\u2019s own answer", ...(same("answer") ? [" ", name(lens.answer)] : []));
        if (views.length > 1) {
          const count = views[0].cells.filter((_, at) => differs(at)).length;
          const what = { norm: "norms more than 5 % apart", rank: "other rank" }[state.show];
          seen.add("bw-other");
          key("bw-other", `${what ?? "other word"} (${count} of ${lens.size} cells)`);
        }
        key("bw-faint", "vector so short that the final norm\u2019s epsilon outweighs it");
        key("bw-nil", "no gradient");
        legend.replaceChildren(bar, keys);
      }

      // -- The panel

      function detail(lens) {
        const title = make("p", "bw-cell");
        const facts = make("dl", "bw-facts");
        const note = make("p", "bw-doubt");
        const head = make("tr", "", ...["", "promoted", "logit", "suppressed", "logit"].map((text) => {
          const cell = make("th", "", text);
          cell.scope = "col";
          return cell;
        }));
        const body = make("tbody");
        const rows = Array.from({ length: lens.k }, (_, place) => {
          const row = make("tr", "", make("td", "", String(place + 1)));
          for (let at = 0; at < 4; at++) row.append(make("td"));
          body.append(row);
          return row.cells;
        });
        const list = make("table", "bw-words", make("thead", "", head), body);
        const element = make("div", "bw-detail", make("div", "", title, facts), list, note);

        function fact(name, value, more = "") {
          facts.append(make("dt", "", name), make("dd", "", value, more && make("small", "", more)));
        }

        function fill(at) {
          const layer = lens.layers[Math.floor(at / lens.width)];
          const pos = at % lens.width;
          const token = sayExactly(make("b"), lens.tokens[pos]);
          const where = `layer ${layer} \u00b7 position ${pos}`;
          title.replaceChildren(token, make("span", "", where));
          if (pinned) title.append(make("em", "", "pinned"));
          facts.replaceChildren();
          const norm = lens.delta(state)[at];
          fact("norm of \u03b4", short(norm));
          fact("norm of x", short(lens.x(state)[at]));
          for (const [key, name] of [["target", "target rank"], ["answer", "answer rank"]]) {
            if (!lens.has(state, key)) continue;
            const rank = lens.rank(state, key, at);
            if (rank < 0) fact(name, "none");
            else fact(name, whole(rank), `promoted #${whole(1 + fromEnd(lens, rank, "promoted"))}`);
          }
          [["promoted", 1], ["suppressed", 3]].forEach(([end, column]) => {
            const found = norm ? lens.list(state, end, at) : [];
            rows.forEach((cells, place) => {
              const entry = found[place];
              const word = entry ? lens.word(entry.index) : "";
              sayExactly(cells[column], word).title = exact(word);
              cells[column].className = !entry ? ""
                : entry.index === lens.target ? "bw-hit"
                : entry.index === lens.answer ? "bw-own" : "";
              cells[column + 1].textContent = entry ? signed(entry.score) : "";
            });
          });
          note.textContent = doubt(lens, at, norm);
        }
        return { element, fill };
      }

      function doubt(lens, at, norm) {
        if (!norm) return "No gradient reaches this cell: a step writes nothing here.";
        const left = lens.faint(state)[at];
        if (!left) return "";
        const share = Math.round((100 * (left - 1)) / 254);
        const advice = Object.keys(lens.matrices[state.matrix].readings).length > 1
          ? "the normalised lens reads it at unit length" : "a normalised lens would not";
        return `A very short vector: the final norm\u2019s epsilon leaves ${share} % of its length, so`
          + ` these words may be the norm\u2019s bias; ${advice}.`;
      }

      // -- Looking at a cell

      // The cell to begin with: the strongest that promotes the target, else the strongest.
      function start() {
        const delta = lens.delta(state);
        const hit = (at) => lens.target && delta[at] && lens.best(state, "promoted", at) === lens.target;
        let best = 0;
        for (let at = 1; at < lens.size; at++) {
          if (hit(at) !== hit(best) ? hit(at) : delta[at] > delta[best]) best = at;
        }
        return best;
      }

      function look(at) {
        const marked = (cell, name, on) => cell.classList.toggle(name, on);
        for (const each of views) {
          for (const [cell, on] of [[current, false], [at, true]]) {
            if (cell < 0) continue;
            marked(each.cells[cell], "bw-at", on);
            marked(each.rows[Math.floor(cell / each.lens.width)].cells[0], "bw-here", on);
            marked(each.heads[cell % each.lens.width], "bw-here", on);
          }
          marked(each.table, "bw-pinned", pinned);
          each.detail.fill(at);
        }
        current = at;
      }

      // Makes the current cell the one that the Tab key finds.
      function enter(each) {
        each.cells[each.entry ?? current].removeAttribute("tabindex");
        each.entry = current;
        each.cells[current].tabIndex = 0;
      }

      // Scrolls a table, and nothing around it, to the current cell; headings cover its edges.
      function bringIntoView({ table, scroll, cells }) {
        const cell = cells[current].getBoundingClientRect();
        const corner = table.tHead.rows[0].cells[0].getBoundingClientRect();
        const box = scroll.getBoundingClientRect();
        const by = (low, high, first, last) =>
          low < first + 4 ? low - first - 4 : high > last - 4 ? high - last + 4 : 0;
        const [width, height] = [box.left + scroll.clientWidth, box.top + scroll.clientHeight];
        scroll.scrollLeft += by(cell.left, cell.right, box.left + corner.width, width);
        scroll.scrollTop += by(cell.top, cell.bottom, box.top + corner.height, height);
      }

      function listen(each) {
        const { table, scroll, places, cells, lens } = each;
        const under = (event) => places.get(event.target.closest?.("td"));
        table.addEventListener("pointerover", (event) => {
          const at = under(event);
          // Keys scroll cells under a mouse that only rests there.
          const resting = event.timeStamp - typed < 500;
          if (at !== undefined && !pinned && !resting && event.pointerType !== "touch") look(at);
        });
        table.addEventListener("click", (event) => {
          const at = under(event);
          if (at === undefined) return;
          pinned = !(pinned && at === current);
          look(at);
          enter(each);
          cells[at].focus({ preventScroll: true });
        });
        table.addEventListener("focusin", (event) => {
          const at = under(event);
          if (at !== undefined && at !== current) look(at);
        });
        table.addEventListener("keydown", (event) => {
          const last = lens.layers.length - 1;
          const up = state.top === "last" ? 1 : -1;
          let layer = Math.floor(current / lens.width);
          let pos = current % lens.width;
          switch (event.key) {
            case "ArrowLeft": pos -= 1; break;
            case "ArrowRight": pos += 1; break;
            case "ArrowUp": layer += up; break;
            case "ArrowDown": layer -= up; break;
            case "PageUp": layer += 10 * up; break;
            case "PageDown": layer -= 10 * up; break;
            case "Home": pos = 0; if (event.ctrlKey) layer = up > 0 ? last : 0; break;
            case "End": pos = lens.width - 1; if (event.ctrlKey) layer = up > 0 ? 0 : last; break;
            case "Enter": case " ": pinned = !pinned; break;
            case "Escape": pinned = false; break;
            default: return;
          }
          event.preventDefault();
          event.stopPropagation();
          typed = event.timeStamp;
          const clip = (value, most) => Math.min(Math.max(value, 0), most);
          look(clip(layer, last) * lens.width + clip(pos, lens.width - 1));
          bringIntoView(each);
          enter(each);
          cells[current].focus();
          const ends = lens.delta(state)[current]
            ? `promotes ${lens.word(lens.best(state, "promoted", current))},`
              + ` suppresses ${lens.word(lens.best(state, "suppressed", current))}`
            : "no gradient";
          spoken.textContent = `norm ${short(lens.delta(state)[current])}, ${ends}`;
        });
        // Two tables side by side scroll as one.
        scroll.addEventListener("scroll", () => {
          for (const other of views) {
            if (other === each) continue;
            other.scroll.scrollTo(scroll.scrollLeft, scroll.scrollTop);
          }
        });
      }
    }

    return mount;
  }
})();
