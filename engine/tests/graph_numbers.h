// A graph as a list of int64: what test programs are recorded in. In order: the input's h, w, c, dtype, lo, hi; the
// number of operations; of each its kind, its first input, and what `append` reads. DType and Kind are given by their
// value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bitstrata/graph.h"

namespace bitstrata::test {

enum class Kind : int64_t { conv, requant, add, clip, max_pool, sum_pool, sum_codes, slice, pad, flatten };

class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& all) : all_(all) {}
  int64_t next() { return all_.at(at_++); }
  template <typename T>
  std::vector<T> take(int64_t count) {
    std::vector<T> some;
    for (int64_t i = 0; i < count; ++i) some.push_back(static_cast<T>(next()));
    return some;
  }
  template <size_t kCount>
  std::array<int64_t, kCount> array() {
    std::array<int64_t, kCount> some;
    for (int64_t& n : some) n = next();
    return some;
  }
  bool at_end() const { return at_ == all_.size(); }

 private:
  const std::vector<int64_t>& all_;
  size_t at_ = 0;
};

inline void append_input(Numbers& n, Graph& g) {
  const auto shape = n.array<3>();
  const DType dtype = static_cast<DType>(n.next());
  const int64_t lo = n.next(), hi = n.next();
  g.input({shape[0], shape[1], shape[2]}, dtype, lo, hi);
}

inline int append_conv(Numbers& n, const std::string& name, int x, Graph& g) {
  const auto dims = n.array<4>();
  const int64_t mul = n.next(), add = n.next();
  const Pair stride = n.array<2>();
  const Sides padding = n.array<4>();
  const Pair dilation = n.array<2>();
  const int64_t groups = n.next(), ins = dims[1] * groups;
  const auto codes = n.take<int8_t>(dims[0] * dims[1] * dims[2] * dims[3]);
  const auto pad = n.take<int32_t>(ins);
  return g.conv(name, x, {codes.data(), dims, pad.data(), ins, mul, add, stride, padding, dilation, groups});
}

inline int append_requant(Numbers& n, const std::string& name, int x, Graph& g) {
  const DType dtype = static_cast<DType>(n.next());
  const int64_t lo = n.next(), hi = n.next(), channels = n.next();
  const auto multiplier = n.take<int32_t>(channels);
  const auto bias = n.take<int64_t>(channels);
  const auto shift = n.take<uint8_t>(channels);
  return g.requant(name, x, {multiplier.data(), bias.data(), shift.data(), channels, lo, hi, dtype});
}

inline PoolParams pool_params(Numbers& n) {
  const Pair kernel = n.array<2>(), stride = n.array<2>();
  return {kernel, stride, n.array<4>()};
}

// The next operation.
inline int append(Numbers& n, Graph& g) {
  const std::string name = "value " + std::to_string(g.values());
  const Kind kind = static_cast<Kind>(n.next());
  const int x = static_cast<int>(n.next());
  switch (kind) {
    case Kind::conv:
      return append_conv(n, name, x, g);
    case Kind::requant:
      return append_requant(n, name, x, g);
    case Kind::add: {
      const auto [other, shift_a, shift_b] = n.array<3>();
      return g.add(name, x, static_cast<int>(other), shift_a, shift_b);
    }
    case Kind::clip: {
      const auto [lo, hi] = n.array<2>();
      return g.clip(name, x, lo, hi);
    }
    case Kind::max_pool:
      return g.max_pool(name, x, pool_params(n));
    case Kind::sum_pool: {
      const PoolParams pool = pool_params(n);
      return g.sum_pool(name, x, pool, n.next());
    }
    case Kind::sum_codes:
      return g.sum_codes(name, x, pool_params(n));
    case Kind::slice: {
      const Triple h = n.array<3>(), w = n.array<3>();
      return g.slice(name, x, h, w, n.array<3>());
    }
    case Kind::pad: {
      const Pair h = n.array<2>(), w = n.array<2>();
      return g.pad(name, x, h, w, n.array<2>());
    }
    case Kind::flatten:
      return g.flatten(name, x);
  }
  throw std::invalid_argument(name + ": no kind of operation has this number");
}

// Everything but `finish`.
inline void append_all(Numbers& n, Graph& g) {
  append_input(n, g);
  for (int64_t left = n.next(); left > 0; --left) append(n, g);
}

}  // namespace bitstrata::test
