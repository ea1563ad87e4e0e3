"""The lens of one prompt: its readings, words, norms and ranks against a slow loop of the lens."""

import html
import json
import re

import pandas as pd
import pytest
import torch

import bwlens
from bwlens.data.records import Record
from bwlens.lens.backward import READ_THROUGH
from bwlens.show import circuits
from bwlens.show.table import page
from bwlens.show.words import visible
from tests import tiny
from tests.fake_lens import fake_lens

PROMPT = "t5 t9 t30 t41 t8"


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.bridge("llama", tokenizer)


@pytest.fixture(scope="module")
def lens(model):
    return bwlens.backward_lens(model, PROMPT, "t17", subject="t9 t30", prepend_bos=False)


def slow_scores(model, vector):
    """The logit lens of one vector, through the model's own modules."""
    with torch.no_grad():
        return model.unembed(model.ln_final(vector[None, None]))[0, 0]


def words_of(ids):
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    return [special[i] if i < len(special) else f"t{i}" for i in ids.tolist()]


@pytest.mark.parametrize("matrix", ["W_in", "W_gate", "W_out"])
def test_readings_are_the_logit_lens_of_each_vector(model, lens, matrix):
    target, answer = lens.target_ids[0], lens.readout(matrix).ranks.shape[-1] - 1
    for layer in range(tiny.LAYERS):
        rows = getattr(lens.gradients[matrix, layer], READ_THROUGH[matrix])
        for pos, vector in enumerate(rows):
            if not vector.any():
                assert lens.readout(matrix).zero[layer, pos]
                continue
            scores = slow_scores(model, vector)
            read = lens.readout(matrix)[layer, pos]
            order = scores.argsort(descending=True)
            assert read.top_ids.tolist() == order[:10].tolist()
            assert read.bottom_ids.tolist() == order.flip(0)[:10].tolist()
            assert int(read.ranks[0]) == int((scores > scores[target]).sum())
            assert answer == 1


def test_promoted_words_of_w_out_are_deltas_least_probable(lens):
    bottom = lens.readout("W_out").bottom_ids
    assert lens.words("promoted", "W_out")[0][0] == words_of(bottom[0, 0])
    top = lens.readout("W_in").top_ids
    assert lens.words("promoted", "W_in")[0][0] == words_of(top[0, 0])
    assert lens.words("suppressed", "W_in") != lens.words("promoted", "W_in")


def test_a_real_step_promotes_what_the_lens_says(tokenizer):
    """At the last layer the step's own effect on the logits is what the lens reads."""
    model = tiny.bridge("llama", tokenizer)
    lens = bwlens.backward_lens(model, PROMPT, "t17", prepend_bos=False)
    tokens = torch.tensor([lens.token_ids])
    with torch.no_grad():
        before = model(tokens)[0, -1]
        weight = model.blocks[-1].mlp.out.weight
        weight -= 0.5 * lens.gradient("W_out", -1).dense().T
        after = model(tokens)[0, -1]
    assert after.log_softmax(-1)[17] > before.log_softmax(-1)[17]
    assert lens.words("promoted")[-1][-1][0] == "t17"


def test_zero_deltas_have_no_words_and_no_rank(lens):
    assert all(cell == [] for cell in lens.words()[-1][:-1])
    assert lens.target_ranks()[-1, :-1].tolist() == [-1] * 4
    assert lens.words("promoted", "W_in")[-1][0] == []
    frame = lens.promoted(k=2)
    assert not ((frame.layer == tiny.LAYERS - 1) & (frame.pos < 4)).any()


def test_norms_are_raw_and_per_position(lens, model):
    normalized = bwlens.backward_lens(model, PROMPT, "t17", normalize=True, prepend_bos=False)
    for found in (lens, normalized):
        for of in ("x", "delta"):
            rows = torch.stack([getattr(found.gradients["W_out", k], of) for k in range(3)])
            torch.testing.assert_close(found.norms("W_out", of), rows.norm(dim=-1))
    assert normalized.normalized
    assert not lens.normalized


def test_what_the_model_says_itself(lens, model):
    with torch.no_grad():
        probabilities = model(torch.tensor([lens.token_ids]))[0, -1].softmax(-1)
    assert lens.answer == f"t{int(probabilities.argmax())}"
    assert lens.answer_probability == pytest.approx(float(probabilities.max()), rel=1e-5)
    assert lens.target_probability == pytest.approx(float(probabilities[17]), rel=1e-5)
    assert lens.loss == pytest.approx(-float(probabilities[17].log()), rel=1e-5)
    assert lens.answer_ranks("W_out").shape == (3, 5)


