"""genai_perf.flash_attn in the place of flash_attn, and its bert_padding."""

import subprocess
import sys

import pytest
import torch

from genai_perf.flash_attn import bert_padding


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_install_swaps_every_spelling_of_the_import():
    out = run("""
import genai_perf.flash_attn
genai_perf.flash_attn.install()
genai_perf.flash_attn.install()
import flash_attn, torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
import flash_attn.bert_padding
q = torch.randn(1, 5, 2, 8)
print(flash_attn.flash_attn_func(q, q, q).shape, flash_attn.__version__)
try:
    import flash_attn.layers
except ModuleNotFoundError as error:
    print(error)
genai_perf.flash_attn.uninstall()
try:
    import flash_attn
except ModuleNotFoundError as error:
    print(error)
""")
    assert out.splitlines() == [
        "torch.Size([1, 5, 2, 8]) 2.8.4",
        "No module named 'flash_attn.layers'",
        "No module named 'flash_attn'",
    ]


def test_install_refuses_beside_the_real_one(tmp_path):
    (tmp_path / "flash_attn.py").write_text("")
    out = run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import flash_attn, genai_perf.flash_attn
try:
    genai_perf.flash_attn.install()
except ImportError as error:
    print(error)
assert sys.modules["flash_attn"] is flash_attn
""")
    assert f"flash_attn is imported already, from {tmp_path}" in out


def test_padding_there_and_back():
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 2, 5], 3, [2, 0, 3])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    padded = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(padded, x * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, mask[:, :, None, None].double().expand_as(x))


def test_unused_room_is_kept_and_not_counted():
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4] and torch.equal(rows, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 4], 3, [2, 1])


def test_concatenated_sequences():
    x = torch.randn(2, 6, 3)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths
    )
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 9], 4)
    assert torch.equal(rows, torch.cat((x[0, :5], x[1, :4])))
    with pytest.raises(ValueError, match="lengths that sum to at most 6 in every row, got 7"):
        bert_padding.unpad_input_for_concatenated_sequences(x, lengths + 1 * (lengths == 3) * 2)


def test_bad_masks():
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, seqlen\) \(2, 6\)"):
        bert_padding.unpad_input(torch.randn(2, 6, 3), torch.ones(2, 5))
