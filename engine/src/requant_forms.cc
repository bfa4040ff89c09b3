#include "requant_forms.h"

#include <algorithm>
#include <limits>

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 16;  // channels of one form
constexpr int kMostLevels = 256;
constexpr int64_t kLeast = std::numeric_limits<int32_t>::min(), kMost = std::numeric_limits<int32_t>::max();

__extension__ typedef __int128 Wide;

Wide floor_div(Wide a, Wide b) { return a / b - (a % b < 0 ? 1 : 0); }  // b > 0
bool is_int32(Wide x) { return x >= kLeast && x <= kMost; }

// out = clamp((m x + b) >> s, lo, hi) of one channel.
struct Exact {
  int64_t m, b, s, lo, hi;

  // The x next to each other between which the result reaches `level`: with at least `level`, and with less.
  // False if no int32 x has the one or the other.
  bool step(int64_t level, Wide* inside, Wide* outside) const {
    const Wide rest = Wide{level} * (Wide{1} << s) - b;  // inside: m x >= rest
    *inside = m > 0 ? -floor_div(-rest, m) : floor_div(-rest, -Wide{m});
    *outside = m > 0 ? *inside - 1 : *inside + 1;
    return is_int32(*inside) && is_int32(*outside);
  }
  int64_t at(int64_t x) const {
    const Wide y = (Wide{m} * x + b) >> s;
    return static_cast<int64_t>(std::min<Wide>(std::max<Wide>(y, lo), hi));
  }
};

// The same of x clamped to from..to, as (multiplier x + addend) >> shift.
struct Short {
  int64_t from, to, multiplier, shift;
  Wide addend;
};

void constant(const Exact& f, Short* g) { *g = {0, 0, 0, 0, f.at(0)}; }

// False if no addend makes the two agree.
bool fit(const Exact& f, Short* g) {
  Wide least = -(Wide{1} << 100), most = Wide{1} << 100;  // of the addend
  const auto at_least = [&](Wide x, int64_t level) {
    least = std::max(least, Wide{level} * (Wide{1} << g->shift) - g->multiplier * x);
  };
  const auto below = [&](Wide x, int64_t level) {
    most = std::min(most, Wide{level} * (Wide{1} << g->shift) - 1 - g->multiplier * x);
  };
  for (int64_t level = f.lo + 1; level <= f.hi; ++level) {
    Wide inside = 0, outside = 0;
    if (!f.step(level, &inside, &outside)) continue;
    at_least(inside, level);
    below(outside, level);
    if (least > most) return false;
  }
  for (const int64_t end : {g->from, g->to}) {  // no result beyond the exact one's
    at_least(end, f.at(end));
    below(end, f.at(end) + 1);
  }
  if (least > most) return false;
  g->addend = least + (most - least) / 2;
  return is_int32(g->multiplier * Wide{g->from} + g->addend) && is_int32(g->multiplier * Wide{g->to} + g->addend);
}

// The least and the largest x at a step; false if there is no step. Steps that no int32 x reaches are at the ends.
bool ends(const Exact& f, Wide* from, Wide* to) {
  Wide inside = 0, outside = 0;
  int64_t first = f.lo + 1, last = f.hi;
  while (f.m != 0 && first <= last && !f.step(first, &inside, &outside)) ++first;
  if (f.m == 0 || first > last) return false;
  *from = std::min(inside, outside), *to = std::max(inside, outside);
  while (!f.step(last, &inside, &outside)) --last;
  *from = std::min({*from, inside, outside}), *to = std::max({*to, inside, outside});
  return true;
}

