// Arrays of a training step as the engine's operations take them: rows of channels.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bitstrata/dispatch.h"
#include "bitstrata/quantize.h"

namespace bindings {

namespace nb = nanobind;

using bitstrata::Noise;
using bitstrata::RealTensor;
using bitstrata::Rows;
using bitstrata::ShiftFormat;
using bitstrata::ShiftGrid;

template <typename T, size_t kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t kDims>
using Out = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // rows, channels
using Vector = std::optional<In<float, 1>>;
using NoiseKey = std::optional<std::tuple<uint64_t, uint64_t>>;  // seed, stream
using Grid = std::tuple<float, nb::ndarray<nb::numpy, uint8_t>>;

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

template <typename T>
nb::ndarray<nb::numpy, T> array(const std::vector<T>& values) {
  T* data = new T[values.size() + 1];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  const size_t shape[1] = {values.size()};
  return nb::ndarray<nb::numpy, T>(data, 1, shape, owner);
}

template <typename Array>
Rows rows_of(const std::string& isa, int threads, const Array& x) {
  const Rows rows{bitstrata::select_kernels(isa), threads, static_cast<int64_t>(x.shape(0)),
                  static_cast<int64_t>(x.shape(1))};
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  if (rows.rows < 1 || rows.channels < 1) fail("an array without elements has no range");
  return rows;
}

// float32, bfloat16 as int16, or int32 with `scale`.
inline RealTensor real(const Matrix& x, const Vector& scale) {
  RealTensor t;
  if (x.dtype() == nb::dtype<float>())
    t.f32 = static_cast<const float*>(x.data());
  else if (x.dtype() == nb::dtype<int16_t>())
    t.bf16 = static_cast<const uint16_t*>(x.data());
  else if (x.dtype() == nb::dtype<int32_t>())
    t.i32 = static_cast<const int32_t*>(x.data());
  else
    fail("an array must be float32, bfloat16 (as int16) or int32");
  if (scale.has_value()) {
    if (scale->shape(0) != x.shape(1)) fail("scale must have one element for each channel");
    t.scale = scale->data();
  }
  return t;
}

template <typename Array>
void check_size(const char* name, const Array& a, const Rows& r) {
  if (a.shape(0) != static_cast<size_t>(r.rows) || a.shape(1) != static_cast<size_t>(r.channels))
    fail(std::string(name) + " must have the shape of the tensor, (" + std::to_string(r.rows) + ", " +
         std::to_string(r.channels) + ")");
}

template <typename A, typename B>
void check_same_shape(const char* name, const A& a, const B& other) {
  for (size_t d = 0; d < other.ndim(); ++d)
    if (a.ndim() != other.ndim() || a.shape(d) != other.shape(d))
      fail(std::string(name) + " must have the shape of the pooled images");
}

inline void check_bits(const Out<uint8_t, 1>& bits, const Rows& r) {
  if (bits.shape(0) != static_cast<size_t>((r.elements() + 7) / 8)) fail("bits must have one bit for each element");
}

// Height and width of the input, the window, its stride, and the padding above and to the left.
using PoolWindow =
    std::tuple<std::array<int64_t, 2>, std::array<int64_t, 2>, std::array<int64_t, 2>, std::array<int64_t, 2>>;

// The pooling whose result is `out`, NHWC.
template <typename Array>
bitstrata::PoolMap pool_map(const PoolWindow& w, const Array& out) {
  const auto& [in, kernel, stride, pad] = w;
  const bitstrata::PoolMap s{in[0],
                             in[1],
                             static_cast<int64_t>(out.shape(3)),
                             static_cast<int64_t>(out.shape(1)),
                             static_cast<int64_t>(out.shape(2)),
                             kernel[0],
                             kernel[1],
                             stride[0],
                             stride[1],
                             pad[0],
                             pad[1]};
  const auto reaches = [](int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t results) {
    return size >= 1 && kernel >= 1 && stride >= 1 && pad >= 0 && pad < kernel && results >= 1 &&
           (results - 1) * stride - pad < size;
  };
  if (!reaches(in[0], kernel[0], stride[0], pad[0], s.out_h) ||
      !reaches(in[1], kernel[1], stride[1], pad[1], s.out_w) || kernel[0] * kernel[1] > 256)
    fail("every window must hold a position of the map, and at most 256 in all");
  return s;
}

inline ShiftFormat format(int bits, int groups, bool is_signed, bool absorb, float clip = 1, bool powers = false) {
  if (bits < 2 || bits > 8) fail("bits must be in 2..8, got " + std::to_string(bits));
  if (groups < 1 || groups > 8) fail("groups must be in 1..8, got " + std::to_string(groups));
  if (absorb && bits + groups - 1 > 8)
    fail("codes of " + std::to_string(bits) + " bits have no room for the shifts of " + std::to_string(groups) +
         " groups in 8 bits");
  if (!(clip > 0 && clip <= 1)) fail("clip must be above 0 and at most 1, got " + std::to_string(clip));
  if (powers && (bits > 4 || groups != 1 || !is_signed))
    fail("codes that are powers of two are signed, of 2 to 4 bits in one group");
  ShiftFormat f;
  f.bits = bits, f.groups = groups, f.is_signed = is_signed, f.absorb = absorb, f.clip = clip, f.powers = powers;
  return f;
}

inline std::optional<Noise> noise_of(const NoiseKey& key) {
  if (!key.has_value()) return std::nullopt;
  return Noise{std::get<0>(*key), std::get<1>(*key), 0};
}
inline const Noise* pointer(const std::optional<Noise>& noise) { return noise.has_value() ? &*noise : nullptr; }

inline Grid grid_of(const ShiftGrid& g) { return {g.scale, array(g.exponents)}; }

}  // namespace bindings
