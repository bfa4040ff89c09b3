// A product's shape as kernels of convolutions take it.
#pragma once

#include "bitstrata/kernels.h"
#include "bitstrata/products.h"

namespace bitstrata {

inline ConvShape conv_shape(const ProductShape& s) {
  ConvShape c{};
  c.in_h = s.in_h, c.in_w = s.in_w, c.in_c = s.in_c;
  c.out_h = s.out_h, c.out_w = s.out_w, c.out_c = s.out_c;
  c.kernel_h = s.kernel_h, c.kernel_w = s.kernel_w;
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.pad_top = s.pad_top, c.pad_left = s.pad_left;
  c.groups = s.groups;
  return c;
}

}  // namespace bitstrata