bool find(const Exact& f, Short* g) {
  if (f.b < -(int64_t{1} << 62) || f.b > int64_t{1} << 62) return false;  // the 64-bit arithmetic could wrap
  Wide from, to;
  if (!ends(f, &from, &to)) {
    constant(f, g);
    return true;
  }
  g->from = static_cast<int64_t>(from);
  g->to = static_cast<int64_t>(to);
  const int64_t tallest = std::max(std::abs(f.lo), std::abs(f.hi)) + 1;
  for (int64_t shift = 30; shift >= 0; --shift) {
    if ((tallest << shift) > kMost) continue;
    const int64_t drop = f.s - shift;  // multiplier = round(m 2^-drop)
    const Wide scaled = drop > 0 ? (Wide{f.m} + (Wide{1} << (drop - 1))) >> drop : Wide{f.m} * (Wide{1} << -drop);
    if (!is_int32(scaled)) continue;
    g->multiplier = static_cast<int64_t>(scaled);
    g->shift = shift;
    if (g->multiplier != 0 && (g->multiplier > 0) == (f.m > 0) && fit(f, g)) return true;
    return false;  // a smaller shift is coarser still
  }
  return false;
}

}  // namespace

RequantForms::RequantForms(const RequantArgs& a, const std::vector<Bounds>& x) {
  const size_t channels = static_cast<size_t>(a.channels), blocks = (channels + kBlock - 1) / kBlock;
  for (auto* v : {&from, &to, &factor, &addend, &places}) v->assign(channels, 0);
  form.assign(blocks, RequantForm::wide);
  for (size_t block = 0; block < blocks; ++block) {
    const size_t first = block * kBlock, last = std::min(first + kBlock, channels);
    if (set_low(a, first, last))
      form[block] = RequantForm::low;
    else if (set_high(a, first, last))
      form[block] = RequantForm::high;
    else if (set_narrow(a, x, first, last))
      form[block] = RequantForm::narrow;
  }
  if (!in_registers() && set_high(a, 0, channels)) form.assign(blocks, RequantForm::high);
}

// False, with some constants set or none, if a channel does not have the form.
bool RequantForms::set_low(const RequantArgs& a, size_t first, size_t last) {
  if (static_cast<int64_t>(a.hi) - a.lo >= kMostLevels || std::abs(int64_t{a.lo}) > 1024) return false;
  for (size_t c = first; c < last; ++c) {
    Short g;
    if (!find({a.multiplier[c], a.bias[c], a.shift[c], a.lo, a.hi}, &g)) return false;
    from[c] = static_cast<int32_t>(g.from);
    to[c] = static_cast<int32_t>(g.to);
    factor[c] = static_cast<int32_t>(g.multiplier);
    addend[c] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<unsigned __int128>(g.addend)));  // modulo 2^32
    places[c] = static_cast<int32_t>(g.shift);
  }
  return true;
}

bool RequantForms::set_high(const RequantArgs& a, size_t first, size_t last) {
  if (std::any_of(a.shift + first, a.shift + last, [](int64_t shift) { return shift < 32; })) return false;
  for (size_t c = first; c < last; ++c) {
    factor[c] = static_cast<int32_t>(a.multiplier[c]);
    places[c] = static_cast<int32_t>(a.shift[c] - 32);
  }
  return true;
}

bool RequantForms::set_narrow(const RequantArgs& a, const std::vector<Bounds>& x, size_t first, size_t last) {
  for (size_t c = first; c < last; ++c) {
    if (a.shift[c] > 32) return false;
    for (const int64_t end : {x[c].lo, x[c].hi}) {
      const Wide sum = Wide{a.multiplier[c]} * end + a.bias[c];
      if (!is_int32(sum >> a.shift[c])) return false;
    }
    factor[c] = static_cast<int32_t>(a.multiplier[c]);
  }
  return true;
}

void RequantForms::give(RequantArgs* a) const {
  a->form = form.data();
  a->from = from.data();
  a->to = to.data();
  a->factor = factor.data();
  a->addend = addend.data();
  a->places = places.data();
}

bool RequantForms::in_registers() const {
  return !form.empty() && (form[0] == RequantForm::low || form[0] == RequantForm::high) &&
         std::count(form.begin(), form.end(), form[0]) == static_cast<std::ptrdiff_t>(form.size());
}

int64_t RequantForms::bytes() const { return static_cast<int64_t>(from.size() * 5 * sizeof(int32_t) + form.size()); }

}  // namespace bitstrata
