// The portable kernels: plain C++ that any processor runs, and that the others are tested against.
#include "../common/conv_stage.h"
#include "../common/pointwise.h"

namespace bitstrata {

extern const Training kGenericTraining;
extern const ProductKernels kGenericProducts;
extern const Limits kGenericLimits;
namespace {

using Stage = Staging<int16_t>;

Stage staging(const ConvShape& s) { return Stage(s, s.group_in(), 0, false); }

// Packed: weights int16 [out_c][kernel_h][kernel_w][in_c / groups], then the padding int16 [in_c].
int64_t window_elements(const ConvShape& s) { return s.kernel_h * s.kernel_w * s.group_in(); }
int64_t packed_bytes(const ConvShape& s) { return (s.out_c * window_elements(s) + s.in_c) * 2; }
int64_t staged_row_bytes(const ConvShape& s) { return staging(s).row_bytes; }

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  int16_t* w = static_cast<int16_t*>(packed);
  for (int64_t o = 0; o < s.out_c; ++o)
    for (int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx)
        for (int64_t i = 0; i < s.group_in(); ++i) *w++ = static_cast<int16_t>(weight_at(s, codes, o, i, ky, kx));
  stage_padding(s, staging(s), pad, w);
}

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const int16_t* padding = static_cast<const int16_t*>(packed) + s.out_c * window_elements(s);
  stage_rows(s, staging(s), padding, image, staged, row_begin, row_end);
}

// kOut output channels of one pixel, their weights `pitch` apart.
template <int kOut>
void dot(const Runs<int16_t>& runs, const uint8_t* window, const int16_t* w, int64_t pitch, int32_t* out) {
  uint32_t sum[kOut] = {};
  for (int64_t run = 0; run < runs.count; ++run, w += runs.elements) {
    const int16_t* x = reinterpret_cast<const int16_t*>(window + runs.offset(run));
    for (int64_t i = 0; i < runs.elements; ++i)
      for (int k = 0; k < kOut; ++k) sum[k] += static_cast<uint32_t>(int32_t{x[i]} * w[k * pitch + i]);
  }
  for (int k = 0; k < kOut; ++k) out[k] = static_cast<int32_t>(sum[k]);
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Stage g = staging(s);
  const Runs<int16_t> runs(s, g);
  const int64_t pitch = window_elements(s), group_out = s.group_out();
  const int64_t pixel_bytes = g.lanes * 2, group_bytes = g.columns * pixel_bytes;
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < s.out_w; ++x) {
      const uint8_t* window =
          static_cast<const uint8_t*>(staged) + y * s.stride_h * g.row_bytes + x * s.stride_w * pixel_bytes;
      const int16_t* w = static_cast<const int16_t*>(packed);
      int32_t* to = out + (y * s.out_w + x) * s.out_c;
      for (int64_t group = 0; group < s.groups; ++group, window += group_bytes) {
        int64_t o = 0;
        for (; o + 4 <= group_out; o += 4, w += 4 * pitch, to += 4) dot<4>(runs, window, w, pitch, to);
        for (; o < group_out; ++o, w += pitch, ++to) dot<1>(runs, window, w, pitch, to);
      }
    }
}

constexpr ConvKernel kConv = {"generic", packed_bytes, pack, staged_row_bytes, stage, run};

const ConvKernel* pick_conv(const ConvShape&) { return &kConv; }
const char* lacks() { return nullptr; }
bool supported() { return true; }

}  // namespace

extern const Kernels kGenericKernels;
const Kernels kGenericKernels = {
    "generic",
    supported,
    pick_conv,
    {{requant<uint8_t, uint8_t>, requant<uint8_t, int8_t>, requant<uint8_t, int32_t>},
     {requant<int8_t, uint8_t>, requant<int8_t, int8_t>, requant<int8_t, int32_t>},
     {requant<int32_t, uint8_t>, requant<int32_t, int8_t>, requant<int32_t, int32_t>}},
    add,
    {clip<uint8_t>, clip<int8_t>, clip<int32_t>},
    {max_pool<uint8_t>, max_pool<int8_t>, max_pool<int32_t>},
    {sum_pool<uint8_t, int32_t>, sum_pool<int8_t, int32_t>, sum_pool<int32_t, int32_t>},
    {sum_pool<uint8_t, uint8_t>, sum_pool<int8_t, int8_t>, nullptr},
    false,
    &kGenericTraining,
    &kGenericProducts,
    lacks,
    [] { return &kGenericLimits; },
};

}  // namespace bitstrata
