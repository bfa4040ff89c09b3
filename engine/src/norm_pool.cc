#include <mutex>

#include "bitstrata/quantize.h"
#include "norm_parts.h"

namespace bitstrata {

std::vector<float> Norm::max_pool(const int8_t* codes, bool rectify, const PoolMap& s, float* out,
                                  uint8_t* places) const {
  const Training& k = *rows_.kernels.training;
  const int64_t images = rows_.rows / (s.in_h * s.in_w);
  std::vector<float> most(static_cast<size_t>(s.channels), 0.0f);
  std::mutex mutex;
  parallel_for(rows_.threads, images, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(most.size(), 0.0f);
    for (int64_t i = begin; i < end; ++i)
      k.max_pool(codes + i * s.in_size(), s, affine(rectify), out + i * s.out_size(), places + i * s.out_size(),
                 part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t c = 0; c < most.size(); ++c) most[c] = larger(part[c], most[c]);
  });
  return most;
}

void max_pool_gradient(const Kernels& kernels, int threads, int64_t images, const PoolMap& s, const float* gradient,
                       const uint8_t* places, float* out) {
  parallel_for(threads, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.training->max_pool_gradient(gradient + i * s.out_size(), places + i * s.out_size(), s,
                                          out + i * s.in_size());
  });
}

void keep_maxima(const Kernels& kernels, int threads, int64_t images, const PoolMap& s, const int8_t* codes,
                 const uint8_t* places, int8_t* maxima, uint8_t* signs) {
  parallel_for(threads, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.training->keep_maxima(codes + i * s.in_size(), places + i * s.out_size(), s, maxima + i * s.out_size(),
                                    signs + i * s.sign_bytes());
  });
}

void put_maxima(const Kernels& kernels, int threads, int64_t images, const PoolMap& s, const int8_t* maxima,
                const uint8_t* signs, const uint8_t* places, int8_t* codes) {
  parallel_for(threads, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.training->put_maxima(maxima + i * s.out_size(), signs + i * s.sign_bytes(), places + i * s.out_size(), s,
                                   codes + i * s.in_size());
  });
}

}  // namespace bitstrata
