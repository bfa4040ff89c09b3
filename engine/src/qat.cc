// Quantization-aware training, over all rows of a tensor; see bitstrata/qat.h.
#include "bitstrata/qat.h"

#include "quantize_rows.h"

namespace bitstrata {
namespace {

size_t bytes_of(QatType t) { return t == QatType::i32 || t == QatType::f32 ? 4 : 2; }

const void* at_element(const void* p, QatType t, int64_t i) {
  return p == nullptr ? nullptr : static_cast<const uint8_t*>(p) + bytes_of(t) * static_cast<size_t>(i);
}
void* at_element(void* p, QatType t, int64_t i) {
  return static_cast<uint8_t*>(p) + bytes_of(t) * static_cast<size_t>(i);
}

std::vector<float> wide(const float* channels, int64_t count, int64_t period) {
  return repeated(std::vector<float>(channels, channels + count), period);
}

// A tensor with what belongs to its channels repeated.
struct Input {
  Input(const Rows& r, const QatTensor& t)
      : tensor(t),
        period(period_of(r.channels)),
        scale(wide(t.scale, r.channels, period)),
        offset(wide(t.offset, r.channels, period)),
        line{scale.data(), offset.data(), t.floor} {}
  const void* from(int64_t i) const { return at_element(tensor.data, tensor.type, i); }
  size_t kind() const { return static_cast<size_t>(tensor.type); }
  QatPass pass(const QatRule& rule) const {
    QatPass p = rule;
    p.line = line;
    return p;
  }

  const QatTensor& tensor;
  int64_t period;
  std::vector<float> scale, offset;
  QatLine line;
};

QatGradient moved(const QatGradient& g, QatType real, int64_t i) {
  return {at_element(g.g, real, i), at_element(g.add, real, i)};
}

// Calls body(block, first element, number of elements) for blocks that depend on the tensor's size alone.
int64_t rows_of_block(const Rows& r) {
  constexpr int64_t kElements = 1 << 16;
  const int64_t repeats = period_of(r.channels) / r.channels;
  return std::max<int64_t>(kElements / r.channels / repeats, 1) * repeats;
}
int64_t blocks_of(const Rows& r) { return (r.rows + rows_of_block(r) - 1) / rows_of_block(r); }

template <typename Body>
void each_block(const Rows& r, const Body& body) {
  const int64_t rows = rows_of_block(r);
  parallel_for(r.threads, blocks_of(r), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * rows, last = std::min(r.rows, first + rows);
      body(block, first * r.channels, (last - first) * r.channels);
    }
  });
}

// Sums of blocks, (period,) each, added in the order of the blocks to (channels,).
std::vector<double> total(const std::vector<double>& parts, int64_t period, int64_t channels) {
  std::vector<double> all(static_cast<size_t>(period), 0.0);
  for (size_t i = 0; i < parts.size(); ++i) all[i % all.size()] += parts[i];
  return folded_sum(all, channels);
}

double total_of(const std::vector<double>& channels) {
  double all = 0;
  for (double x : channels) all += x;
  return all;
}

}  // namespace

void qat_codes(const Rows& r, const QatTensor& x, QatLevels levels, uint8_t* out) {
  const Input in(r, x);
  const auto run = r.kernels.training->qat.codes[in.kind()];
  each_block(r, [&](int64_t, int64_t at, int64_t n) { run(in.from(at), n, in.period, in.line, levels, out + at); });
}

void qat_code_values(const Rows& r, const QatTensor& x, QatLevels levels, QatType real, void* out) {
  const Input in(r, x);
  const auto run = r.kernels.training->qat.code_values[in.kind()][real_index(real)];
  each_block(r, [&](int64_t, int64_t at, int64_t n) {
    run(in.from(at), n, in.period, in.line, levels, at_element(out, real, at));
  });
}

