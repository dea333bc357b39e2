// Element types as the binding passes them; genai_perf/_backends/native.py holds the same numbers.
#pragma once

namespace gp {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f8e4m3fn = 3, f8e5m2 = 4, i8 = 5 };

}  // namespace gp
