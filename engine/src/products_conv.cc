// Forward products and input gradients as convolutions by the inference kernels.
#include <algorithm>
#include <vector>

#include "products.h"
#include "products_plan.h"

namespace bitstrata {
namespace {

constexpr int64_t kMergedWidth = 64;  // pixels of a row, where pixels are not neighbours of each other

// Taps of one axis that reach the positions first, first + stride, ...: a convolution with stride 1 of the gradient.
struct AxisPhase {
  int64_t count = 0;  // positions
  int64_t taps = 0;   // tap m of the convolution is tap first_tap + (taps - 1 - m) * tap_step of the weight
  int64_t first_tap = 0, tap_step = 1;
  int64_t dilation = 1, pad = 0;  // pad < 0: so many elements of the gradient are left out
};

AxisPhase axis_phase(int64_t first, int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  AxisPhase p;
  p.count = in > first ? (in - first + stride - 1) / stride : 0;
  int64_t divisor = stride, rest = dilation;
  while (rest != 0) std::swap(divisor %= rest, rest);
  p.tap_step = stride / divisor;
  p.dilation = dilation / divisor;
  while (p.first_tap < std::min(kernel, p.tap_step) && (first + pad - p.first_tap * dilation) % stride != 0)
    ++p.first_tap;
  if (p.first_tap >= std::min(kernel, p.tap_step)) return p;
  p.taps = (kernel - p.first_tap + p.tap_step - 1) / p.tap_step;
  p.pad = (p.taps - 1) * p.dilation - (first + pad - p.first_tap * dilation) / stride;
  return p;
}

// A 1x1 convolution that treats each pixel alike.
bool merges(const ProductShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.groups == 1 &&
         s.in_h == s.out_h && s.in_w == s.out_w && s.pad_top == 0 && s.pad_left == 0;
}

ConvShape extents(int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t kernel_h, int64_t kernel_w) {
  ConvShape c{};
  c.in_h = in_h, c.in_w = in_w, c.out_h = out_h, c.out_w = out_w;
  c.kernel_h = kernel_h, c.kernel_w = kernel_w;
  c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
  return c;
}

// All pixels of the batch as rows of kMergedWidth, and the rest as one more row.
void run_merged(Plan* plan, int threads, int64_t pixels, const WeightCodes& w, const ProductResult& result) {
  const int64_t width = std::min(pixels, kMergedWidth), rows = pixels / width, rest = pixels % width;
  Phase phase;
  phase.out_h = rows, phase.out_w = width;
  add_phase(plan, phase, extents(rows, width, rows, width, 1, 1), 0, 0, width, w);
  pack(plan, threads);
  std::vector<Maps> maps{{*plan, 1, rows, width, rows, width, result}};
  Plan tail = *plan;
  if (rest > 0) {
    const int64_t done = rows * width;
    tail.x.data = static_cast<const uint8_t*>(plan->x.data) + done * plan->in_c;
    tail.phases[0].out_h = 1, tail.phases[0].out_w = rest;
    for (Part& part : tail.phases[0].parts) {
      part.shape.in_h = part.shape.out_h = 1;
      part.shape.in_w = part.shape.out_w = part.map_w = rest;
      part.row_bytes = part.kernel->staged_row_bytes(part.shape);
    }
    ProductResult left = result;
    if (left.acc != nullptr) left.acc += done * plan->out_c;
    if (left.values != nullptr) left.values += done * plan->out_c;
    left.first += done * plan->out_c;
    maps.push_back({tail, 1, 1, rest, 1, rest, left});
  }
  execute(threads, *plan, maps, result);
}

}  // namespace

void conv_forward(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& x, const int8_t* w,
                  const ProductResult& y) {
  check_product("conv_forward", s);
  check_codes("conv_forward", x, s.in_c);
  const int64_t taps = s.kernel_h * s.kernel_w, ins = s.group_in();
  Workspaces shared(1);
  Plan plan = make_plan(kernels, threads, x, s.in_c, s.out_c, s.groups, w, s.out_c * ins * taps, shared[0]);
  const WeightCodes weights{w, s.group_out() * ins * taps, ins * taps, taps, 0, s.kernel_w, 1, taps};
  if (merges(s)) return run_merged(&plan, threads, s.batch * s.in_h * s.in_w, weights, y);
  ConvShape c = extents(s.in_h, s.in_w, s.out_h, s.out_w, s.kernel_h, s.kernel_w);
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.pad_top = s.pad_top, c.pad_left = s.pad_left;
  Phase phase;
  phase.out_h = s.out_h, phase.out_w = s.out_w;
  add_phase(&plan, phase, c, 0, 0, s.in_w, weights);
  pack(&plan, threads);
  execute(threads, plan, {{plan, s.batch, s.in_h, s.in_w, s.out_h, s.out_w, y}}, y);
}

void conv_input_grad(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& g, const int8_t* w,
                     const ProductResult& x) {
  check_product("conv_input_grad", s);
  check_codes("conv_input_grad", g, s.out_c);
  const int64_t taps = s.kernel_h * s.kernel_w, ins = s.group_in(), outs = s.group_out();
  Workspaces shared(1);
  Plan plan = make_plan(kernels, threads, g, s.out_c, s.in_c, s.groups, w, s.out_c * ins * taps, shared[0]);
  WeightCodes weights{w, outs * ins * taps, taps, ins * taps, 0, s.kernel_w, 1, taps};
  if (merges(s)) return run_merged(&plan, threads, s.batch * s.in_h * s.in_w, weights, x);
  for (int64_t y0 = 0; y0 < std::min(s.stride_h, s.in_h); ++y0)
    for (int64_t x0 = 0; x0 < std::min(s.stride_w, s.in_w); ++x0) {
      const AxisPhase v = axis_phase(y0, s.in_h, s.kernel_h, s.stride_h, s.dilation_h, s.pad_top);
      const AxisPhase u = axis_phase(x0, s.in_w, s.kernel_w, s.stride_w, s.dilation_w, s.pad_left);
      const int64_t crop_y = std::max<int64_t>(0, -v.pad), crop_x = std::max<int64_t>(0, -u.pad);
      if (v.taps == 0 || u.taps == 0 || crop_y >= s.out_h || crop_x >= s.out_w) continue;
      ConvShape c = extents(s.out_h - crop_y, s.out_w - crop_x, v.count, u.count, v.taps, u.taps);
      c.dilation_h = v.dilation, c.dilation_w = u.dilation;
      c.pad_top = std::max<int64_t>(0, v.pad), c.pad_left = std::max<int64_t>(0, u.pad);
      weights.tap_y = -v.tap_step * s.kernel_w, weights.tap_x = -u.tap_step;
      weights.first_tap =
          (v.first_tap + (v.taps - 1) * v.tap_step) * s.kernel_w + u.first_tap + (u.taps - 1) * u.tap_step;
      Phase phase;
      phase.y0 = y0, phase.x0 = x0, phase.stride_h = s.stride_h, phase.stride_w = s.stride_w;
      phase.out_h = v.count, phase.out_w = u.count;
      add_phase(&plan, phase, c, crop_y, crop_x, s.out_w, weights);
    }
  pack(&plan, threads);
  execute(threads, plan, {{plan, s.batch, s.out_h, s.out_w, s.in_h, s.in_w, x}}, x);
}

const char* forward_kernel(const Kernels& kernels, const ProductShape& s, DType dtype, int32_t lo, int32_t hi,
                           int32_t w_lo, int32_t w_hi) {
  ConvShape c = extents(s.in_h, s.in_w, s.out_h, s.out_w, s.kernel_h, s.kernel_w);
  c.in_c = s.in_c, c.out_c = s.out_c, c.groups = s.groups;
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.pad_top = s.pad_top, c.pad_left = s.pad_left;
  c.mul = 1;
  c.code_lo = w_lo, c.code_hi = w_hi, c.input_lo = std::min(lo, 0), c.input_hi = std::max(hi, 0);
  c.input_dtype = dtype;
  return kernels.conv(c)->name;
}

}  // namespace bitstrata
