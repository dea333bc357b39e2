"""Every pair of attention's features in Triton, dropout and the block mask among them, against the
float64 oracle; run by test_attention_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1), in tiles of 32 x 16.
"""

import attention_axes as axes
import pytest
import torch
from attention_checks import check_oracle

import genai_perf as gp
from genai_perf.ops.attention.cases import make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As few queries and keys as make several tiles: the interpreter is slow.
SMALL = {
    "lengths": ((2, 3), (1, 35), (33, 33), (34, 20), (0, 5)),
    "heads": ((1, 1), (2, 2), (3, 1)),
    "dims": ((8, 8), (40, 59), (80, 24)),
    "block_size": ((32, 16), (64, 32), (50, 7)),
}
CHOICES = axes.pairwise(axes=axes.AXES | SMALL)


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_pairs(number):
    case = axes.case_of(CHOICES[number], f"pairs {number}")
    others = (make_inputs(case, DEVICE, seed) for seed in range(1, 100))
    check_oracle(make_inputs(case, DEVICE), others, backend="triton")


STATE = torch.tensor([-(2**62) - 12345, 2**40 + 7], device=DEVICE)


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_drops_what_the_reference_drops(p):
    """The dropped softmax itself: every query sees every key alike, and v is the identity."""
    q, k = (torch.zeros(2, n, 3, 16, device=DEVICE) for n in (37, 50))
    v = torch.eye(50, device=DEVICE)[None, :, None].expand(2, -1, 3, -1)
    masks, dvs = [], []
    for backend in ("triton", "reference"):
        leaf = v.clone().requires_grad_()
        out = gp.attention(q, k, leaf, dropout_p=p, rng_state=STATE, backend=backend)
        masks.append(out == 0)
        # dv of key j in column i is the probability of query i and key j.
        one_hot = torch.eye(37, 50, device=DEVICE)[None, :, None].expand_as(out)
        (dv,) = torch.autograd.grad(out, leaf, one_hot)
        dvs.append(dv[..., :37] == 0)
    assert torch.equal(*masks) and 0 < masks[0].float().mean() < 1
    assert torch.equal(*dvs) and torch.equal(dvs[0].transpose(1, 3), masks[0])


@pytest.mark.parametrize("size", [(32, 16), (96, 64), (10, 7)])
def test_a_hidden_block_is_not_read(size):
    """NaN in keys that no query may see, in whole tiles that are skipped and in parts of tiles."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 100, 1, 16, generator=generator).to(DEVICE) for _ in range(3))
    counts = [-(-100 // n) for n in size]
    mask = torch.ones(1, 1, *counts, dtype=torch.bool, device=DEVICE)
    mask[..., 0] = False
    if size[0] % 32 == 0:  # whole tiles
        k[:, : size[1]] = v[:, : size[1]] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = gp.attention(*leaves, block_mask=mask, block_size=size, backend="triton")
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert torch.isfinite(out).all() and torch.isfinite(dq).all()
    assert (dk[:, : size[1]] == 0).all() and (dv[:, : size[1]] == 0).all()


def test_tiles_fit_into_blocks():
    from genai_perf.ops.attention.triton import configs

    config = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    assert configs.within(config, 128, 128) == config
    assert configs.within(config, 192, 32) == config | {"BLOCK_M": 64, "BLOCK_N": 32}