void qat_values(const Rows& r, const QatTensor& x, QatType real, const void* add, void* out) {
  const Input in(r, x);
  const auto run = r.kernels.training->qat.values[in.kind()][real_index(real)];
  each_block(r, [&](int64_t, int64_t at, int64_t n) {
    run(in.from(at), n, in.period, in.line, at_element(add, real, at), at_element(out, real, at));
  });
}

QatChannelSums qat_gradient_sums(const Rows& r, const QatTensor& x, const QatRule& rule, QatType real,
                                 const QatGradient& g, const float* center) {
  const Input in(r, x);
  const QatPass pass = in.pass(rule);
  const auto run = r.kernels.training->qat.gradient_sums[in.kind()][real_index(real)];
  const std::vector<float> centers = wide(center, r.channels, in.period);
  const size_t period = static_cast<size_t>(in.period);
  std::vector<double> parts[3];
  for (auto& p : parts) p.assign(period * static_cast<size_t>(blocks_of(r)), 0.0);
  each_block(r, [&](int64_t block, int64_t at, int64_t n) {
    const size_t mine = static_cast<size_t>(block) * period;
    run(in.from(at), n, in.period, pass, moved(g, real, at),
        {centers.data(), parts[0].data() + mine, parts[1].data() + mine, parts[2].data() + mine});
  });
  return {total(parts[0], in.period, r.channels), total(parts[1], in.period, r.channels),
          total_of(total(parts[2], in.period, r.channels))};
}

void qat_gradient(const Rows& r, const QatTensor& x, const QatRule& rule, QatType real, const QatGradient& g,
                  const QatBackward& line, void* out) {
  const Input in(r, x);
  const QatPass pass = in.pass(rule);
  const auto run = r.kernels.training->qat.gradient[in.kind()][real_index(real)];
  const std::vector<float> factor = wide(line.factor, r.channels, in.period),
                           constant = wide(line.constant, r.channels, in.period),
                           slope = wide(line.slope, r.channels, in.period),
                           center = wide(line.center, r.channels, in.period);
  const QatBackward by{factor.data(), constant.data(), slope.data(), center.data()};
  each_block(r, [&](int64_t, int64_t at, int64_t n) {
    run(in.from(at), n, in.period, pass, moved(g, real, at), by, at_element(out, real, at));
  });
}

double qat_pass(const Rows& r, const QatTensor& x, const QatRule& rule, QatType real, const QatGradient& g, void* out) {
  const Input in(r, x);
  const QatPass pass = in.pass(rule);
  const auto run = r.kernels.training->qat.pass[in.kind()][real_index(real)];
  const size_t period = static_cast<size_t>(in.period);
  std::vector<double> parts(period * static_cast<size_t>(blocks_of(r)), 0.0);
  each_block(r, [&](int64_t block, int64_t at, int64_t n) {
    run(in.from(at), n, in.period, pass, moved(g, real, at), parts.data() + static_cast<size_t>(block) * period,
        at_element(out, real, at));
  });
  return total_of(total(parts, in.period, r.channels));
}

void qat_max_pool(const Rows& r, const QatTensor& x, const PoolMap& s, int64_t images, QatType real, void* out,
                  uint8_t* places) {
  const Input in(r, x);
  const auto run = r.kernels.training->qat.max_pool[in.kind()][real_index(real)];
  parallel_for(r.threads, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(in.from(i * s.in_size()), s, in.line, at_element(out, real, i * s.out_size()), places + i * s.out_size());
  });
}

void qat_max_pool_gradient(const Kernels& kernels, int threads, const PoolMap& s, int64_t images, QatType real,
                           const void* gradient, const uint8_t* places, void* out) {
  const auto run = kernels.training->qat.max_pool_gradient[real_index(real)];
  parallel_for(threads, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(at_element(gradient, real, i * s.out_size()), places + i * s.out_size(), s,
          at_element(out, real, i * s.in_size()));
  });
}

}  // namespace bitstrata
