#include "requant_short.h"

#include <algorithm>
#include <limits>

namespace bitstrata {
namespace {

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
    Wide inside, outside;
    if (!f.step(level, &inside, &outside)) continue;
    at_least(inside, level);
    below(outside, level);
  }
  for (const int64_t end : {g->from, g->to}) {  // no result beyond the exact one's
    at_least(end, f.at(end));
    below(end, f.at(end) + 1);
  }
  if (least > most) return false;
  g->addend = least + (most - least) / 2;
  return is_int32(g->multiplier * Wide{g->from} + g->addend) && is_int32(g->multiplier * Wide{g->to} + g->addend);
}

bool find(const Exact& f, Short* g) {
  if (f.b < -(int64_t{1} << 62) || f.b > int64_t{1} << 62) return false;  // the 64-bit arithmetic could wrap
  Wide from = Wide{kMost} + 1, to = Wide{kLeast} - 1;
  for (int64_t level = f.lo + 1; f.m != 0 && level <= f.hi; ++level) {
    Wide inside, outside;
    if (!f.step(level, &inside, &outside)) continue;
    from = std::min({from, inside, outside});
    to = std::max({to, inside, outside});
  }
  if (from > to) {
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

ShortRequant::ShortRequant(const RequantArgs& a) {
  if (static_cast<int64_t>(a.hi) - a.lo >= kMostLevels || std::abs(int64_t{a.lo}) > 1024) return;
  const size_t channels = static_cast<size_t>(a.channels);
  for (auto* v : {&from, &to, &multiplier, &addend, &shift}) v->assign(channels, 0);
  in_short.assign((channels + 15) / 16, 1);
  for (size_t c = 0; c < channels; ++c) {
    Short g;
    if (in_short[c / 16] == 0 || !find({a.multiplier[c], a.bias[c], a.shift[c], a.lo, a.hi}, &g)) {
      in_short[c / 16] = 0;
      continue;
    }
    from[c] = static_cast<int32_t>(g.from);
    to[c] = static_cast<int32_t>(g.to);
    multiplier[c] = static_cast<int32_t>(g.multiplier);
    addend[c] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<unsigned __int128>(g.addend)));  // modulo 2^32
    shift[c] = static_cast<int32_t>(g.shift);
  }
}

}  // namespace bitstrata
