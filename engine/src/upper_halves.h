// Vector registers as other libraries leave them.
#pragma once

namespace bitstrata {

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx"))) inline void zero_upper_halves() { __builtin_ia32_vzeroupper(); }

// Some libraries return with the upper halves of vector registers in use. Until these are cleared, processors make the
// SSE instructions of portable code wait for them: it then takes several times as long.
inline void clear_upper_halves() {
  if (__builtin_cpu_supports("avx")) zero_upper_halves();
}
#else
inline void clear_upper_halves() {}
#endif

}  // namespace bitstrata