@pytest.mark.parametrize("bos", [True, False])
def test_with_and_without_bos(model, bos):
    lens = bwlens.backward_lens(model, PROMPT, "t17", subject="t9 t30", prepend_bos=bos)
    assert len(lens.tokens) == 5 + bos
    assert lens.subject == (1 + bos, 2 + bos)


def test_teacher_forced_targets_are_part_of_the_table(model):
    lens = bwlens.backward_lens(model, PROMPT, "t17 t20 t21", prepend_bos=False)
    assert lens.tokens[5:] == ("t17", "t20")
    assert lens.n_prompt == 5
    assert lens.readout("W_out").ranks.shape == (3, 7, 4)


def test_frames_and_files(lens, tmp_path):
    frame = lens.to_dataframe()
    assert len(frame) == 3 * 3 * 5
    assert set(frame.matrix) == {"W_in", "W_gate", "W_out"}
    row = frame[(frame.matrix == "W_out") & (frame.layer == 1) & (frame.pos == 2)].iloc[0]
    assert row.promoted == lens.words()[1][2]
    assert row.target_rank == int(lens.target_ranks()[1, 2])
    data = json.loads(lens.save(tmp_path / "lens.json").read_text())
    assert data["matrices"]["W_out"]["promoted"] == lens.words()
    assert data["loss"] == lens.loss
    assert len(pd.read_csv(lens.save(tmp_path / "lens.csv"))) == len(frame)
    assert "t17" in lens.save(tmp_path / "lens.html").read_text()
    for ending in ("pdf", "svg", "png"):
        assert lens.save(tmp_path / f"lens.{ending}").stat().st_size > 3000
    with pytest.raises(ValueError, match=r"\.json or \.csv"):
        lens.save(tmp_path / "lens.doc")


def test_text_shows_layers_tokens_and_words(lens):
    lines = repr(lens).splitlines()
    assert any(line.split()[:1] == ["layer"] and "t41" in line for line in lines)
    lines = [re.sub("[▁▂▃▄▅▆▇█]", "", line) for line in lines]  # the norms
    rows = [line.split() for line in lines if line.split()[:1] in (["0"], ["1"], ["2"])]
    assert [row[0] for row in rows] == ["2", "1", "0"]  # last layer on top
    assert rows[0][1:] == ["·", "·", "·", "·", "*t17", "#1"]
    assert [word.lstrip("*") for word in rows[2][1::2]] == [cell[0] for cell in lens.words()[0]]
    # The place from the promoted end: delta's least probable is the first.
    places = [f"#{tiny.VOCAB - rank}" for rank in lens.target_ranks()[0].tolist()]
    assert rows[2][2::2] == places


def test_places_count_from_the_promoted_end(lens):
    assert lens.target_places("W_out")[-1].tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(lens.target_places("W_in")[0], lens.target_ranks("W_in")[0] + 1)
    for matrix in ("W_in", "W_out"):
        for layer, pos in ((0, 4), (1, 2)):
            word = lens.words("promoted", matrix)[layer][pos][0]
            assert (lens.target_places(matrix)[layer, pos] == 1) == (word == "t17")


def test_text_marks_what_is_doubtful_and_says_what_marks_mean():
    lens = fake_lens(n_layers=30, n_pos=6)
    lines = repr(lens).splitlines()
    assert max(map(len, lines)) <= 80
    words, doubtful = lens.words(), lens.readout().eps_regime
    assert doubtful.any()
    lines = [re.sub("[▁▂▃▄▅▆▇█]", "", line) for line in lines]
    cells = [line.split()[1::2] for line in lines if line.split()[:1] == ["0"]]
    marked = [word.startswith("~") for row in cells for word in row]
    assert marked == doubtful[0].tolist()
    assert [word.lstrip("~*") for row in cells for word in row] == [
        visible(cell[0]) for cell in words[0]
    ]
    legend = repr(lens)[repr(lens).index("Bars:") :]
    for mark in ("· no gradient", "#n place of the target", "~ vector so short"):
        assert mark in legend
    plain = repr(fake_lens(target=None, both=True).as_reading("normalised"))
    assert "#n" not in plain
    assert "~" not in plain


def test_ranks_and_words_are_short():
    lens = fake_lens([f" word{i}of{10**i % 97}many letters" for i in range(12000)], 2, 3)
    assert max(map(len, repr(lens).splitlines())) <= 80
    assert re.search(r"#\d\.\dk|#1[01]k", repr(lens))
    assert "…" in repr(lens)


