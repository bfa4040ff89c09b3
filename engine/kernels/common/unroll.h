// What compilers are told of loops; and loops that are unrolled before anything else, so that arrays of vectors become
// registers. See pointwise.h for the unnamed namespace.
#pragma once

#include <type_traits>
#include <utility>

// What takes or holds arrays of vectors must be inlined, or the arrays live in memory; compilers give up on it where
// much code comes together.
#if defined(__GNUC__)
#define BITSTRATA_INLINE __attribute__((always_inline)) inline
#else
#define BITSTRATA_INLINE inline
#endif

// Before a loop whose steps do not depend on one another: no array that it writes overlaps another.
#ifdef __clang__
#define BITSTRATA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BITSTRATA_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace bitstrata {
namespace {

template <typename F, int... kIndices>
BITSTRATA_INLINE void each_of(const F& f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}

// f(0), f(1), ... f(kCount - 1), each index a constant.
template <int kCount, typename F>
BITSTRATA_INLINE void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace bitstrata
