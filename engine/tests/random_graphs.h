// Random graphs, in the numbers of graph_numbers.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "graph_numbers.h"
#include "guarded.h"

namespace bitstrata::test {

class RandomGraph {
 public:
  explicit RandomGraph(uint64_t seed) : random_(seed), large_(seed % 8 == 0), graph_("generic", 1) {
    const DType dtype = below(2) == 0 ? DType::u8 : DType::s8;
    const int64_t most = large_ ? 40 : 12;
    const auto [lo, hi] = code_range(dtype);
    numbers_ = {1 + below(most), 1 + below(most), channels(), static_cast<int64_t>(dtype), lo, hi};
    Numbers input(numbers_);
    append_input(input, graph_);
    sizes_ = {static_cast<double>(std::max<int64_t>(-lo, hi))};
    const int64_t count = 3 + below(8);
    numbers_.push_back(count);
    for (int64_t i = 0; i < count; ++i) grow();
  }
  const std::vector<int64_t>& numbers() const { return numbers_; }

 private:
  int64_t below(int64_t n) { return static_cast<int64_t>((random_.bits() >> 8) % static_cast<uint64_t>(n)); }
  int64_t channels() { return 1 + below(below(4) == 0 ? 70 : 20); }
  const Value& last() const { return graph_.value(graph_.values() - 1); }

  Pair code_range(DType dtype) {
    const int64_t top = (int64_t{1} << (1 + below(8))) - 1;
    return dtype == DType::u8 ? Pair{0, top} : Pair{-(top + 1) / 2, top / 2};
  }

  // One more operation. `size` is what the magnitude of its results may be.
  void emit(Kind kind, std::vector<int64_t> rest, double size) {
    std::vector<int64_t> op = {static_cast<int64_t>(kind), graph_.values() - 1};
    op.insert(op.end(), rest.begin(), rest.end());
    Numbers n(op);
    append(n, graph_);
    numbers_.insert(numbers_.end(), op.begin(), op.end());
    sizes_.push_back(std::max(size, 1.0));
  }

  void grow() {
    const bool codes = last().dtype != DType::i32;
    switch (below(codes ? 10 : 12)) {
      case 0:
        return pool(Kind::max_pool);
      case 1:
        return pool(codes && below(2) == 0 ? Kind::sum_codes : Kind::sum_pool);
      case 2:
        return move();
      case 3:
        return clip();
      case 4:
        return requant();
      case 5:
      case 6:
      case 7:
        return codes ? conv() : add();
      default:
        return codes ? conv() : requant();
    }
  }

  void conv() {
    const Shape in = last().shape;
    const int64_t form = below(3), bits = 1 + below(8), half = int64_t{1} << (bits - 1);
    const int64_t groups = below(4) == 0 ? in.c : below(4) == 0 && in.c % 2 == 0 ? 2 : 1;
    const int64_t out = groups * (groups == in.c && below(2) == 0 ? 1 : 1 + below(groups > 1 ? 4 : 40));
    const int64_t before = below(3), after = below(3);
    const auto kernel = [&](int64_t size) { return 1 + below(std::min<int64_t>(3, size + before + after)); };
    const int64_t kh = kernel(in.h), kw = kernel(in.w), per_group = in.c / groups;
    const int64_t dilation = 2 * (kh - 1) < in.h && 2 * (kw - 1) < in.w ? 1 + below(2) : 1;
    std::vector<int64_t> rest = {out, per_group, kh, kw, form == 0 ? 1 : 1 << form, form == 0 ? 0 : form == 1 ? 1 : 3};
    for (int64_t n : {1 + below(2), 1 + below(2), before, after, before, after, dilation, dilation, groups})
      rest.push_back(n);
    for (int64_t i = 0; i < out * per_group * kh * kw; ++i) rest.push_back(random_.in(-half, half - 1));
    for (int64_t c = 0; c < in.c; ++c) rest.push_back(random_.in(last().lo, last().hi));
    const double weight = static_cast<double>(half << form);
    emit(Kind::conv, rest, std::sqrt(static_cast<double>(per_group * kh * kw)) * weight * sizes_.back());
  }

