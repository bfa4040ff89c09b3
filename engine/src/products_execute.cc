// Execution of a product's plan, rows of sums at a time.
#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "products.h"
#include "products_plan.h"

namespace bitstrata {
namespace {

enum Own { kPrepared, kStaged, kAcc, kPartial };  // buffers of each thread's workspace

constexpr int64_t kUnitBytes = 192 * 1024;  // of sums computed at a time: they and what they are made of stay in cache

template <typename T>
T* moved(T* p, int64_t elements) {  // p may be outside of the memory it will be used for
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) +
                              static_cast<uintptr_t>(elements * static_cast<int64_t>(sizeof(T))));
}

// Copies what a part convolves of rows [begin, end) of its (cropped) map; `to` is where row 0 would be.
void prepare(const Kernels& kernels, const Part& part, const uint8_t* image, int64_t begin, int64_t end, uint8_t* to) {
  const ConvShape& s = part.shape;
  const int64_t row = s.in_w * s.in_c;
  if (part.channels.empty() && part.crop_x == 0 && part.map_w == s.in_w) {
    const uint8_t* from = image + (begin + part.crop_y) * row;
    kernels.products->multiply_codes(from, part.factors.data(), moved(to, begin * row), (end - begin) * row,
                                     static_cast<int64_t>(part.factors.size()));
    return;
  }
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.in_w; ++x) {
      const uint8_t* from = image + ((y + part.crop_y) * part.map_w + x + part.crop_x) * part.map_c;
      uint8_t* at = moved(to, y * row + x * s.in_c);
      for (int64_t c = 0; c < s.in_c; ++c) {
        const uint8_t code = part.channels.empty() ? from[c] : from[part.channels[static_cast<size_t>(c)]];
        at[c] = part.factors.empty() ? code : static_cast<uint8_t>(code * part.factors[static_cast<size_t>(c)]);
      }
    }
}

