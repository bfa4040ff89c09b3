// Loops that are unrolled before anything else, so that arrays of vectors become registers. See pointwise.h for the
// unnamed namespace.
#pragma once

#include <type_traits>
#include <utility>

namespace bitstrata {
namespace {

template <typename F, int... kIndices>
inline void each_of(const F& f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}

// f(0), f(1), ... f(kCount - 1), each index a constant.
template <int kCount, typename F>
inline void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace bitstrata
