"""Numbers of fewer bits, in half precision all the same: in a wheel, a zip, they are smaller.

Steps are powers of two, so that the bits below them are zero, and zero bits cost a zip next to
nothing. Files stay what they are, and whatever reads them need not know.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def power_of_two(at_least: Tensor) -> Tensor:
    """The next powers of two."""
    return torch.exp2(torch.ceil(torch.log2(at_least)))


def rounded(weight: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """A weight in half precision, with `bits` bits, sign included, and a step for each row."""
    largest = weight.double().abs().amax(1, keepdim=True)
    step = power_of_two(largest.clamp_min(1e-12) / (2 ** (bits - 1) - 1))
    return ((weight.double() / step).round() * step).half()


def rounded_inverse_factor(inverse: Float[Tensor, "d d"], fineness: int) -> Float[Tensor, "d d"]:
    """The inverse Cholesky factor L of a second moment C, L C L^T = 1, in steps of L_jj / fineness.

    Keys lie where C is large and L takes differences of large numbers; rounding each entry for
    itself loses them. So what an entry loses is made up for in the entries of its row that are not
    rounded yet, as far as keys have the one by the others (the columns are rounded from the last,
    since L's leading block is that of C's).

    Source: Frantar et al., GPTQ (ICLR 2023), with C for the inputs.
    """
    left, kept = inverse.clone(), torch.zeros_like(inverse)
    step = power_of_two(inverse.diagonal() / fineness / 2**0.5)
    for j in reversed(range(len(inverse))):
        kept[:, j] = (left[:, j] / step[j]).round() * step[j]
        lost = (left[:, j] - kept[:, j]) / inverse[j, j]
        left[:, :j] -= lost[:, None] * inverse[j, :j]
    return kept
