// Weight gradients: images, or rows of large ones, are divided among threads, each with sums of its own. Where weights
// are many and positions few, output channels are divided instead: sums then never leave the cache.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "bitstrata/products.h"
#include "parallel.h"
#include "products.h"
#include "weight_grad_stretch.h"
#include "workspace.h"

namespace bitstrata {
namespace {

enum Own { kScratch, kSums, kRows };

constexpr int64_t kSliceOuts = 16;                 // output channels of a task, where these are divided
constexpr int64_t kManySums = int64_t{1} << 17;    // from so many on they are; their bytes are those of half a cache
constexpr int64_t kMostPacked = int64_t{1} << 21;  // bytes that each thread may pack of the whole input

constexpr int64_t kReadTogether = 8;   // output channels, whose sums kernels keep together
constexpr int64_t kReadWeights = 512;  // of each, so that their sums stay in the L1 cache
constexpr int64_t kReadChannels = 16;  // input channels come in multiples of these: those of a vector of sums

// The sums of one thread.
struct Sums {
  int32_t* data = nullptr;  // null: none yet
  int64_t pixels = 0;       // summed since they were 0
};

class WeightGrad {
 public:
  using Part = Stretch<int8_t>;

  WeightGrad(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& g, const ProductCodes& x,
             const WeightGradResult& result)
      : kernels_(kernels),
        threads_(std::max(threads, 1)),
        result_(result),
        own_(threads_),
        stretches_(stretches(s, x, static_cast<const int8_t*>(g.data), threads_)) {
    for (Part& part : stretches_) part.shape.code_lo = g.lo, part.shape.code_hi = g.hi;
    shape_ = stretches_[0].shape;
    kernel_ = kernels.products->weight_grad(shape_);
    taps_ = s.kernel_h * s.kernel_w;
    row_ = s.group_in() * taps_;
    most_pixels_ = INT32_MAX / (128 * 255);
    for (const Part& part : stretches_)
      if (part.block_pixels() > most_pixels_)
        fail("conv_weight_grad", "output width is " + str(part.shape.out_w) + ", sums of rows longer than " +
                                     str(most_pixels_) + " may leave int32");
    if (s.batch * s.out_h * s.out_w > most_pixels_) {
      if (result.gw == nullptr) wide_.assign(static_cast<size_t>(s.out_c * row_), 0);
      total_ = result.gw == nullptr ? wide_.data() : result.gw;
      if (result.gw != nullptr) std::fill(total_, total_ + s.out_c * row_, 0);
    }
    by_outputs_ = divides_outputs();
    sums_.resize(static_cast<size_t>(threads_));
    for (int i = 0; i < threads_; ++i) {
      int64_t scratch = by_outputs_ ? whole_bytes() : 0;
      for (const Part& part : stretches_)
        if (!by_outputs_) scratch = std::max(scratch, kernel_->scratch_bytes(part.shape, part.together, part.rows));
      own_[i].get(kScratch, scratch);
      own_[i].get(kSums, kernel_->sums(by_outputs_ ? with_outputs(slice()) : shape_) * 4);
      own_[i].get(kRows, kReadTogether * read_channels() * taps_ * 4);
    }
    if (result.values != nullptr) {
      factors_.resize(static_cast<size_t>(s.groups * row_));
      for (int64_t c = 0; c < s.in_c; ++c) std::fill_n(factors_.begin() + c * taps_, taps_, result.in_factor[c]);
    }
  }

  void run() {
    if (by_outputs_) return run_by_outputs();
    for (const Part& part : stretches_)
      parallel_for(threads_, part.blocks(), 1, [&](int64_t begin, int64_t end) {
        const int i = own_.take();
        for (int64_t block = begin; block < end; ++block) add(part, block, i);
        own_.give(i);
      });
    const int64_t blocks = (shape_.out_c + kReadTogether - 1) / kReadTogether;
    parallel_for(threads_, blocks, std::max<int64_t>(1, 16384 / (kReadTogether * row_)),
                 [&](int64_t begin, int64_t end) {
                   const int i = own_.take();
                   int32_t* rows = reinterpret_cast<int32_t*>(own_[i].get(kRows, 0));
                   for (int64_t block = begin; block < end; ++block) {
                     const int64_t first = block * kReadTogether, last = std::min(first + kReadTogether, shape_.out_c);
                     if (total_ != nullptr || result_.gw != nullptr)
                       finish(first, last);
                     else
                       finish_values(shape_, sums_, {first, last}, first, rows);
                   }
                   own_.give(i);
                 });
  }

 private:
  // Output channels [begin, end).
  struct Outputs {
    int64_t begin, end;
  };

  // The shape with so many output channels alone.
  ConvShape with_outputs(int64_t count) const {
    ConvShape some = shape_;
    some.out_c = count;
    return some;
  }
  int64_t slice() const { return (kSliceOuts + kernel_->outs - 1) / kernel_->outs * kernel_->outs; }
  int64_t whole_bytes() const { return kernel_->scratch_bytes(shape_, stretches_[0].images, shape_.out_h); }

  bool divides_outputs() const {
    return kernel_->outs > 0 && shape_.groups == 1 && stretches_.size() == 1 && total_ == nullptr &&
           result_.gw == nullptr && shape_.out_c * row_ >= kManySums && shape_.out_c >= threads_ * slice() &&
           whole_bytes() <= kMostPacked;
  }

