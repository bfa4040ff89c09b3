// What memory gives at best, in vectors of kBytes bytes, and what keeps a compiler from computing less than it is told.
// See pointwise.h for the unnamed namespace.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

template <int kBytes>
struct Vector {
  typedef uint64_t Type __attribute__((vector_size(kBytes)));
};

// Somebody may read what `p` points to.
inline void keep(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

constexpr int64_t kStreams = 4;  // vectors in flight, so that no addition waits for the one before

// bytes: a multiple of 64, as are the addresses; what is left of the last kStreams vectors is not read.
template <int kBytes>
void read_memory(const void* from, int64_t bytes) {
  using V = typename Vector<kBytes>::Type;
  const V* x = static_cast<const V*>(from);
  V sum[kStreams] = {};
  for (int64_t i = 0; i + kStreams <= bytes / kBytes; i += kStreams)
    for (int64_t j = 0; j < kStreams; ++j) sum[j] ^= x[i + j];
  keep(sum);
}

template <int kBytes>
void copy_memory(const void* from, void* to, int64_t bytes) {
  using V = typename Vector<kBytes>::Type;
  const V* x = static_cast<const V*>(from);
  V* y = static_cast<V*>(to);
  for (int64_t i = 0; i < bytes / kBytes; ++i) {
    y[i] = ~x[i];  // a plain copy would become a call of the C library's
  }
  keep(to);
}

}  // namespace
}  // namespace bitstrata
