"""A data set's page: which words training on it would write, searchable by word and layer."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (pandas leaves some of its functions untyped.)

from __future__ import annotations

import json
from html import escape
from typing import Any

from bwlens.show.sheet import document, grid
from bwlens.show.words import exact

_MOST = 2000  # Examples on a page; the folder has all.
_STYLE = """
input,select{font:inherit;padding:.2rem .4rem}
.hit{font-weight:600;color:light-dark(#c9400a,#ffa94d)}
#rows td{vertical-align:top}td.text{max-width:24rem;overflow-wrap:anywhere}
#words button{font:inherit;border:1px solid light-dark(#c6d0dc,#3b4653);border-radius:4px;
background:none;color:inherit;cursor:pointer;margin:.1rem;padding:.05rem .4rem}
"""
_SCRIPT = """
<script type="application/json" id="data">DATA</script><script>(()=>{
const d=JSON.parse(document.getElementById('data').textContent),$=i=>document.getElementById(i),
rows=$('rows').tBodies[0],cell=(t,n)=>{const c=document.createElement('td');c.textContent=t;
if(n)c.className=n;return c};const draw=()=>{const at=$('layer').value,
word=$('word').value.trim().toLowerCase();
const out=[];for(const w of d.writes){if(at!==''&&w[1]!=at)continue;
const words=w[4].map(i=>d.words[i]);if(word&&!words.some(x=>x.trim().toLowerCase()===word)&&
!d.texts[w[0]].toLowerCase().includes(word))continue;out.push(w)}out.sort((a,b)=>b[3]-a[3]);
rows.replaceChildren(...out.slice(0,200).map(w=>{const r=document.createElement('tr'),
p=document.createElement('td');r.append(cell(w[0],'number'),cell(d.texts[w[0]],'text'),
cell(w[1],'number'),cell(d.words[w[2]]),cell(w[3].toPrecision(3),'number'),p);
w[4].forEach((i,k)=>{const s=document.createElement('span'),t=d.words[i];s.textContent=t;
if(word&&t.trim().toLowerCase()===word)s.className='hit';p.append(k?', ':'',s)});return r}));
$('count').textContent=out.length+' rows'+(out.length>200?', the first 200 shown':'')};
$('word').addEventListener('input',draw);$('layer').addEventListener('change',draw);
for(const b of document.querySelectorAll('#words button'))b.addEventListener('click',()=>{
$('word').value=b.textContent.replace('␣','');draw()});draw()})()</script>
"""


def page(lens: Any) -> str:
    """One page: the words that most examples promote, and every row that promotes a word.

    `lens` is a `DatasetLens`. Where scripts are stripped, the words and examples remain.
    """
    examples, writes = lens.examples().head(_MOST), lens.writes()
    at = {int(item): i for i, item in enumerate(examples["item"])}
    writes = writes[writes["item"].isin(list(at))]
    number: dict[str, int] = {}

    def known(word: str) -> int:
        return number.setdefault(word, len(number))

    rows = [
        [int(i), int(layer), known(exact(str(token))), float(f"{size:.3g}"), [*map(known, words)]]
        for i, layer, token, size, words in zip(
            writes["item"], writes["layer"], writes["token"], writes["size"],
            ([exact(str(w)) for w in promoted] for promoted in writes["promoted"]), strict=True,
        )
    ]  # fmt: skip
    data = {
        "words": [w.replace("␣", " ") for w in number],
        "texts": {int(i): t for i, t in zip(examples["item"], examples["text"], strict=True)},
        "writes": rows,
    }
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    top = "".join(
        f'<button title="in {count} examples">{escape(exact(word))}</button>'
        for word, count in lens.words(40).itertuples(index=False)
    )
    layers = "".join(f"<option>{layer}</option>" for layer in sorted(set(writes["layer"])))
    failed = "".join(f"<li>example {f.item}: {escape(f.message)}</li>" for f in lens.failures[:50])
    left = f"<h2>Not read</h2><ul>{failed}</ul>" if failed else ""
    more = f" (the first {_MOST} of them here)" if len(examples) == _MOST else ""
    plain = [
        f'<tr><td class="number">{row.item}</td><td class="text">{escape(row.text)}</td>'
        f'<td class="number">{row.loss:.3g}</td><td class="number">{row.norm:.3g}</td></tr>'
        for row in examples.sort_values("norm", ascending=False).head(20).itertuples()
    ]
    heads = ("example", "text", "layer", "token", "size", "promotes")
    return document(
        "What training on a data set would write",
        f"<h1>What training on {len(examples)} examples{more} would write into"
        f" {escape(lens.model)}</h1><p>{lens.matrix} of each layer at each example's strongest"
        " token, as a descent step writes it. Size: the norm of that token's part of the"
        " gradient.</p>"
        f'<h2>Words that most examples promote</h2><p id="words">{top}</p>'
        '<h2>Find</h2><p><label>a word <input id="word" type="search"></label> <label>in layer'
        f' <select id="layer"><option value="">any</option>{layers}</select></label> <span'
        f' id="count"></span></p>{grid(heads, (), name="rows")}<h2>Largest gradients</h2>'
        f"{grid(('example', 'text', 'loss', 'norm'), plain, numbers=(0, 2, 3))}{left}"
        f"{_SCRIPT.replace('DATA', packed)}",
        _STYLE,
    )