def test_headings_show_the_blank_and_the_tokens_of_a_target(model, tmp_path):
    one = fake_lens()
    several = bwlens.backward_lens(model, PROMPT, "t17 t20 t21", prepend_bos=False)
    summed = bwlens.backward_lens(
        model, PROMPT, bwlens.NLL("t17 t20 t21", reduction="sum"), prepend_bos=False
    )
    assert repr(one).splitlines()[0].endswith('→ " w7"')
    assert repr(several).splitlines()[0].endswith('→ "t17" "t20" "t21"')
    pages = [html.unescape(found) for found in (several._repr_html_(), page(several))]
    several.report(tmp_path / "report.html")
    pages.append(html.unescape((tmp_path / "report.html").read_text()))
    for text in (*pages, " ".join(repr(several).split())):
        assert '→ "t17" "t20" "t21"' in re.sub("<[^>]*>", "", text)
        assert 'the target\'s first token "t17" has p = ' in text
        assert "mean loss of the target's 3 tokens " in text
    assert "summed loss of the target's 3 tokens" in repr(summed)
    assert summed.loss == pytest.approx(3 * several.loss, rel=1e-5)
    assert "the target has p = " in page(one)
    assert '→ " w7"' in re.sub("<[^>]*>", "", html.unescape(page(one)))
    data = several.to_dict()
    assert data["target_tokens"] == ["t17", "t20", "t21"]
    assert data["loss_is"] == "mean loss of the target's 3 tokens"
    title = one.figure("table").axes[0].get_title(loc="right")
    assert title == '\u200e→ " w7"'  # the mark keeps the line's direction
    assert one.figure("target_ranks").axes[0].get_ylabel() == 'rank of " w7", W_out'


def test_a_narrow_terminal_puts_columns_below_one_another(lens):
    from bwlens.show.terminal import plain_text

    wide, narrow = plain_text(lens, 120), plain_text(lens, 30)
    assert narrow.count("layer") > wide.count("layer")
    assert max(map(len, narrow.splitlines())) <= 30


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_attention_and_experts_read_too(name, tokenizer):
    model = tiny.bridge(name, tokenizer)
    lens = bwlens.backward_lens(
        model, PROMPT, "t17", matrices=["W_out", "W_O", "W_Q"], prepend_bos=False
    )
    assert lens.norms("W_O").shape == lens.norms("W_out").shape == (3, 5)
    # In a mixture, a token's deltas of all its experts add up to one.
    tokens = torch.tensor([lens.token_ids])
    found = bwlens.vjps(model, tokens, bwlens.NLL([17]), "blocks.1.hook_mlp_out")
    total = found["blocks.1.hook_mlp_out"][0].norm(dim=-1)
    torch.testing.assert_close(lens.norms("W_out")[1], total, rtol=1e-4, atol=1e-6)


def test_an_objective_without_target(model):
    def surprise(logits, batch):
        return logits[:, -1].logsumexp(-1)

    lens = bwlens.backward_lens(model, PROMPT, surprise, prepend_bos=False)
    assert lens.target == ""
    assert lens.settings["objective"] == "surprise"
    with pytest.raises(ValueError, match="no target"):
        lens.target_ranks()
    assert lens.to_dataframe().target_rank.isna().all()
    assert "→" not in repr(lens).splitlines()[0]


def test_a_prompt_in_every_form(model):
    ids = model.to_tokens(PROMPT, prepend_bos=False)
    expected = bwlens.backward_lens(model, PROMPT, "t17", prepend_bos=False)
    for prompt in (ids, ids[0], ids[0].tolist(), tuple(ids[0].tolist()), ids[0].numpy()):
        found = bwlens.backward_lens(model, prompt, 17)
        assert found.token_ids == expected.token_ids
        assert found.words() == expected.words()
    edit = bwlens.Edit("t5 {} t41 t8", subject="t9 t30", target_new="t17")
    for given in (edit, Record(0, edit)):
        found = bwlens.backward_lens(model, given, prepend_bos=False)
        assert (found.subject, found.words()) == ((1, 2), expected.words())
    other = bwlens.backward_lens(model, edit, "t20", subject="t41", prepend_bos=False)
    assert (other.target, other.subject) == ("t20", (3,))


def test_an_edits_subject_stands_where_its_template_has_it(model):
    edit = bwlens.Edit("{} t5 t9 t30", subject="t9", target_new="t17")
    assert bwlens.backward_lens(model, edit, prepend_bos=False).subject == (0,)


def test_matrices_and_layers_in_every_form(model):
    lens = bwlens.backward_lens(model, PROMPT, "t17", matrices="W_out", layers=1, prepend_bos=False)
    assert (lens.matrices, lens.layers) == (("W_out",), (1,))
    lens = bwlens.backward_lens(model, PROMPT, "t17", layers=(k for k in (0, -1)))
    assert lens.layers == (0, 2)


