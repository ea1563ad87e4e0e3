// The lens table, fifth part: words to follow, the overview of a long prompt.

// A word as it is typed: with its leading blank it is that token alone, without it either.
function sameWord({ word }, token) {
  return word[0] === " " ? token === word : bare(token) === word;
}

const isFollowed = (widget, token) => Boolean(widget.word) && sameWord(widget, token);

function follow(widget, word) {
  widget.word = word === widget.word ? "" : word;
  if (widget.input) widget.input.value = widget.word;
  paint(widget);
  look(widget, widget.current);
}

function following(widget) {
  const input = make("input");
  input.type = "search";
  input.placeholder = "a word";
  input.size = 9;
  input.setAttribute("aria-label", "Follow a word: mark every cell that promotes or suppresses it");
  input.addEventListener("input", () => {
    widget.word = input.value;
    paint(widget);
    look(widget, widget.current);
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
