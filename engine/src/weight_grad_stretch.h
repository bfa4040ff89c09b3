// How weight gradients cut a batch into blocks of positions, so that what a kernel makes of one stays in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bitstrata/kernels.h"
#include "product_shape.h"

namespace bitstrata {

inline ConvShape weight_grad_shape(const ProductShape& s, const ProductCodes& x) {
  ConvShape c = conv_shape(s);
  c.mul = 1;
  c.input_dtype = x.dtype;
  c.input_lo = x.lo, c.input_hi = x.hi;
  return c;
}

// Equal images, and how they are cut into blocks.
template <typename Gradient>
struct Stretch {
  ConvShape shape;
  int64_t images;
  const uint8_t* x;
  const Gradient* g;
  int64_t rows, together;  // of an image, and images, in a block

  static constexpr int64_t kBlockPixels = 512;  // of a block
  static constexpr int64_t kLeastPixels = 128;  // where sharers would else have none

  Stretch(const ConvShape& s, int64_t images, const uint8_t* x, const Gradient* g, int64_t sharers)
      : shape(s), images(images), x(x), g(g) {
    const int64_t all = images * s.out_h * s.out_w;
    const int64_t pixels = std::clamp((all + sharers - 1) / sharers, kLeastPixels, kBlockPixels);
    rows = std::clamp<int64_t>(pixels / s.out_w, 1, s.out_h);
    together = rows < s.out_h ? 1 : std::clamp<int64_t>(pixels / (s.out_h * s.out_w), 1, images);
  }
  int64_t blocks_of_image() const { return (shape.out_h + rows - 1) / rows; }
  int64_t blocks() const { return (images + together - 1) / together * blocks_of_image(); }
  int64_t block_pixels() const { return together * rows * shape.out_w; }
};

// One block: where its images begin, and which of their output rows are its own.
template <typename Gradient>
struct StretchBlock {
  StretchBlock(const Stretch<Gradient>& part, int64_t block) {
    const ConvShape& s = part.shape;
    const int64_t image = block / part.blocks_of_image() * part.together;
    begin = block % part.blocks_of_image() * part.rows;
    end = std::min(begin + part.rows, s.out_h);
    images = std::min(part.together, part.images - image);
    x = part.x + image * s.in_h * s.in_w * s.in_c;
    g = part.g + image * s.out_h * s.out_w * s.out_c;
  }
  const uint8_t* x;
  const Gradient* g;
  int64_t images, begin, end;
};

// A batch; where no position sees its neighbours, all of them as rows of one image.
template <typename Gradient>
std::vector<Stretch<Gradient>> stretches(const ProductShape& s, const ProductCodes& x, const Gradient* g,
                                         int64_t sharers) {
  constexpr int64_t kMergedWidth = 64;
  const uint8_t* from = static_cast<const uint8_t*>(x.data);
  ConvShape c = weight_grad_shape(s, x);
  if (s.kernel_h != 1 || s.kernel_w != 1 || s.stride_h != 1 || s.stride_w != 1 || s.in_h != s.out_h ||
      s.in_w != s.out_w || s.pad_top != 0 || s.pad_left != 0)
    return {Stretch<Gradient>(c, s.batch, from, g, sharers)};
  std::vector<Stretch<Gradient>> found;
  const int64_t pixels = s.batch * s.in_h * s.in_w, width = std::min(pixels, kMergedWidth), done = pixels / width;
  c.in_h = c.out_h = done;
  c.in_w = c.out_w = width;
  found.emplace_back(c, 1, from, g, sharers);
  if (pixels % width != 0) {
    c.in_h = c.out_h = 1;
    c.in_w = c.out_w = pixels % width;
    found.emplace_back(c, 1, from + done * width * s.in_c, g + done * width * s.out_c, sharers);
  }
  return found;
}

}  // namespace bitstrata
