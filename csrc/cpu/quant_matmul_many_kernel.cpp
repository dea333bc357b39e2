// Many rows of x: W is decoded once for a few hundred rows of x, a panel of rows by a block of
// columns at a time, into a tile that stays in the second-level cache; the product of the tile is
// then a dense one. Vectors run over rows of x, which is transposed once, so that a tile is used in
// the order in which it is decoded.
//
// Each output is a sum over runs of 64 columns in order, within a run one column after the other:
// the same for any number of rows and any place of a row among them. (One run for all 256 columns of
// a tile is 3 % faster and doubles the rounding error.)
#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"
#include "cpu/transpose.h"

namespace gp {
namespace GP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int NR = 12, MV = 2;
#elif defined(__AVX2__)
constexpr int NR = 6, MV = 2;
#else
constexpr int NR = 4, MV = 4;
#endif
constexpr int MB = MV * VL;       // rows of x in a register tile
constexpr int PANEL = 24;         // most rows of W in a decoded tile, a multiple of NR
constexpr int64_t KB = 128;       // columns of W in a decoded tile
constexpr int64_t RUN = 64;       // columns summed in registers
constexpr int64_t M_CHUNK = 512;  // rows of x that share one decoding

// c[r][0..V*VL) (+)= sum over k of w[r][k] * x[k][0..V*VL), for NR rows of the tile.
template <int V>
void tile_product(int64_t kc, const float* w, const float* x, float* c, int64_t c_stride, bool add) {
  vf acc[NR][V];
  GP_UNROLL
  for (int r = 0; r < NR; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = v_zero();
  for (int64_t k = 0; k < kc; ++k) {
    vf xv[V];
    for (int v = 0; v < V; ++v) xv[v] = v_load(x + k * MB + v * VL);
    GP_UNROLL
    for (int r = 0; r < NR; ++r) {
      const vf b = v_set(w[r * KB + k]);
      for (int v = 0; v < V; ++v) acc[r][v] = v_fma(b, xv[v], acc[r][v]);
    }
  }
  GP_UNROLL
  for (int r = 0; r < NR; ++r)
    for (int v = 0; v < V; ++v) {
      float* p = c + r * c_stride + v * VL;
      v_store(p, add ? v_add(v_load(p), acc[r][v]) : acc[r][v]);
    }
}

}  // namespace

bool quant_matmul_many(const QuantMatmulArgs& a) {
  const QuantWeight& w = a.w;
  const int64_t n = w.n, k = w.k;
  const int64_t chunk = a.m < M_CHUNK ? a.m : M_CHUNK;
  const int64_t tiles = (chunk + MB - 1) / MB;
  const int64_t threads = a.threads;
  Scratch packed(tiles * MB * k * 4), wtile(threads * PANEL * KB * 4);
  Scratch sums(threads * PANEL * tiles * MB * 4);
  if (!packed.ok() || !wtile.ok() || !sums.ok()) return false;
  // Panels of one size but for one register tile; where they are few, as many for each thread.
  const int64_t units = (n + NR - 1) / NR;
  int64_t items = (n + PANEL - 1) / PANEL;
  if (items < 8 * threads) items = (items + threads - 1) / threads * threads;
  if (items > units) items = units;
  const Decoder decoder(w);
  float* xp = packed.as<float>();
  for (int64_t m0 = 0; m0 < a.m; m0 += M_CHUNK) {
    const int64_t m_end = m0 + M_CHUNK < a.m ? m0 + M_CHUNK : a.m;
    const int64_t used = (m_end - m0 + MB - 1) / MB;
    parallel_for(used, a.threads, [&](int64_t t, int) {
      transpose_rows(a.x, k, a.dtype, m0 + t * MB, m_end, MB, xp + t * MB * k, MB);
    });
    parallel_for(items, a.threads, [&](int64_t item, int thread) {
      const KeepSubnormals keep;
      float* tile = wtile.as<float>() + thread * PANEL * KB;
      float* c = sums.as<float>() + thread * PANEL * tiles * MB;
      const int64_t n0 = item * units / items * NR, n1 = (item + 1) * units / items * NR;
      const int64_t nn = (n1 < n ? n1 : n) - n0, c_stride = tiles * MB;
      for (int64_t k0 = 0; k0 < k; k0 += KB) {
        const int64_t kc = k - k0 < KB ? k - k0 : KB;
        for (int64_t r = 0; r < nn; ++r) {
          decoder.prefetch_row(n0 + r, k0 + kc, KB);
          decoder.row(n0 + r, k0, kc, tile + r * KB);
        }
        for (int64_t r = nn; r % NR != 0; ++r) std::memset(tile + r * KB, 0, size_t(kc) * 4);
        for (int64_t t = 0; t < used; ++t) {
          const float* x = xp + t * MB * k + k0 * MB;
          const bool narrow = m_end - m0 - t * MB <= VL;
          for (int64_t r = 0; r < nn; r += NR) {
            float* at = c + r * c_stride + t * MB;
            for (int64_t i = 0; i < kc; i += RUN) {
              const int64_t run = kc - i < RUN ? kc - i : RUN;
              const float* wr = tile + r * KB + i;
              if (narrow) tile_product<1>(run, wr, x + i * MB, at, c_stride, k0 + i > 0);
              else tile_product<MV>(run, wr, x + i * MB, at, c_stride, k0 + i > 0);
            }
          }
        }
      }
      float bias[PANEL] = {};
      for (int64_t r = 0; r < nn && a.bias; ++r) bias[r] = load_one(a.bias, n0 + r, a.bias_dtype);
      store_transposed(c, c_stride, bias, nn, m_end - m0, offset(a.y, m0 * n + n0, a.dtype), n, a.dtype);
    });
  }
  return true;
}

bool quant_matmul_forward(const QuantMatmulArgs& a) {
  const KeepSubnormals keep;
  if (a.m > QUANT_MATMUL_FEW_ROWS) return quant_matmul_many(a);
  if (has_book(a.w.format) || a.w.format == QuantFormat::int4) return quant_matmul_few_4bit(a);
  if (a.w.format == QuantFormat::int3 || a.w.format == QuantFormat::int2)
    return quant_matmul_few_stream(a);
  return quant_matmul_few_8bit(a);
}

}  // namespace GP_ISA
}  // namespace gp
