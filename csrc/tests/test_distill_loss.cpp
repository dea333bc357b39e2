// Distillation losses without Python: the gradient against differences of the loss, every instruction
// set, any thread count.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/distill_loss.h"

namespace {

constexpr int64_t ROWS = 3, VOCAB = 77;
int failures = 0;

void check(bool condition, const char* what, int kind) {
  if (condition) return;
  ++failures;
  std::printf("FAILED on %s: %s, divergence %d\n", gp::isa_name(gp::active_isa()), what, kind);
}

std::vector<float> scores(uint32_t state) {
  std::vector<float> x(ROWS * VOCAB);
  for (float& v : x) {
    state = state * 1664525u + 1013904223u;
    v = float(state >> 8) / 4194304.0f - 2.0f;
  }
  return x;
}

struct Run {
  std::vector<float> loss = std::vector<float>(ROWS * 2), grad;
  gp::RowStatus status;
};

Run run(const std::vector<float>& z, const std::vector<float>& zt, int kind, int threads,
        int64_t label = 5) {
  Run out;
  out.grad = z;
  const std::vector<int64_t> labels(ROWS, label);
  const std::vector<float> weights{1.0f, 0.0f, 1.0f};
  gp::DistillLossArgs a{};
  a.rows = ROWS, a.vocab = VOCAB;
  a.student = {out.grad.data(), VOCAB, gp::DType::f32, 1.0f, 0.0f};
  a.teacher = {zt.data(), VOCAB, gp::DType::f32, 1.0f, 0.0f};
  a.labels = labels.data(), a.weights = weights.data();
  a.soft_weight = 0.75f, a.hard_weight = 0.25f;
  a.kind = gp::Divergence(kind), a.beta = 0.3f, a.temperature = 1.0f;
  a.grad = out.grad.data(), a.grad_stride = VOCAB, a.loss = out.loss.data(), a.threads = threads;
  out.status = GP_KERNEL(distill_loss)(a);
  return out;
}

double total(const Run& r) { return 0.75 * r.loss[0] + 0.25 * r.loss[1]; }

void kind_is_right(int kind) {
  const std::vector<float> z = scores(1), zt = scores(2);
  const Run one = run(z, zt, kind, 1), three = run(z, zt, kind, 3);
  check(one.status.error == gp::RowError::none, "status", kind);
  check(!std::memcmp(one.grad.data(), three.grad.data(), one.grad.size() * 4), "threads", kind);
  check(one.loss[2] == 0.0f && one.grad[VOCAB] == 0.0f, "a row of weight 0", kind);
  for (int64_t i : {0, 5, 76}) {
    std::vector<float> up = z, down = z;
    up[i] += 0.01f, down[i] -= 0.01f;
    const double slope = (total(run(up, zt, kind, 1)) - total(run(down, zt, kind, 1))) / 0.02;
    check(std::fabs(slope - one.grad[i]) < 2e-4, "gradient", kind);
  }
  const Run bad = run(z, zt, kind, 2, VOCAB);
  check(bad.status.error == gp::RowError::label && bad.status.row == 0, "label out of range", kind);
}

}  // namespace

int main() {
  for (gp::Isa isa : {gp::Isa::scalar, gp::Isa::avx2, gp::Isa::avx512}) {
    if (!gp::force_isa(isa)) continue;
    for (int kind = 0; kind < 6; ++kind) kind_is_right(kind);
  }
  if (!failures) std::printf("distill_loss: ok\n");
  return failures != 0;
}
