// Fake quantization. A training step calls it for every layer: tensors come as addresses, because handing over arrays
// takes longer than the work on a small tensor does. functional/engine_fake.py, the only caller, keeps them alive.
#include "bitstrata/fake_quantize.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bitstrata/dispatch.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bitstrata::FakeGrid;
using bitstrata::FakeRule;
using bitstrata::FakeTensor;

const char* const kNames[bitstrata::kFakeGrids] = {"uniform", "affine", "symmetric",  "nested", "vertical", "unit",
                                                   "centred", "tanh",   "tanh_floor", "scaled", "sigmoids"};

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("fake_quantize: " + what); }

FakeRule rule_of(const std::string& grid, int lo, int hi, int shift, float add, float slope_add, bool open_range,
                 bool everywhere, bool calibrated, float factor, float rounded, float gain) {
  FakeRule r;
  int index = 0;
  while (index < bitstrata::kFakeGrids && grid != kNames[index]) ++index;
  if (index == bitstrata::kFakeGrids) fail("there is no grid '" + grid + "'");
  if (lo > hi || lo < -256 || hi > 256)
    fail("codes " + std::to_string(lo) + ".." + std::to_string(hi) + " are not within -256..256");
  if (shift < 0 || shift > 7) fail("shift must be in 0..7, got " + std::to_string(shift));
  if (grid == std::string("sigmoids") && !(factor >= 0.05f))
    fail("sigmoids must be 0.05 wide or wider, got " + std::to_string(factor));
  r.grid = static_cast<FakeGrid>(index);
  r.lo = lo, r.hi = hi, r.shift = shift, r.add = add, r.slope_add = slope_add;
  r.open_range = open_range, r.everywhere = everywhere, r.calibrated = calibrated;
  r.factor = factor, r.rounded = rounded, r.gain = gain;
  return r;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

FakeTensor tensor_of(int64_t outer, int64_t channels, int64_t inner, bool bf16, bool narrow, uintptr_t step,
                     uintptr_t extra) {
  return {outer, channels, inner, bf16, narrow, at<const float>(step), at<const float>(extra)};
}

void forward(const FakeRule& rule, int64_t outer, int64_t channels, int64_t inner, bool bf16, bool narrow,
             uintptr_t step, uintptr_t extra, uintptr_t x, uintptr_t out, const std::string& isa, int threads) {
  const FakeTensor t = tensor_of(outer, channels, inner, bf16, narrow, step, extra);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::fake_quantize(kernels, threads, rule, t, at<const void>(x), at<void>(out));
}

void backward(const FakeRule& rule, int64_t outer, int64_t channels, int64_t inner, bool bf16, bool narrow,
              uintptr_t step, uintptr_t extra, double factor, uintptr_t g, uintptr_t x, uintptr_t dx, uintptr_t dstep,
              uintptr_t dextra, const std::string& isa, int threads) {
  const FakeTensor t = tensor_of(outer, channels, inner, bf16, narrow, step, extra);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::fake_quantize_gradient(kernels, threads, rule, t, factor, at<const void>(g), at<const void>(x),
                                    at<void>(dx), at<float>(dstep), at<float>(dextra));
}

}  // namespace

void bind_fake_quantize(nb::module_& m) {
  nb::class_<FakeRule>(m, "FakeRule")
      .def(nb::new_(&rule_of), "grid"_a, "lo"_a, "hi"_a, "shift"_a = 0, "add"_a = 0.0f, "slope_add"_a = 0.0f,
           "open_range"_a = false, "everywhere"_a = false, "calibrated"_a = false, "factor"_a = 1.0f,
           "rounded"_a = 1.0f, "gain"_a = 1.0f);
  m.def("fake_quantize", &forward);
  m.def("fake_quantize_gradient", &backward);
}
