// Codes that were just made, as a product takes them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "bitstrata/conv_norm.h"

namespace bitstrata {

inline WeightShape weight_shape(const ProductShape& s) {
  return {s.out_c, s.group_in(), s.kernel_h * s.kernel_w, s.groups};
}

// Codes of a weight, in `buffer` unless they were known, and their scales. Null if it is not finite.
inline const int8_t* quantized(const Kernels& kernels, int threads, const ProductShape& s, const ConvWeight& w,
                               bool by_output, int8_t* buffer, std::vector<float>* scale) {
  const size_t channels = static_cast<size_t>(by_output ? s.out_c : s.in_c);
  if (w.codes != nullptr) {
    scale->assign(w.scale, w.scale + channels);
    return w.codes;
  }
  scale->resize(channels);
  const bool finite =
      weight_codes(kernels, threads, w.data, weight_shape(s), w.bits, by_output, w.scales, buffer, scale->data());
  return finite ? buffer : nullptr;
}

// Codes that were made, and what belongs to them.
struct Made {
  ScaledCodes side;
  std::vector<uint8_t> shift;
  std::vector<double> channel;
};

// What the codes of a grid, at `data`, are to a product. negative: whether some may be.
inline Made made(const ShiftGrid& grid, const ShiftFormat& f, bool negative, const uint8_t* data) {
  const int last = f.groups - 1;
  const int32_t largest = f.largest() << (f.absorb ? last : 0);
  const double scale = static_cast<double>(grid.scale), unit = std::ldexp(scale, -last);
  Made out;
  out.channel.assign(grid.exponents.size(), unit);
  if (!f.absorb)
    for (size_t i = 0; i < out.channel.size(); ++i) {
      out.shift.push_back(static_cast<uint8_t>(last - grid.exponents[i]));
      out.channel[i] = std::ldexp(scale, -grid.exponents[i]);
    }
  out.side = {{data, negative ? DType::s8 : DType::u8, negative ? -largest : 0, largest,
               out.shift.empty() ? nullptr : out.shift.data()},
              unit,
              out.channel.data()};
  return out;
}

// What a unit of the sums stands for in each channel: the factor that makes them floats.
inline std::vector<float> sum_factors(double unit, const std::vector<float>& weight_scale) {
  std::vector<float> out(weight_scale.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(unit * static_cast<double>(weight_scale[i]));
  return out;
}

}  // namespace bitstrata