  // Constants that spread results over the range that they are clamped to, in 32 bits or beyond.
  void requant() {
    const bool fixed = below(3) == 0;
    const DType dtype = fixed ? DType::i32 : below(2) == 0 ? DType::u8 : DType::s8;
    const auto [lo, hi] = fixed ? Pair{-INT32_MAX, INT32_MAX} : code_range(dtype);
    const double top = fixed ? 1e6 : static_cast<double>(hi - lo);
    const int64_t count = last().shape.c;
    std::vector<int64_t> rest = {static_cast<int64_t>(dtype), lo, hi, count}, bias, shifts;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t shift = below(46);
      const double unit = std::ldexp(1.0, static_cast<int>(shift));
      const double ideal = top / sizes_.back() * unit * (0.5 + static_cast<double>(below(100)) / 100);
      const int64_t multiplier = static_cast<int64_t>(std::min(ideal, 2147483647.0));
      rest.push_back(below(3) == 0 ? -multiplier : multiplier);
      bias.push_back(static_cast<int64_t>(static_cast<double>(below(201) - 50) / 100 * top * unit));
      shifts.push_back(shift);
    }
    rest.insert(rest.end(), bias.begin(), bias.end());
    rest.insert(rest.end(), shifts.begin(), shifts.end());
    emit(Kind::requant, rest, top);
  }

  void add() {
    std::vector<int64_t> others;
    for (int v = 0; v < graph_.values(); ++v)
      if (graph_.value(v).dtype == DType::i32 && graph_.value(v).shape == last().shape) others.push_back(v);
    const int64_t other = others[static_cast<size_t>(below(static_cast<int64_t>(others.size())))];
    const int64_t a = below(6) - 2, b = below(6) - 2;
    emit(Kind::add, {other, a, b},
         std::ldexp(sizes_.back(), static_cast<int>(-a)) +
             std::ldexp(sizes_[static_cast<size_t>(other)], static_cast<int>(-b)));
  }

  void clip() {
    const int64_t most = static_cast<int64_t>(std::min(sizes_.back(), 2147483647.0));
    const int64_t low = last().dtype == DType::u8 ? below(3) : -below(most + 1);
    const int64_t lo = std::max<int64_t>(low, lowest(last().dtype));
    const int64_t hi = std::min<int64_t>(lo + 1 + below(most + 1), highest(last().dtype));
    emit(Kind::clip, {lo, hi}, sizes_.back());
  }

  void pool(Kind kind) {
    const Shape in = last().shape;
    const int64_t kh = 1 + below(std::min<int64_t>(in.h, 3)), kw = 1 + below(std::min<int64_t>(in.w, 3));
    const int64_t pad_h = below(kh / 2 + 1), pad_w = below(kw / 2 + 1);
    std::vector<int64_t> rest = {kh, kw, 1 + below(2), 1 + below(2), pad_h, pad_h, pad_w, pad_w};
    if (kind == Kind::sum_pool) rest.push_back(below(4));
    emit(kind, rest, sizes_.back() * static_cast<double>(kind == Kind::max_pool ? 1 : kh * kw));
  }

  void move() {
    const Shape in = last().shape;
    const auto part = [&](int64_t size) {
      const int64_t begin = below(size);
      return Triple{begin, begin + 1 + below(size - begin), 1 + below(2)};
    };
    const int64_t which = below(6);
    if (which == 0 && in.elements() < 300) return emit(Kind::flatten, {}, sizes_.back());
    std::vector<int64_t> rest;
    const bool pads = which < 3 && in.elements() < 20000;
    for (int64_t size : {in.h, in.w, in.c}) {
      const Triple some = pads ? Triple{below(3), below(3), 0} : part(size);
      rest.insert(rest.end(), some.begin(), some.end() - (pads ? 1 : 0));
    }
    emit(pads ? Kind::pad : Kind::slice, rest, sizes_.back());
  }

  Random random_;
  const bool large_;
  Graph graph_;
  std::vector<int64_t> numbers_;
  std::vector<double> sizes_;  // of each value
};

}  // namespace bitstrata::test
