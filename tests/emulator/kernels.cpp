// The kernels of one mode (RUN names its function, MODE its type), on factors of every layout.
#include <sys/mman.h>

#include <cmath>

#include "hyperinf/gfim.cuh"
#include "run.h"

using namespace hyperinf::gpu;
using Mode = MODE;
using T = Mode::Element;

namespace {

enum Layout { kPlain, kShifted, kTransposed, kPadded, kFarSamples, kFarTokens };
constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements, and still a multiple of 16 bytes

// Address space without memory behind it, until a page is written.
template <class Number>
struct Reserve {
  size_t bytes;
  void* start;
  explicit Reserve(int64_t numbers) : bytes(static_cast<size_t>(numbers) * sizeof(Number)) {
    start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) emu::fail("no address space");
  }
  ~Reserve() { munmap(start, bytes); }
  Number* data() { return static_cast<Number*>(start); }
};

// (batch, tokens, features) placed as the layout says, in memory with nothing to spare at its end.
struct Placed {
  std::vector<T> numbers;
  std::unique_ptr<Reserve<T>> far;
  const T* data;
  int64_t sample, token, feature;

  Placed(const std::vector<float>& from, int64_t batch, int64_t tokens, int64_t features,
         int64_t layout) {
    const bool padded = layout >= kPadded;
    const int64_t width = padded ? parts(features, 16) * 16 : features;
    feature = layout == kTransposed ? tokens : 1;
    token = layout == kTransposed ? 1 : layout == kFarTokens ? kFar : width;
    sample = layout == kFarSamples ? kFar : layout == kFarTokens ? kFar * tokens : tokens * width;
    const int64_t shift = layout == kShifted, size = batch * sample + shift;
    T* to;
    if (layout >= kFarSamples) {
      far = std::make_unique<Reserve<T>>(size);
      to = far->data();
    } else {
      numbers.assign(static_cast<size_t>(size), T(NAN));
      numbers.shrink_to_fit();
      to = numbers.data() + shift;
    }
    data = to;
    for (int64_t b = 0, k = 0; b < batch; ++b)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < features; ++i)
          to[b * sample + t * token + i * feature] = T(from[static_cast<size_t>(k++)]);
  }
};

Factors<T> factors(const Case& c, const Placed& delta, const Placed& act) {
  return {delta.data, delta.sample, delta.token, delta.feature, act.data, act.sample,
          act.token,  act.feature,  c.batch,     c.tokens,      c.rows,   c.cols};
}

std::vector<float> nans(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count), NAN);
}

void gfim(Case& c, const Factors<T>& f) {
  // C too with rows 2^31 apart where samples are
  const bool far = c.layout == kFarSamples;
  const int64_t pitch = far ? kFar : c.cols;
  Reserve<float> C(c.cols * pitch);
  for (int64_t i = 0; i < c.cols; ++i)
    for (int64_t j = 0; j < c.cols; ++j)
      C.data()[i * pitch + j] = c.other[static_cast<size_t>(i * c.cols + j)];
  auto partial = nans(gfim_plan(c.batch, c.rows, c.cols).partials());
  const Gfim arguments{C.data(), pitch, 1, c.alpha, 0, partial.data()};
  gfim_accumulate<Mode>(f, arguments, emu::Launch{});
  for (int64_t i = 0; i < c.cols; ++i)
    for (int64_t j = 0; j < c.cols; ++j) c.out.push_back(C.data()[i * pitch + j]);
}

// Two samples of one row: only the last block runs, whose output starts beyond 2^31.
void far_output(Case& c) {
  const int64_t cols = (int64_t{1} << 30) + 5, blocks = 2 * tiles_of(1, cols);
  const T delta[2] = {T(0.0f), T(3.0f)};
  Reserve<T> act(2 * cols);
  for (int64_t k = 1; k <= 7; ++k) act.data()[2 * cols - k] = T(static_cast<float>(k));
  Reserve<float> out(2 * cols);
  emu::first_block = emu::last_block = static_cast<unsigned>(blocks - 1);
  per_sample_grad<Mode>({delta, 1, 1, 1, act.data(), cols, cols, 1, 2, 1, 1, cols}, out.data(),
                        emu::Launch{});
  emu::first_block = 0, emu::last_block = ~0u;
  for (int64_t k = 1; k <= 7; ++k) c.out.push_back(out.data()[2 * cols - k]);
}

}  // namespace

void RUN(Case& c) {
  if (c.op == 4) return far_output(c);
  const Placed delta(c.delta, c.batch, c.tokens, c.rows, c.layout);
  const Placed act(c.act, c.batch, c.tokens, c.cols, c.layout);
  const Factors<T> f = factors(c, delta, act);
  if (c.op == 0) {
    c.out = nans(c.batch * c.rows * c.cols);
    per_sample_grad<Mode>(f, c.out.data(), emu::Launch{});
  } else if (c.op == 1) {
    c.out = nans(c.batch);
    auto partial = nans(c.batch * norm_partials(c.tokens, c.rows, c.cols, c.ghost));
    per_sample_norm_sq<Mode>(f, c.ghost, partial.data(), c.out.data(), emu::Launch{});
  } else if (c.op == 2) {
    c.out = nans(c.batch * c.count);
    auto partial = nans(c.batch * c.count * tiles_of(c.rows, c.cols));
    const Dots dots{c.other.data(), c.count, partial.data()};
    per_sample_dot<Mode>(f, dots, c.out.data(), emu::Launch{});
  } else {
    gfim(c, f);
  }
}
