"""C++ kernels on the CPU: the bits of the reference, one pass over the parameter."""

from ..._backends import native
from ..._backends.native import DTYPE_CODES, lib, pointer, threads
from ...formats.dynamic_map import kernel_tables
from . import coefficients
from .checks import refuse_gradient


def why_not_adamw(p, grad, exp_avg, exp_avg_sq, *rest) -> str | None:
    return native.why_not(p, grad, exp_avg, exp_avg_sq)


def why_not_lion(p, grad, exp_avg, *rest) -> str | None:
    return native.why_not(p, grad, exp_avg)


def adamw(p, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, lr, beta1, beta2, eps,
          weight_decay, step, block_size) -> None:  # fmt: skip
    grad = grad.contiguous()
    moments = _moment(exp_avg, exp_avg_scale, True), _moment(exp_avg_sq, exp_avg_sq_scale, False)
    found = coefficients.adamw(lr, beta1, beta2, eps, weight_decay, step)
    if lib().adamw_step(_step(p, grad, block_size), *moments, lib().Coefficients(*found)):
        refuse_gradient("adamw", grad)


def lion(p, grad, exp_avg, exp_avg_scale, lr, beta1, beta2, weight_decay, block_size) -> None:
    grad = grad.contiguous()
    found = lib().Coefficients(*coefficients.lion(lr, beta1, beta2, weight_decay))
    moment = _moment(exp_avg, exp_avg_scale, True)
    if lib().lion_step(_step(p, grad, block_size), moment, found):
        refuse_gradient("lion", grad)


def _step(p, grad, block_size):
    return lib().StepArgs(pointer(p), pointer(grad), DTYPE_CODES[p.dtype], DTYPE_CODES[grad.dtype],
                          p.numel(), block_size, threads())  # fmt: skip


def _moment(moment, scale, signed: bool):
    value, bound, start = kernel_tables(signed)
    return lib().Moment(pointer(moment), pointer(scale), pointer(value), pointer(bound),
                        pointer(start))  # fmt: skip
