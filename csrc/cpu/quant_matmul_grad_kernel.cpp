// dx = dy @ W: panels of columns of W, decoded a block of rows at a time into a tile that stays in
// the second-level cache; vectors run over the columns. Each output is a sum over runs of 64 rows of
// W in order, within a run one row after the other.
#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"

namespace gp {
namespace GP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MR = 12, KV = 2;
#elif defined(__AVX2__)
constexpr int MR = 6, KV = 2;
#else
constexpr int MR = 4, KV = 4;
#endif
constexpr int KT = KV * VL;       // columns in a register tile
constexpr int64_t PANEL = 128;    // columns of W in a decoded tile, a multiple of KT
constexpr int64_t NB = 128;       // rows of W in a decoded tile
constexpr int64_t RUN = 64;       // rows of W summed in registers
constexpr int64_t M_CHUNK = 256;  // rows of dy that share one decoding

// c[i][0..KT) (+)= sum over r of dy[i][r] * w[r][0..KT), for R rows of dy.
template <int R>
void tile_product(int64_t rows, const float* dy, int64_t dy_stride, const float* w, float* c,
                  bool add) {
  vf acc[R][KV];
  GP_UNROLL
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < KV; ++v) acc[i][v] = v_zero();
  for (int64_t r = 0; r < rows; ++r) {
    vf wv[KV];
    for (int v = 0; v < KV; ++v) wv[v] = v_load(w + r * PANEL + v * VL);
    GP_UNROLL
    for (int i = 0; i < R; ++i) {
      const vf b = v_set(dy[i * dy_stride + r]);
      for (int v = 0; v < KV; ++v) acc[i][v] = v_fma(b, wv[v], acc[i][v]);
    }
  }
  GP_UNROLL
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < KV; ++v) {
      float* p = c + i * PANEL + v * VL;
      v_store(p, add ? v_add(v_load(p), acc[i][v]) : acc[i][v]);
    }
}

void rows_product(int64_t m, int64_t rows, const float* dy, int64_t dy_stride, const float* w,
                  float* c, bool add) {
  int64_t i = 0;
  for (; i + MR <= m; i += MR)
    tile_product<MR>(rows, dy + i * dy_stride, dy_stride, w, c + i * PANEL, add);
  for (; i < m; ++i) tile_product<1>(rows, dy + i * dy_stride, dy_stride, w, c + i * PANEL, add);
}

}  // namespace

bool quant_matmul_backward(const QuantMatmulArgs& a) {
  const KeepSubnormals keep;
  const QuantWeight& w = a.w;
  const int64_t n = w.n, k = w.k;
  const int64_t chunk = a.m < M_CHUNK ? a.m : M_CHUNK;
  const int64_t threads = a.threads;
  Scratch grads(chunk * n * 4), wtile(threads * NB * PANEL * 4), sums(threads * chunk * PANEL * 4);
  if (!grads.ok() || !wtile.ok() || !sums.ok()) return false;
  const Decoder decoder(w);
  float* dy = grads.as<float>();
  for (int64_t m0 = 0; m0 < a.m; m0 += M_CHUNK) {
    const int64_t mm = a.m - m0 < M_CHUNK ? a.m - m0 : M_CHUNK;
    load_row(dy, offset(a.x, m0 * n, a.dtype), mm * n, a.dtype);
    parallel_for((k + PANEL - 1) / PANEL, a.threads, [&](int64_t item, int thread) {
      const KeepSubnormals keep;
      float* tile = wtile.as<float>() + thread * NB * PANEL;
      float* c = sums.as<float>() + thread * chunk * PANEL;
      const int64_t k0 = item * PANEL, kk = k - k0 < PANEL ? k - k0 : PANEL;
      for (int64_t n0 = 0; n0 < n; n0 += NB) {
        const int64_t nn = n - n0 < NB ? n - n0 : NB;
        for (int64_t r = 0; r < nn; ++r) {
          decoder.prefetch_row(n0 + r + 16, k0, kk);
          decoder.row(n0 + r, k0, kk, tile + r * PANEL);
          std::memset(tile + r * PANEL + kk, 0, size_t(PANEL - kk) * 4);
        }
        for (int64_t t = 0; t < kk; t += KT)
          for (int64_t r = 0; r < nn; r += RUN)
            rows_product(mm, nn - r < RUN ? nn - r : RUN, dy + n0 + r, n, tile + r * PANEL + t, c + t,
                         n0 + r > 0);
      }
      for (int64_t i = 0; i < mm; ++i)
        store_row(offset(a.y, (m0 + i) * k + k0, a.dtype), c + i * PANEL, kk, a.dtype);
    });
  }
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
