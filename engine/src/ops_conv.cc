#include <algorithm>

#include "aligned.h"
#include "bitstrata/dispatch.h"
#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

// A 1x1 convolution of 1x1 maps (a linear layer): the batch takes the place of the image's rows.
bool is_linear(const ConvShape& s) {
  return s.in_h == 1 && s.in_w == 1 && s.out_h == 1 && s.out_w == 1 && s.kernel_h == 1 && s.kernel_w == 1 &&
         s.pad_top == 0 && s.pad_left == 0;
}

class ConvOp final : public Op {
 public:
  ConvOp(const ConvKernel& kernel, const PeakLoop& peak, const ConvShape& shape, const ConvParams& p, bool bounds,
         int x, int output)
      : Op({x}, output),
        kernel_(kernel),
        shape_(shape),
        given_(shape),
        linear_(is_linear(shape)),
        row_bytes_(kernel.staged_row_bytes(shape)),
        packed_bytes_(kernel.packed_bytes(shape)),
        packed_(packed_bytes_),
        peak_(kernel.peak != nullptr ? kernel.peak : &peak) {
    if (bounds) bounds_ = sum_bounds(shape, p.codes);
    kernel_.pack(shape_, p.codes, p.pad_code, packed_.data());
    if (linear_) {
      shape_.in_h = shape_.out_h = kMaxExtent;
      shape_.stride_h = 1;  // a stride means nothing on a 1x1 map, but would skip images
    }
  }

  // Two, staging and convolving, or the second alone.
  int phases() const override { return direct() ? 1 : 2; }
  int64_t items(int phase, int64_t images) const override { return rows(stages(phase)) * images; }
  int64_t pixels_of_item() const override { return linear_ ? 1 : shape_.out_w; }
  int64_t scratch_bytes(int64_t images) const override { return rows(true) * row_bytes_ * images; }
  int64_t cost() const override {
    return rows(false) * shape_.out_w * shape_.out_c * shape_.kernel_h * shape_.kernel_w * shape_.group_in() / 8;
  }
  const char* kernel() const override { return kernel_.name; }
  std::vector<std::string> kernels(const Kernels& row) const override {
    std::vector<std::string> names;
    for (const ConvKernel* kernel : conv_kernels(row, given_)) names.emplace_back(kernel->name);
    return names;
  }
  int64_t operations() const override {
    return 2 * rows(false) * shape_.out_w * shape_.out_c * shape_.kernel_h * shape_.kernel_w * shape_.group_in();
  }
  int64_t constant_bytes() const override { return packed_bytes_; }
  const PeakLoop* peak() const override { return peak_; }
  double passes() const override { return kernel_.passes == nullptr ? 1 : kernel_.passes(shape_); }
  std::vector<Bounds> bounds() const override { return bounds_; }

  void run(int phase, const Frame& f, int64_t begin, int64_t end) const override {
    const bool stage = stages(phase);
    each_image(f, output, 4, stage, begin, end,
               [&](const uint8_t* image, uint8_t* staged, uint8_t* out, int64_t first, int64_t last) {
                 if (stage)
                   kernel_.stage(shape_, packed_.data(), image, staged, first, last);
                 else
                   kernel_.run(shape_, packed_.data(), direct() ? image : staged, reinterpret_cast<int32_t*>(out),
                               first, last);
               });
  }

  bool fuse(const Op& next) override {
    if (kernel_.run_codes == nullptr || next.part().kind != Part::codes) return false;
    next_ = &next;
    return true;
  }
  void run_fused(const Frame& f, int64_t begin, int64_t end) const override {
    each_image(f, next_->output, 1, false, begin, end,
               [&](const uint8_t* image, const uint8_t* staged, uint8_t* out, int64_t first, int64_t last) {
                 kernel_.run_codes(shape_, packed_.data(), direct() ? image : staged, *next_->part().requant, out,
                                   first, last);
               });
  }

 private:
  // Calls work(image, staged, out, first, last) for the rows [begin, end) of all images, those of an image at a time.
  template <typename Work>
  void each_image(const Frame& f, int result, int64_t size, bool stage, int64_t begin, int64_t end,
                  const Work& work) const {
    if (linear_) return work(f.values[inputs[0]], f.scratch, f.values[result], begin, end);
    const int64_t in_bytes = shape_.in_h * shape_.in_w * shape_.in_c;
    const int64_t out_bytes = shape_.out_h * shape_.out_w * shape_.out_c * size;
    const int64_t staged_bytes = shape_.padded_h() * row_bytes_;
    const int64_t per_image = rows(stage);
    while (begin < end) {
      const int64_t i = begin / per_image, first = begin % per_image;
      const int64_t last = std::min(per_image, first + end - begin);
      work(f.values[inputs[0]] + i * in_bytes, f.scratch + i * staged_bytes, f.values[result] + i * out_bytes, first,
           last);
      begin += last - first;
    }
  }

  bool direct() const { return row_bytes_ == 0; }
  bool stages(int phase) const { return phase == 0 && !direct(); }
  int64_t rows(bool staged) const { return linear_ ? 1 : staged ? shape_.padded_h() : shape_.out_h; }

