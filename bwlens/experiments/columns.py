"""Tables of what was measured, out of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.experiments.base import Reading
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import Site

if TYPE_CHECKING:
    import pandas as pd


def frame(columns: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows out of columns, piece by piece; single values are repeated."""
    import numpy as np
    import pandas as pd

    pieces = list(columns)
    if not pieces:
        return pd.DataFrame()
    held: dict[str, Any] = {}
    sizes = [max(np.size(value) for value in piece.values()) for piece in pieces]
    for name in pieces[0]:
        values = [
            np.broadcast_to(np.asarray(piece[name]).reshape(-1), (size,))
            for piece, size in zip(pieces, sizes, strict=True)
        ]
        held[name] = np.concatenate(values)
    return pd.DataFrame(held)


def segment_columns(
    reading: Reading, site: Site, values: Float[Tensor, "n k"], names: Sequence[str]
) -> dict[str, Any]:
    """Columns of a site's values averaged over each segment of each prompt, where it has tokens."""
    import numpy as np

    gradient = reading.grads[site]
    assert gradient.prompt is not None
    means, _ = reading.by_segment(gradient, values)
    group = gradient.prompt * len(SEGMENTS) + reading.segment_of(gradient)
    tokens = torch.bincount(group, minlength=len(reading.edits) * len(SEGMENTS))
    tokens = tokens.unflatten(0, (-1, len(SEGMENTS)))
    prompt, segment = tokens.nonzero(as_tuple=True)
    held = means[prompt, segment].cpu().numpy()
    return {
        "item": prompt.cpu().numpy(),
        "matrix": site.matrix,
        "layer": site.layer,
        "expert": site.expert_number,
        "segment": np.array(SEGMENTS)[segment.cpu().numpy()],
        "tokens": tokens[prompt, segment].cpu().numpy(),
        **{name: held[:, at] for at, name in enumerate(names)},
    }