def test_words_of_some_layers_and_positions(model):
    lens = bwlens.backward_lens(
        model, PROMPT, "t17", subject="t9 t30", layers=[0, 1], prepend_bos=False
    )
    every = lens.promoted(k=2)

    def shown(**some):
        rows = lens.promoted(k=2, **some)
        kept = every[every.layer.isin(rows.layer) & every.pos.isin(rows.pos)]
        assert rows.equals(kept.reset_index(drop=True))
        return sorted(set(rows.layer)), sorted(set(rows.pos))

    pos = sorted(set(every.pos))
    assert shown(layers=-2) == shown(layers=[1]) == shown(layers=slice(1, None)) == ([1], pos)
    assert shown(layers=-2, positions="last") == ([1], [4])
    assert shown(positions="subject") == shown(positions=slice(1, 3)) == ([0, 1], [1, 2])
    assert shown(layers=[0, -2], positions=[-1, 0]) == ([0, 1], [0, 4])
    for bad in (2, -1, slice(2, None), [], [0, 3]):
        with pytest.raises(ValueError, match="this lens has read 0, 1"):
            lens.suppressed(layers=bad)
    with pytest.raises(ValueError, match="the prompt has the positions 0 to 4"):
        lens.suppressed(positions=5)
    assert lens.gradients["W_out", -2] is lens.gradient("W_out", 1)
    assert ("W_out", -1) not in lens.gradients
    with pytest.raises(KeyError, match=r"W_out of layer 2 was not captured.*layers \[0, 1\]"):
        lens.gradients["W_out", -1]


def test_negative_layers_count_from_the_models_end(model):
    lens = bwlens.backward_lens(model, PROMPT, "t17", layers=[0, 1], prepend_bos=False)
    assert lens.gradient("W_out", -2) is lens.gradients["W_out", 1]
    assert lens.gradient("W_out", -3) is lens.gradients["W_out", 0]
    assert lens.gradient("W_out") is lens.gradients["W_out", 1]  # the last one read
    with pytest.raises(ValueError, match=r"layer -1 was not read; this lens has read 0, 1"):
        lens.gradient("W_out", -1)
    with pytest.raises(ValueError, match="the model has 3 layers"):
        lens.gradient("W_in", 99)
    with pytest.raises(ValueError, match="the model has 3 layers"):
        lens.gradient("W_in", -4)
    calls = [circuits.top_words(lens, *cell).calls for cell in ((-2, -1), (1, 4))]
    named = [re.sub(r"circuits-vis-[0-9a-f-]*", "", call) for call in calls]
    assert named[0] == named[1]


@pytest.mark.parametrize("write", ["save", "report"])
def test_a_path_is_checked_before_the_work(lens, write, tmp_path, monkeypatch):
    for kind in ("show.table.page", "show.report.document", "show.figures.table"):
        monkeypatch.setattr(f"bwlens.{kind}", lambda *a, **k: pytest.fail("the work was begun"))
    for path in ("nowhere/lens.html", "nowhere/lens.png"):
        with pytest.raises(ValueError, match=r"there is no folder|ends in \.html"):
            getattr(lens, write)(tmp_path / path)
    with pytest.raises(ValueError, match=r"ends in"):
        getattr(lens, write)(tmp_path / "lens.xls")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        getattr(lens, write)(str(tmp_path / "folder.html"))


@pytest.mark.usefixtures("unchecked")
def test_bad_input(model, lens):
    edit = bwlens.Edit("t5 {} t41 t8", subject="t9 t30", target_new="t17")
    for several in ([PROMPT, PROMPT], [edit, edit], torch.ones(2, 3).long(), [], 3.0, None):
        with pytest.raises(ValueError, match="expected one prompt"):
            bwlens.backward_lens(model, several, "t17")
    with pytest.raises(ValueError, match="no target"):
        bwlens.backward_lens(model, PROMPT)
    for top_k in (None, 0, -1, "5", 2.0, True):
        with pytest.raises(ValueError, match=r"top_k is .*; expected a whole number from 1"):
            bwlens.backward_lens(model, PROMPT, "t17", top_k=top_k)
    for k in (0, None, "3"):
        with pytest.raises(ValueError, match=r"k is .*; expected a whole number from 1"):
            lens.promoted(k=k)
    with pytest.raises(ValueError, match="of must be 'x' or 'delta', found 'y'"):
        lens.norms(of="y")
    with pytest.raises(ValueError, match="'last' is no whole number"):
        lens.gradient("W_out", "last")
    with pytest.raises(ValueError, match="normalize must be"):
        bwlens.backward_lens(model, PROMPT, "t17", normalize="none")
    with pytest.raises(ValueError, match="does not occur"):
        bwlens.backward_lens(model, PROMPT, "t17", subject="t50")
    with pytest.raises(ValueError, match="keeps 10 words"):
        lens.promoted(k=11)
    with pytest.raises(ValueError, match="was not read"):
        lens.readout("W_Q")
    with pytest.raises(ValueError, match="'promoted' or 'suppressed'"):
        lens.words("best")
