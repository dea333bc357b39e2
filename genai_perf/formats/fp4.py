"""fp4: sign, two bits of exponent, one of mantissa, as bitsandbytes has it; see `CodeBook`.

Codes 0 and 8 are both zero. Below half the smallest magnitude a positive value takes code 8.
"""

from .code_book import CodeBook

# The codes without sign, times 12. csrc/common/codebooks.h holds the same; a test compares them.
TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(t / 12.0 for t in TWELFTHS), *(0.0 - t / 12.0 for t in TWELFTHS))

FORMAT = CodeBook("fp4", FP4)
quantize, dequantize = FORMAT.quantize, FORMAT.dequantize
