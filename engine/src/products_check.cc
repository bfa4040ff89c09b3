#include "products.h"

namespace bitstrata {
namespace {

// The one extent that windows give; more exactly, what a convolution with floor division has.
void check_axis(const std::string& op, const char* axis, int64_t in, int64_t out, int64_t kernel, int64_t stride,
                int64_t dilation, int64_t before, int64_t after) {
  const int64_t windows = check_windows(op, axis, in, (kernel - 1) * dilation + 1, stride, before, after);
  if (windows != out)
    fail(op, std::string("output ") + axis + " is " + str(out) + ", but an input of " + str(in) + " has " +
                 str(windows) + " windows of kernel " + str(kernel) + ", stride " + str(stride) + ", dilation " +
                 str(dilation) + " and padding " + str(before) + " and " + str(after));
}

}  // namespace

void check_product(const std::string& op, const ProductShape& s) {
  check_range(op, "batch", s.batch, 1, kMaxElements);
  for (int64_t v : {s.kernel_h, s.kernel_w}) check_range(op, "kernel", v, 1, kMaxExtent);
  for (int64_t v : {s.stride_h, s.stride_w}) check_range(op, "stride", v, 1, kMaxExtent);
  for (int64_t v : {s.dilation_h, s.dilation_w}) check_range(op, "dilation", v, 1, kMaxExtent);
  for (int64_t v : {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right}) check_range(op, "padding", v, 0, kMaxExtent);
  check_shape(op, "input", {s.in_h, s.in_w, s.in_c});
  check_shape(op, "output", {s.out_h, s.out_w, s.out_c});
  check_shape(op, "padded input", {s.in_h + s.pad_top + s.pad_bottom, s.in_w + s.pad_left + s.pad_right, s.in_c});
  check_range(op, "groups", s.groups, 1, s.in_c);
  if (s.in_c % s.groups != 0 || s.out_c % s.groups != 0)
    fail(op, "groups " + str(s.groups) + " does not divide the " + str(s.in_c) + " input and " + str(s.out_c) +
                 " output channels");
  check_shape(op, "weight", {s.out_c, s.group_in(), s.kernel_h});
  check_range(op, "elements of the weight", s.out_c * s.group_in() * s.kernel_h, 1, kMaxElements / s.kernel_w);
  check_axis(op, "height", s.in_h, s.out_h, s.kernel_h, s.stride_h, s.dilation_h, s.pad_top, s.pad_bottom);
  check_axis(op, "width", s.in_w, s.out_w, s.kernel_w, s.stride_w, s.dilation_w, s.pad_left, s.pad_right);
}

void check_codes(const std::string& op, const ProductCodes& x, int64_t channels) {
  if (x.dtype == DType::i32) fail(op, "codes are i32, must be u8 or s8");
  check_range(op, "least code", x.lo, lowest(x.dtype), highest(x.dtype));
  check_range(op, "largest code", x.hi, x.lo, highest(x.dtype));
  for (int64_t c = 0; x.shift != nullptr && c < channels; ++c) check_range(op, "shift", x.shift[c], 0, 23);
}

}  // namespace bitstrata
