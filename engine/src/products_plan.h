// A product as convolutions by the inference kernels, and their execution; see products_conv.cc.
//
// A product is one or several phases, each a stride-1 part of the output's positions (only the gradient of a strided
// convolution has more than one); a phase is one or several parts, convolutions whose sums are shifted and added.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/products.h"
#include "workspace.h"

namespace bitstrata {

// Buffers of the shared workspace.
enum SharedBuffer { kPackedBuffer, kWeightsBuffer };

// One convolution of (a part of the channels of) each image.
struct Part {
  ConvShape shape;
  WeightCodes weights{};
  const ConvKernel* kernel = nullptr;
  int64_t packed_at = 0;
  int64_t row_bytes = 0;  // staged; 0: none
  int64_t crop_y = 0, crop_x = 0;
  int64_t map_w = 0, map_c = 0;         // of the image
  std::vector<int64_t> channels;        // of the image, those that are convolved; empty: all
  std::vector<uint8_t> factors;         // of the convolved channels, repeated; empty: none
  std::vector<uint8_t> weight_factors;  // of the convolved channels; empty: none
  int64_t period = 0;
  int shift = 0;  // of the sum before this part is added

  bool as_it_is() const { return channels.empty() && factors.empty() && crop_x == 0 && map_w == shape.in_w; }
};

// Positions y0 + stride_h * i, x0 + stride_w * j of the output.
struct Phase {
  std::vector<Part> parts;
  int64_t y0 = 0, x0 = 0, stride_h = 1, stride_w = 1;
  int64_t out_h = 0, out_w = 0;
  int shift = 0;  // of the sum of all parts
  bool whole() const { return stride_h == 1 && stride_w == 1; }
};

// How the shifts of the channels are distributed.
struct Shifts {
  std::vector<int> codes, weights, sums;  // (channels,) each, or empty: 0
  int most_codes = 0, most_weights = 0;
};

// A convolution before its channels are divided.
struct Plan {
  const Kernels& kernels;
  ProductCodes x;
  int64_t in_c, out_c, groups;
  int32_t w_lo, w_hi;
  Shifts shifts;
  std::vector<Phase> phases;
  Workspace& shared;
};

// A plan without phases: of weights w, so many.
Plan make_plan(const Kernels&, int threads, const ProductCodes& x, int64_t in_c, int64_t out_c, int64_t groups,
               const int8_t* w, int64_t weights, Workspace& shared);

// Adds a phase: `shape` has all extents; channels, bounds and kernel are set here.
void add_phase(Plan*, Phase, const ConvShape& shape, int64_t crop_y, int64_t crop_x, int64_t map_w, const WeightCodes&);

// Packs the weights of all phases, after the last was added.
void pack(Plan*, int threads);

// What a plan is executed on.
struct Maps {
  const Plan& plan;
  int64_t images, in_h, in_w, out_h, out_w;
  ProductResult result;
};

// Computes the results of all maps, which share the channels of `plan`; least and largest sums, if any, go to `result`.
void execute(int threads, const Plan& plan, const std::vector<Maps>&, const ProductResult& result);

}  // namespace bitstrata