// Output rows [begin, end) of one part; `out` is where row 0 would be.
void run_part(const Kernels& kernels, const Part& part, const uint8_t* packed, const uint8_t* image, int64_t begin,
              int64_t end, Workspace& own, int32_t* out) {
  const ConvShape& s = part.shape;
  const int64_t first = begin * s.stride_h, last = (end - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t map_first = std::clamp<int64_t>(first - s.pad_top, 0, s.in_h);
  const int64_t map_last = std::clamp<int64_t>(last - s.pad_top, map_first, s.in_h);
  const int64_t row = s.in_w * s.in_c;
  const uint8_t* from = image + part.crop_y * row;
  if (!part.as_it_is()) {
    uint8_t* prepared = moved(own.get(kPrepared, 0), -map_first * row);
    prepare(kernels, part, image, map_first, map_last, prepared);
    from = prepared;
  }
  fetch_ahead(image + (part.crop_y + map_first) * part.map_w * part.map_c,
              (map_last - map_first) * part.map_w * part.map_c);
  const uint8_t* packed_part = packed + part.packed_at;
  if (part.row_bytes == 0) return part.kernel->run(s, packed_part, from, out, begin, end);
  uint8_t* staged = moved(own.get(kStaged, 0), -first * part.row_bytes);
  part.kernel->stage(s, packed_part, from, staged, first, last);
  part.kernel->run(s, packed_part, staged, out, begin, end);
}

// The loop over all units of work: an image's rows of sums at a time.
class Execution {
 public:
  explicit Execution(const Maps& m)
      : plan_(m.plan),
        images_(m.images),
        in_size_(m.in_h * m.in_w * m.plan.in_c),
        out_h_(m.out_h),
        out_row_(m.out_w * m.plan.out_c),
        out_w_(m.out_w),
        result_(m.result),
        rows_(rows_of_unit()),
        units_of_image_((m.out_h + rows_ - 1) / rows_) {}

  int64_t units() const { return images_ * units_of_image_; }

  void reserve(Workspace& own) const {
    int64_t prepared = 0, staged = 0, partial = 0;
    for (const Phase& phase : plan_.phases)
      for (const Part& part : phase.parts) {
        const ConvShape& s = part.shape;
        const int64_t rows = std::min(rows_, s.out_h);
        const int64_t in_rows = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
        if (!part.as_it_is()) prepared = std::max(prepared, std::min(in_rows, s.in_h) * s.in_w * s.in_c);
        staged = std::max(staged, in_rows * part.row_bytes);
        if (!phase.whole() || phase.parts.size() > 1) partial = std::max(partial, 2 * rows * s.out_w * s.out_c * 4);
      }
    own.get(kPrepared, prepared);
    own.get(kStaged, staged);
    own.get(kPartial, partial);
    own.get(kAcc, result_.acc == nullptr ? rows_ * out_row_ * 4 : 0);
  }

  // lo, hi: (channels,) of this thread, or null.
  void run(int64_t unit, int thread, Workspace& own, int32_t* lo, int32_t* hi) const {
    const int64_t image = unit / units_of_image_, begin = unit % units_of_image_ * rows_;
    const int64_t end = std::min(begin + rows_, out_h_);
    const int64_t at = image * out_h_ * out_row_, here = at + begin * out_row_;
    int32_t* acc = result_.acc != nullptr ? result_.acc + at
                                          : moved(reinterpret_cast<int32_t*>(own.get(kAcc, 0)), -begin * out_row_);
    const uint8_t* from = static_cast<const uint8_t*>(plan_.x.data) + image * in_size_;
    int32_t* rows = moved(acc, begin * out_row_);
    if (plan_.phases.size() == 1 && plan_.phases[0].whole()) {
      run_phase(plan_.phases[0], from, begin, end, own, acc);
    } else {
      std::memset(rows, 0, static_cast<size_t>((end - begin) * out_row_) * 4);
      for (const Phase& phase : plan_.phases) scatter(phase, from, own, acc);
    }
    const int64_t pixels = (end - begin) * out_w_;
    const ProductKernels& loops = *plan_.kernels.products;
    if (lo != nullptr) loops.bounds(rows, pixels, plan_.out_c, lo, hi);
    if (result_.values != nullptr)
      loops.scale(rows, result_.factor, result_.bias, result_.values + here, pixels, plan_.out_c);
    if (result_.reader != nullptr) result_.reader->read(thread, rows, result_.first + here, pixels * plan_.out_c);
  }

 private:
  int64_t rows_of_unit() const {
    if (plan_.phases.size() != 1 || !plan_.phases[0].whole()) return out_h_;
    const ConvShape& s = plan_.phases[0].parts[0].shape;
    const int64_t overlap = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
    return std::min(out_h_, std::max({kUnitBytes / (out_row_ * 4), 3 * overlap, int64_t{1}}));
  }

  void run_phase(const Phase& phase, const uint8_t* image, int64_t begin, int64_t end, Workspace& own,
                 int32_t* out) const {
    const uint8_t* packed = plan_.shared.get(kPackedBuffer, 0);
    for (size_t i = 0; i < phase.parts.size(); ++i) {
      const Part& part = phase.parts[i];
      if (i == 0) {
        run_part(plan_.kernels, part, packed, image, begin, end, own, out);
        continue;
      }
      const int64_t row = out_row_of(phase), count = (end - begin) * row;
      int32_t* partial = moved(reinterpret_cast<int32_t*>(own.get(kPartial, 0)), phase.whole() ? 0 : count);
      run_part(plan_.kernels, part, packed, image, begin, end, own, moved(partial, -begin * row));
      plan_.kernels.products->shift_add(moved(out, begin * row), partial, count, part.shift);
    }
    if (phase.shift == 0) return;
    const int64_t row = out_row_of(phase);
    uint32_t* sums = reinterpret_cast<uint32_t*>(moved(out, begin * row));
    for (int64_t i = 0; i < (end - begin) * row; ++i) sums[i] <<= phase.shift;
  }
  int64_t out_row_of(const Phase& phase) const { return phase.out_w * plan_.out_c; }

  // All rows of a phase into their places of the output.
  void scatter(const Phase& phase, const uint8_t* image, Workspace& own, int32_t* out) const {
    int32_t* sums = reinterpret_cast<int32_t*>(own.get(kPartial, 0));
    run_phase(phase, image, 0, phase.out_h, own, sums);
    for (int64_t y = 0; y < phase.out_h; ++y)
      for (int64_t x = 0; x < phase.out_w; ++x, sums += plan_.out_c)
        std::memcpy(out + (phase.y0 + y * phase.stride_h) * out_row_ + (phase.x0 + x * phase.stride_w) * plan_.out_c,
                    sums, static_cast<size_t>(plan_.out_c) * 4);
  }

  const Plan& plan_;
  int64_t images_, in_size_, out_h_, out_row_, out_w_;
  ProductResult result_;
  int64_t rows_, units_of_image_;
};

}  // namespace

void execute(int threads, const Plan& plan, const std::vector<Maps>& maps, const ProductResult& result) {
  const bool bounds = result.lo != nullptr || result.hi != nullptr;
  const std::vector<Execution> executions(maps.begin(), maps.end());
  const size_t channels = static_cast<size_t>(plan.out_c);
  Workspaces own(std::max(threads, 1));
  std::vector<std::vector<int32_t>> lo, hi;
  for (int i = 0; i < own.count(); ++i) {
    for (const Execution& e : executions) e.reserve(own[i]);
    lo.emplace_back(bounds ? channels : 0, INT32_MAX);
    hi.emplace_back(bounds ? channels : 0, INT32_MIN);
  }
  if (result.reader != nullptr) result.reader->begin(own.count());
  for (const Execution& e : executions)
    parallel_for(threads, e.units(), 1, [&](int64_t begin, int64_t end) {
      const int mine = own.take();
      const size_t i = static_cast<size_t>(mine);
      for (int64_t unit = begin; unit < end; ++unit)
        e.run(unit, mine, own[mine], bounds ? lo[i].data() : nullptr, bounds ? hi[i].data() : nullptr);
      own.give(mine);
    });
  for (size_t c = 0; bounds && c < channels; ++c) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (const auto& each : lo) least = std::min(least, each[c]);
    for (const auto& each : hi) most = std::max(most, each[c]);
    if (result.lo != nullptr) result.lo[c] = least;
    if (result.hi != nullptr) result.hi[c] = most;
  }
}

}  // namespace bitstrata
