// The gradient of a convolution's input in bfloat16: bands of rows of all images, shared by threads.
#include <algorithm>
#include <atomic>

#include "bitstrata/dispatch.h"
#include "bitstrata/qat_products.h"
#include "checks.h"
#include "parallel.h"
#include "product_shape.h"
#include "workspace.h"

namespace bitstrata {
namespace {

constexpr int64_t kMostTaps = 128;
constexpr int64_t kBandsPerThread = 4;  // so that no thread waits long for the last band
constexpr int64_t kLeastRows = 4;       // of a band; each stages some rows of its neighbours too

// How far from 0 the integers lie at most: of a value, or of both parts.
int64_t largest_of(const int8_t* values, int64_t count, int threads) {
  std::atomic<int> largest{0};
  parallel_for(threads, count, int64_t{1} << 16, [&](int64_t begin, int64_t end) {
    int lo = 0, hi = 0;
    for (int64_t i = begin; i < end; ++i) {
      lo = std::min<int>(lo, values[i]);
      hi = std::max<int>(hi, values[i]);
    }
    const int found = std::max(-lo, hi);
    int before = largest.load();
    while (before < found && !largest.compare_exchange_weak(before, found)) {
    }
  });
  return largest;
}

int64_t largest_of(const QatWeight& w, int64_t count, int threads) {
  const int64_t high = largest_of(w.high, count, threads);
  return w.low == nullptr ? high : 2 * high + largest_of(w.low, count, threads);
}

// Whole images, unless there are too few of them for the threads.
int64_t rows_of_band(const ProductShape& s, int threads) {
  const int64_t wanted = std::max(threads, 1) * kBandsPerThread;
  if (threads <= 1 || s.batch >= wanted) return s.in_h;
  return std::min(s.in_h, std::max(kLeastRows, s.in_h * s.batch / wanted));
}

void check(const ProductShape& s) {
  check_product("qat_input_gradient", s);
  check_range("qat_input_gradient", "groups", s.groups, 1, 1);
  check_range("qat_input_gradient", "taps of the kernel", s.kernel_h * s.kernel_w, 1, kMostTaps);
}

}  // namespace

void qat_input_gradient(const Kernels& kernels, int threads, const ProductShape& s, const uint16_t* g,
                        const QatWeight& w, uint16_t* out) {
  check(s);
  const ConvShape c = conv_shape(s);
  const int64_t largest = largest_of(w, s.out_c * s.in_c * s.kernel_h * s.kernel_w, threads);
  const InputGradientKernel& kernel = *float_products_of(kernels).input_gradient(c, largest);
  Workspaces shared(1), own(std::max(threads, 1));
  uint8_t* const packed = shared[0].get(0, kernel.packed_bytes(c));
  parallel_for(threads, kernel.pack_parts(c), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) kernel.pack(c, w.high, w.low, packed, part);
  });
  const int64_t rows = rows_of_band(s, threads), bands = (s.in_h + rows - 1) / rows;
  parallel_for(threads, s.batch * bands, 1, [&](int64_t begin, int64_t end) {
    const int mine = own.take();
    uint8_t* const scratch = own[mine].get(0, kernel.scratch_bytes(c, rows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / bands, first = i % bands * rows;
      kernel.run(c, packed, g + image * s.out_h * s.out_w * s.out_c, scratch, out + image * s.in_h * s.in_w * s.in_c,
                 first, std::min(s.in_h, first + rows));
    }
    own.give(mine);
  });
}

}  // namespace bitstrata