  const ConvKernel& kernel_;
  ConvShape shape_, given_;  // given: before a linear layer's images became rows
  bool linear_;
  int64_t row_bytes_;
  int64_t packed_bytes_;
  AlignedBuffer packed_;
  const PeakLoop* peak_;
  std::vector<Bounds> bounds_;  // of each channel's sums, where a requantization can use them
  const Op* next_ = nullptr;    // what run_fused does with the sums
};

// The bounds of the input with its pad codes; checks the pad codes.
void check_pad_codes(const std::string& name, const Value& x, const ConvParams& p, ConvShape* s) {
  if (p.pad_codes != s->in_c)
    fail(name, "pad_code has " + str(p.pad_codes) + " elements, the input " + str(s->in_c) + " channels");
  s->input_lo = x.lo;
  s->input_hi = x.hi;
  const bool pads = std::any_of(p.padding.begin(), p.padding.end(), [](int64_t n) { return n > 0; });
  for (int64_t c = 0; c < p.pad_codes; ++c) {
    check_range(name, "pad_code", p.pad_code[c], lowest(x.dtype), highest(x.dtype));
    if (!pads) continue;
    s->input_lo = std::min(s->input_lo, p.pad_code[c]);
    s->input_hi = std::max(s->input_hi, p.pad_code[c]);
  }
}

void check_weights(const std::string& name, const ConvParams& p, int64_t count, ConvShape* s) {
  s->mul = static_cast<int32_t>(check_range(name, "mul", p.mul, INT16_MIN, INT16_MAX));
  s->add = static_cast<int32_t>(check_range(name, "add", p.add, INT16_MIN, INT16_MAX));
  int8_t lo = p.codes[0], hi = p.codes[0];  // a reduction that compilers vectorize
  for (int64_t i = 1; i < count; ++i) {
    lo = std::min(lo, p.codes[i]);
    hi = std::max(hi, p.codes[i]);
  }
  s->code_lo = lo;
  s->code_hi = hi;
  check_range(name, "weight mul * code + add", s->mul * s->code_lo + s->add, INT16_MIN, INT16_MAX);
  check_range(name, "weight mul * code + add", s->mul * s->code_hi + s->add, INT16_MIN, INT16_MAX);
}

// The kernel of that name; if empty, the row's choice.
const ConvKernel& find_kernel(const std::string& name, const Kernels& row, const ConvShape& s,
                              const std::string& wanted) {
  std::string known;
  for (const ConvKernel* kernel : conv_kernels(row, s)) {
    if (wanted.empty() || wanted == kernel->name) return *kernel;
    known += (known.empty() ? "" : ", ") + std::string(kernel->name);
  }
  fail(name, "kernel '" + wanted + "' cannot compute this convolution on " + row.isa + ", which has " + known);
}

}  // namespace

Made make_conv(const Kernels& kernels, const std::string& name, Operand x, int output, const ConvParams& p) {
  if (x.value.dtype == DType::i32) fail(name, "the input is i32, a convolution takes u8 or s8 codes");
  for (int64_t d : p.dims) check_range(name, "extent of codes", d, 1, kMaxExtent);
  for (int64_t v : p.stride) check_range(name, "stride", v, 1, kMaxExtent);
  for (int64_t v : p.dilation) check_range(name, "dilation", v, 1, kMaxExtent);
  for (int64_t v : p.padding) check_range(name, "padding", v, 0, kMaxExtent);
  const Shape& in = x.value.shape;
  ConvShape s{};
  s.groups = check_range(name, "groups", p.groups, 1, in.c);
  s.in_h = in.h, s.in_w = in.w, s.in_c = in.c;
  s.out_c = p.dims[0];
  s.kernel_h = p.dims[2], s.kernel_w = p.dims[3];
  s.stride_h = p.stride[0], s.stride_w = p.stride[1];
  s.dilation_h = p.dilation[0], s.dilation_w = p.dilation[1];
  s.pad_top = p.padding[0], s.pad_left = p.padding[2];
  s.input_dtype = x.value.dtype;
  if (p.dims[1] * s.groups != in.c)
    fail(name, "codes take " + str(p.dims[1]) + " input channels in each of " + str(s.groups) +
                   " groups, the input has " + str(in.c) + " channels");
  if (s.out_c % s.groups != 0)
    fail(name, "groups " + str(s.groups) + " does not divide the " + str(s.out_c) + " output channels");
  s.out_h =
      check_windows(name, "height", in.h, (s.kernel_h - 1) * s.dilation_h + 1, s.stride_h, p.padding[0], p.padding[1]);
  s.out_w =
      check_windows(name, "width", in.w, (s.kernel_w - 1) * s.dilation_w + 1, s.stride_w, p.padding[2], p.padding[3]);
  const Shape result = check_shape(name, "result", {s.out_h, s.out_w, s.out_c});
  check_shape(name, "padded input", {s.padded_h(), s.padded_w(), s.in_c});
  check_pad_codes(name, x.value, p, &s);
  check_weights(name, p, p.dims[0] * p.dims[1] * p.dims[2] * p.dims[3], &s);
  return {std::make_unique<ConvOp>(find_kernel(name, kernels, s, p.kernel), limits_of(kernels).products, s, p,
                                   kernels.requant_forms, x.index, output),
          Value{result, DType::i32}};
}

}  // namespace bitstrata