  void run_by_outputs() {
    const Part& part = stretches_[0];
    std::vector<char> packed(static_cast<size_t>(threads_), 0);
    parallel_for(threads_, (shape_.out_c + slice() - 1) / slice(), 1, [&](int64_t begin, int64_t end) {
      const int i = own_.take();
      uint8_t* scratch = own_[i].get(kScratch, 0);
      Sums sums;
      sums.data = reinterpret_cast<int32_t*>(own_[i].get(kSums, 0));
      if (!packed[static_cast<size_t>(i)]) kernel_->pack(shape_, part.x, part.images, 0, shape_.out_h, scratch);
      packed[static_cast<size_t>(i)] = 1;
      for (int64_t task = begin; task < end; ++task) {
        const Outputs some{task * slice(), std::min((task + 1) * slice(), shape_.out_c)};
        const WeightGradBlock block{part.images, 0, shape_.out_h, some.begin, some.end};
        kernel_->add_outs(shape_, part.g, block, scratch, sums.data, true);
        const ConvShape alone = with_outputs(some.end - some.begin);
        for (int64_t o = 0; o < alone.out_c; o += kReadTogether)
          finish_values(alone, {sums}, {o, std::min(o + kReadTogether, alone.out_c)}, some.begin + o,
                        reinterpret_cast<int32_t*>(own_[i].get(kRows, 0)));
      }
      own_.give(i);
    });
  }

  void add(const Part& part, int64_t block, int i) {
    Sums& mine = sums_[static_cast<size_t>(i)];
    if (mine.pixels + part.block_pixels() > most_pixels_) flush(&mine);
    const bool fresh = mine.data == nullptr;
    if (fresh) mine.data = reinterpret_cast<int32_t*>(own_[i].get(kSums, 0));
    const ConvShape& s = part.shape;
    const StretchBlock<int8_t> at(part, block);
    fetch_ahead(at.x + at.begin * s.stride_h * s.in_w * s.in_c,
                at.images * (at.end - at.begin) * s.stride_h * s.in_w * s.in_c);
    fetch_ahead(at.g + at.begin * s.out_w * s.out_c, at.images * (at.end - at.begin) * s.out_w * s.out_c);
    kernel_->add(s, at.x, at.g, at.images, at.begin, at.end, own_[i].get(kScratch, 0), mine.data, fresh);
    mine.pixels += part.block_pixels();
  }

  // Moves sums of a thread that might leave int32 to where they cannot.
  void flush(Sums* sums) {
    if (sums->data == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    kernel_->read(shape_, sums->data, {0, shape_.out_c, 0, shape_.group_in()}, total_, row_, false);
    *sums = Sums();
  }

  // Input channels whose sums are read at a time.
  int64_t read_channels() const {
    return std::max(kReadWeights / taps_ / kReadChannels * kReadChannels, kReadChannels);
  }

  // All results of output channels [begin, end).
  void finish(int64_t begin, int64_t end) {
    int64_t* rows = (total_ != nullptr ? total_ : result_.gw) + begin * row_;
    bool fresh = total_ == nullptr;
    for (const Sums& sums : sums_) {
      if (sums.data == nullptr) continue;
      kernel_->read(shape_, sums.data, {begin, end, 0, shape_.group_in()}, rows, row_, fresh);
      fresh = false;
    }
    for (int64_t o = begin; result_.values != nullptr && o < end; ++o)
      kernels_.products->scale_sums(rows + (o - begin) * row_, result_.out_factor[o],
                                    factors_.data() + o / shape_.group_out() * row_, result_.values + o * row_, row_);
  }

  // The same where only values are asked for, and every sum is within int32. all: sums of the output channels of
  // `shape`, which are those of the whole convolution from `first` on; rows: where sums can be computed.
  void finish_values(const ConvShape& shape, const std::vector<Sums>& all, Outputs some, int64_t first, int32_t* rows) {
    const int64_t ins = shape_.group_in(), together = read_channels();
    for (int64_t i = 0; i < ins; i += together) {
      const WeightBlock block{some.begin, some.end, i, std::min(i + together, ins)};
      const int64_t count = (block.in_end - i) * taps_;
      bool fresh = true;
      for (const Sums& sums : all) {
        if (sums.data == nullptr) continue;
        kernel_->read_short(shape, sums.data, block, rows, count, fresh);
        fresh = false;
      }
      for (int64_t o = first; o < first + some.end - some.begin; ++o)
        kernels_.products->scale_short_sums(rows + (o - first) * count, result_.out_factor[o],
                                            factors_.data() + o / shape_.group_out() * row_ + i * taps_,
                                            result_.values + o * row_ + i * taps_, count);
    }
  }

  const Kernels& kernels_;
  int threads_;
  WeightGradResult result_;
  Workspaces own_;
  std::vector<Part> stretches_;
  ConvShape shape_{};
  const WeightGradKernel* kernel_ = nullptr;
  int64_t taps_ = 0, row_ = 0, most_pixels_ = 0;
  bool by_outputs_ = false;
  std::vector<int64_t> wide_;
  int64_t* total_ = nullptr;  // sums of all threads that were flushed; null if none will be
  std::vector<Sums> sums_;
  std::vector<double> factors_;
  std::mutex mutex_;
};

}  // namespace

void conv_weight_grad(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& g,
                      const ProductCodes& x, const WeightGradResult& result) {
  const char* op = "conv_weight_grad";
  check_product(op, s);
  if (x.dtype == DType::i32) fail(op, "codes are i32, must be u8 or s8");
  if (g.dtype != DType::s8) fail(op, "codes of the gradient must be s8");
  WeightGrad(kernels, threads, s, g, x, result).run();
}

const char* weight_grad_kernel(const Kernels& kernels, const ProductShape& s, DType x_dtype, int32_t lo, int32_t hi,
                               int32_t g_lo, int32_t g_hi) {
  ConvShape c = weight_grad_shape(s, {nullptr, x_dtype, lo, hi});
  c.code_lo = g_lo, c.code_hi = g_hi;
  return kernels.products->weight_grad(c)->name;
}

}  // namespace bitstrata
