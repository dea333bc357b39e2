"""What Triton 3.6's interpreter gets wrong, corrected to what the hardware does.

- int() of a one-element array, for a loop's bound: numpy 2.4 refuses it.
- tl.dot of bfloat16 multiplies the bit patterns as integers.
- A cast to bfloat16 truncates; the hardware rounds to nearest even.
"""

from functools import cache

import numpy
import torch


def _to_float32(data: numpy.ndarray) -> numpy.ndarray:
    """The values of bfloat16 bit patterns."""
    return (data.astype(numpy.uint32) << 16).view(numpy.float32)


def _to_bfloat16(data: numpy.ndarray) -> numpy.ndarray:
    """The bit patterns of float32 values rounded to nearest even."""
    rounded = torch.from_numpy(numpy.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy().reshape(data.shape)


@cache
def correct() -> None:
    """Patch the interpreter, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_impl(self, source, type):
        pair = (source.dtype.scalar, type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_to_float32(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, type)

    def create_dot(self, a, b, c, *options):
        a, b = (
            interpreter.TensorHandle(_to_float32(x.data), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, c, *options)

    interpreter._patch_lang_tensor = patch_tensor
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
