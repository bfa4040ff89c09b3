// The weight gradient in floats: the batch is cut into shares of blocks, and output channels into slices, by the shape
// alone; threads take one share of one slice after the other, and shares are added in their order.
#include "bitstrata/dispatch.h"
#include "bitstrata/qat_products.h"
#include "parallel.h"
#include "products.h"
#include "weight_grad_stretch.h"
#include "workspace.h"

namespace bitstrata {
namespace {

enum Own { kScratch, kSums, kRows };
enum class Order { first, last, turned };  // of a row's results: taps last; channels last, so read or turned into it

constexpr const char* kOp = "qat_weight_gradient";
constexpr int64_t kSharePixels = 2048;             // at least, so that adding shares takes little
constexpr int64_t kMostShares = 16;                // enough work for so many threads
constexpr int64_t kShareBytes = int64_t{4} << 20;  // of the sums of all shares, where there are several
constexpr int64_t kSliceOuts = 64;                 // so many that packing the codes again for each slice takes little
constexpr int64_t kReadTogether = 8;               // output channels, whose sums kernels keep together

using Part = Stretch<uint16_t>;

class WeightGradient {
 public:
  WeightGradient(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& x, const uint16_t* g)
      : threads_(std::max(threads, 1)), own_(threads_), stretches_(stretches(s, x, g, 1)) {
    shape_ = stretches_[0].shape;
    kernel_ = float_products_of(kernels).weight_grad(shape_);
    const int64_t bytes = kernel_->sums(shape_) * 4;
    int64_t scratch = 0;
    for (const Part& part : stretches_) {
      blocks_ += part.blocks();
      scratch = std::max(scratch, kernel_->scratch_bytes(part.shape, part.together, part.rows));
    }
    shares_ = std::min({s.batch * s.out_h * s.out_w / kSharePixels, kShareBytes / bytes, kMostShares, blocks_});
    shares_ = std::max<int64_t>(shares_, 1);
    slices_ = (s.out_c + kSliceOuts - 1) / kSliceOuts;
    share_bytes_ = (bytes + 63) / 64 * 64;
    sums_ = own_[0].get(kSums, shares_ * share_bytes_);
    for (int i = 0; i < threads_; ++i) own_[i].get(kScratch, scratch);
  }

  void run(const float* factor, bool channels_last, float* out) {
    const Order order = !channels_last ? Order::first : kernel_->read_last != nullptr ? Order::last : Order::turned;
    if (order == Order::turned)
      for (int i = 0; i < threads_; ++i) own_[i].get(kRows, kReadTogether * row() * 4);
    parallel_for(threads_, shares_ * slices_, 1, [&](int64_t begin, int64_t end) {
      const int i = own_.take();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % slices_ * kSliceOuts, last = std::min(first + kSliceOuts, shape_.out_c);
        add(task / slices_, first, last, own_[i].get(kScratch, 0));
        if (shares_ == 1) finish(first, last, factor, order, rows(i), out);  // while sums are cached
      }
      own_.give(i);
    });
    if (shares_ == 1) return;
    parallel_for(threads_, (shape_.out_c + kReadTogether - 1) / kReadTogether, 1, [&](int64_t begin, int64_t end) {
      const int i = own_.take();
      finish(begin * kReadTogether, std::min(end * kReadTogether, shape_.out_c), factor, order, rows(i), out);
      own_.give(i);
    });
  }

 private:
  int64_t row() const { return shape_.in_c * shape_.kernel_h * shape_.kernel_w; }
  float* rows(int i) { return reinterpret_cast<float*>(own_[i].get(kRows, 0)); }
  float* sums(int64_t share) const { return reinterpret_cast<float*>(sums_ + share * share_bytes_); }

  // A share of all blocks, for output channels [out_begin, out_end).
  void add(int64_t share, int64_t out_begin, int64_t out_end, uint8_t* scratch) const {
    const int64_t first = share * blocks_ / shares_, last = (share + 1) * blocks_ / shares_;
    int64_t at = 0;
    for (const Part& part : stretches_) {
      const int64_t count = part.blocks();
      for (int64_t b = std::max(first, at); b < std::min(last, at + count); ++b) {
        const StretchBlock<uint16_t> block(part, b - at);
        kernel_->add(part.shape, block.x, block.g, {block.images, block.begin, block.end, out_begin, out_end}, scratch,
                     sums(share), b == first);
      }
      at += count;
    }
  }

  // The results of output channels [out_begin, out_end). room: for kReadTogether rows that are turned.
  void finish(int64_t out_begin, int64_t out_end, const float* factor, Order order, float* room, float* out) const {
    const int64_t size = row(), taps = size / shape_.in_c;
    for (int64_t first = out_begin; first < out_end; first += kReadTogether) {
      const int64_t last = std::min(first + kReadTogether, out_end);
      float *const to = out + first * size, *const rows = order == Order::turned ? room : to;
      for (int64_t share = 0; share < shares_; ++share)
        if (order == Order::last)
          kernel_->read_last(shape_, sums(share), first, last, rows, share == 0);
        else
          kernel_->read(shape_, sums(share), {first, last, 0, shape_.in_c}, rows, size, share == 0);
      for (int64_t o = first; o < last; ++o)
        scale(rows + (o - first) * size, order == Order::turned ? taps : 1, size, factor[o], to + (o - first) * size);
    }
  }

  // A row times a factor; with several taps, (channels, taps) as (taps, channels).
  static void scale(const float* from, int64_t taps, int64_t size, float factor, float* to) {
    const int64_t channels = size / taps;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) to[t * channels + c] = from[c * taps + t] * factor;
  }

  int threads_;
  Workspaces own_;
  std::vector<Part> stretches_;
  ConvShape shape_{};
  const FloatWeightGradKernel* kernel_ = nullptr;
  int64_t blocks_ = 0, shares_ = 1, slices_ = 1, share_bytes_ = 0;
  uint8_t* sums_ = nullptr;
};

}  // namespace

void qat_weight_gradient(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& x,
                         const uint16_t* g, const float* factor, bool channels_last, float* out) {
  check_product(kOp, s);
  if (s.groups != 1) fail(kOp, "groups is " + str(s.groups) + ", must be 1");
  check_codes(kOp, x, s.in_c);
  if (x.shift != nullptr) fail(kOp, "codes have shifts");
  WeightGradient(kernels, threads, s, x, g).run(factor, channels_last, out);
}

}  // namespace bitstrata
