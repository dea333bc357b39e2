"""Running a Problem: outputs, grids and configurations. Nothing here waits for the device."""

import torch

from ...._backends import triton as toolchain
from . import configs
from .bwd_kernels import (
    _attention_bwd_delta_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
)
from .dbias_kernel import _attention_bwd_dbias_kernel
from .fwd_kernel import _attention_fwd_kernel
from .problem import Problem, block_dim, rows, strides


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _new(problem: Problem, like: torch.Tensor, *shape: int, fill: float = 0.0, dtype=None):
    """An output; packed ones start from `fill`, for the rows that no sequence covers."""
    shape, dtype = shape or like.shape, dtype or like.dtype
    if problem.varlen:
        return torch.full(shape, fill, dtype=dtype, device=like.device)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _together(problem: Problem, streams_a_key_head: int) -> int:
    """How many heads run at a time so that their keys and values stay in half of the L2 cache."""
    keys = problem.seqlen_k * (problem.headdim + problem.headdim_v) * problem.k.element_size()
    key_heads = max(1, toolchain.l2_bytes(problem.q.device) // 2 // max(keys, 1))
    return min(key_heads * streams_a_key_head, 2**20)


def _choose(kernel: str, problem: Problem) -> dict:
    """The configuration of a kernel over scores and the constexprs that it shares with others."""
    config, q = configs.choose(kernel, problem), problem.q
    precision = configs.precision(
        toolchain.arch(q.device), q.dtype, problem.headdim, problem.headdim_v
    )
    return config | problem.features() | {"PRECISION": precision}


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse (natural logarithm, float32)."""
    q, k, v = rows(problem.q), rows(problem.k), rows(problem.v)
    out = _new(problem, q, *q.shape[:-1], problem.headdim_v)
    lse = _new(problem, q, *problem.lse_shape, fill=-torch.inf, dtype=torch.float32)
    streams = problem.batch * problem.nheads
    if streams == 0 or problem.seqlen_q == 0:
        return out, lse
    constants = _choose("fwd", problem)
    bias, slopes, *rest = problem.rule_tensors()
    sinks = problem.options.sinks
    toolchain.launch(
        _attention_fwd_kernel, _cdiv(problem.seqlen_q, constants["BLOCK_M"]) * streams, q.device,
        q, k, v, out, lse, bias, slopes, sinks, *rest, *problem.cu_seqlens,
        *strides(q), *strides(k), *strides(v), *strides(out), *problem.lse_strides(),
        *problem.rule_strides(), problem.nheads, problem.group, streams,
        _together(problem, problem.group), problem.seqlen_q, problem.seqlen_k,
        *problem.rule_numbers(), *problem.scales(), SINKS=sinks is not None,
        SCALE_FIRST=problem.scale_first(), **constants,
    )  # fmt: skip
    return out, lse


def backward(problem: Problem, dout, dlse, out, lse, *, need_dbias: bool = True):
    """(dq, dk, dv, dbias or None, dsinks or None)."""
    q, k, v, out = (rows(x) for x in (problem.q, problem.k, problem.v, out))
    dout, lse = rows(dout.to(q.dtype)), lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    dq, dk, dv = (_new(problem, x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dsinks = _delta(problem, out, dout, lse, dlse, delta)
    inputs = (q, k, v, dout, lse, delta)
    input_strides = (*strides(q), *strides(k), *strides(v), *strides(dout))
    options = (*problem.rule_tensors(), *problem.cu_seqlens)
    tail = (*problem.lse_strides(), *problem.rule_strides())
    numbers = (problem.seqlen_q, problem.seqlen_k, *problem.rule_numbers(),
               problem.options.softmax_scale, *problem.scales())  # fmt: skip

    streams = problem.batch * problem.nheads_k
    if streams and problem.seqlen_k:
        constants = _choose("dkdv", problem)
        toolchain.launch(
            _attention_bwd_dkdv_kernel, _cdiv(problem.seqlen_k, constants["BLOCK_N"]) * streams,
            q.device, *inputs, dk, dv, *options, *input_strides, *strides(dk), *strides(dv), *tail,
            problem.nheads_k, problem.group, streams, _together(problem, 1), *numbers, **constants,
        )  # fmt: skip
    streams = problem.batch * problem.nheads
    if streams and problem.seqlen_q:
        constants = _choose("dq", problem)
        toolchain.launch(
            _attention_bwd_dq_kernel, _cdiv(problem.seqlen_q, constants["BLOCK_M"]) * streams,
            q.device, *inputs, dq, *options, *input_strides, *strides(dq), *tail, problem.nheads,
            problem.group, streams, _together(problem, problem.group), *numbers, **constants,
        )  # fmt: skip
    dbias = _dbias(problem, inputs, input_strides) if need_dbias else None
    return dq, dk, dv, dbias, dsinks


def _delta(problem: Problem, out, dout, lse, dlse, delta) -> torch.Tensor | None:
    """Fills delta; returns the gradient of the sinks, if there are any."""
    config = configs.choose("delta", problem)
    blocks, streams = _cdiv(problem.seqlen_q, config["BLOCK_M"]), problem.batch * problem.nheads
    sinks = problem.options.sinks
    shares = None if sinks is None else lse.new_empty(problem.batch, problem.nheads, blocks)
    if streams * blocks:
        toolchain.launch(
            _attention_bwd_delta_kernel, blocks * streams, out.device,
            out, dout, lse, dlse, delta, sinks, shares, problem.cu_seqlens[0], *strides(out),
            *strides(dout), *problem.lse_strides(), problem.nheads, problem.seqlen_q,
            HEAD_DIM_V=problem.headdim_v, BLOCK_DV=block_dim(problem.headdim_v),
            DLSE=dlse is not None, SINKS=sinks is not None, VARLEN=problem.varlen,
            NATURAL=problem.natural, **config,
        )  # fmt: skip
    return None if sinks is None else shares.sum((0, 2)).to(sinks.dtype)


def _dbias(problem: Problem, inputs, input_strides) -> torch.Tensor | None:
    """None where there is no bias, or one of bool."""
    q, bias = inputs[0], problem.options.attn_bias
    if bias is None or bias.dtype == torch.bool:
        return None
    constants = _choose("dbias", problem)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    blocks_m = _cdiv(problem.seqlen_q, constants["BLOCK_M"])
    blocks_n = _cdiv(problem.seqlen_k, constants["BLOCK_N"])
    whole = (problem.batch, problem.nheads, blocks_m, blocks_n)
    # What has a dimension of its own in the bias is spread over programs, the rest summed by each.
    spread = [
        n if own == full else 1
        for n, own, full in zip(
            whole, bias.shape,
            (problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k), strict=True,
        )
    ]  # fmt: skip
    each = [n // s if s else 0 for n, s in zip(whole, spread, strict=True)]
    programs = spread[0] * spread[1] * spread[2] * spread[3]
    if programs == 0 or 0 in whole:
        return dbias.zero_()
    toolchain.launch(
        _attention_bwd_dbias_kernel, programs, q.device, *inputs, dbias, *problem.rule_tensors(),
        *input_strides, *dbias.stride(), *problem.lse_strides(), *problem.rule_strides(),
        problem.nheads, problem.group, spread[1], spread[2], spread[3], *each, problem.seqlen_q,
        problem.seqlen_k, *problem.rule_numbers(), *problem.scales(),
        SHARED_M=bias.shape[2] != problem.seqlen_q, SHARED_N=bias.shape[3] != problem.seqlen_k,
        **{name: value for name, value in constants.items() if name not in ("BIAS", "VARLEN")},
    )  # fmt: skip
    return dbias
