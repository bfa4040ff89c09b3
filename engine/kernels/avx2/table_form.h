// What the kernels by tables share: sets of output channels, weights by planes of one bit, and the words that name
// tables. See pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/cell_stage.h"
#include "../common/code_planes.h"
#include "../common/unroll.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 32;         // output channels of a vector
constexpr int64_t kWordCodes = 4;  // inputs of a step
constexpr int64_t kWordBytes = 2;  // where their table is
constexpr int64_t kTableBytes = 16;

// Sizes and positions of everything that is packed: int32 correction[groups][vectors * kLanes]; pad codes, a byte each;
// weights [group][set][plane][step][vector of the set][lane], a byte each. Sets of a group have nearly equal size.
struct Packed {
  // set_vectors: of a set, at most.
  Packed(const ConvShape& s, int set_vectors)
      : form(s),
        cells(s, (form.input_bits + 1) / 2, kWordCodes, kWordBytes),
        vectors((s.group_out() + kLanes - 1) / kLanes),
        sets((vectors + set_vectors - 1) / set_vectors),
        steps(s.kernel_h * cells.per_row * cells.words),
        chunk(form.input_bits == 1 ? 63 : 21),
        pad_at(s.groups * vectors * kLanes * 4),
        weights_at((pad_at + s.in_c + 31) / 32 * 32),
        bytes(weights_at + s.groups * vectors * form.weight_bits * steps * kLanes) {}
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }
  // Where the weights of a set start, which holds vectors [first, ...) of the group.
  int64_t weights_of(int64_t group, int64_t first) const {
    return weights_at + (group * vectors + first) * form.weight_bits * steps * kLanes;
  }

  CodePlanes form;
  Cells cells;
  int64_t vectors, sets;  // of output channels, in each group
  int64_t steps;          // of a window, plane and digit
  int64_t chunk;          // steps whose sums fit a byte
  int64_t pad_at, weights_at, bytes;
};

template <int kSetVectors>
int64_t packed_bytes(const ConvShape& s) {
  return Packed(s, kSetVectors).bytes;
}
template <int kSetVectors>
int64_t staged_row_bytes(const ConvShape& s) {
  return Packed(s, kSetVectors).cells.row_bytes;
}

// The lane of a vector's output channel: widened, those of even bytes and those of odd ones are neighbours.
inline int64_t lane_of(int64_t channel) { return channel < kLanes / 2 ? 2 * channel : 2 * channel - kLanes + 1; }

// Packs the codes (channel, tap) of one output channel; weights: its lane of the first step in the first plane. Returns
// the sum of the codes moved by code_lo.
inline int64_t pack_channel(const ConvShape& s, const Packed& p, const int8_t* codes, int64_t set_vectors,
                            uint8_t* weights) {
  const int64_t pitch = set_vectors * kLanes;
  return visit_weights<kWordCodes>(s, p.cells, codes, [&](int64_t word, const uint8_t* moved) {
    uint32_t four;
    std::memcpy(&four, moved, 4);
    for (int plane = 0; plane < p.form.weight_bits; ++plane)
      weights[(plane * p.steps + word) * pitch] = static_cast<uint8_t>(_pext_u32(four >> plane, 0x01010101));
  });
}

template <int kSetVectors>
void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  const Packed p(s, kSetVectors);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(s.group_out() % kLanes == 0 ? p.weights_at : p.bytes));
  for (int64_t c = 0; c < s.in_c; ++c) base[p.pad_at + c] = static_cast<uint8_t>(pad[c]);
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  const int64_t row = s.group_in() * s.kernel_h * s.kernel_w;
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
      uint8_t* weights = base + p.weights_of(group, first);
      const int64_t end = least(s.group_out(), (first + vectors) * kLanes);
      for (int64_t o = first * kLanes; o < end; ++o)
        correction[group * p.vectors * kLanes + o] =
            p.form.correction(s, pack_channel(s, p, codes + (group * s.group_out() + o) * row, vectors,
                                              weights + (o / kLanes - first) * kLanes + lane_of(o % kLanes)));
    }
}

// Up to 64 codes as sixteen words of each digit: where their table is. kBits: of a digit; kDigits: how many there are;
// 0: as many as cells have.
template <int kDigits, int kBits>
struct PackDigits {
  explicit PackDigits(const ConvShape& s, const Packed& p)
      : digits(kDigits != 0 ? kDigits : p.cells.digits), lo(_mm256_set1_epi8(static_cast<char>(s.input_lo))) {}

  int64_t operator()(const uint8_t* from, int64_t count, uint8_t* to, int64_t digit_bytes) const {
    __m256i total = _mm256_setzero_si256();
    for (; count >= 32; count -= 32, from += 32, to += 8 * kWordBytes)
      total = _mm256_add_epi64(
          total, pack(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), to, digit_bytes,
                      [](__m128i words, uint8_t* at) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), words); }));
    if (count > 0)
      total = _mm256_add_epi64(total, pack(load_some(from, count), to, digit_bytes, [&](__m128i words, uint8_t* at) {
                                 store_some(words, (count + kWordCodes - 1) / kWordCodes, at);
                               }));
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
  }

  // Words of 32 codes; returns sums of the codes moved to begin at 0.
  template <typename Store>
  __m256i pack(__m256i codes, uint8_t* to, int64_t digit_bytes, const Store& store) const {
    codes = _mm256_sub_epi8(codes, lo);
    const __m256i sums = _mm256_sad_epu8(codes, _mm256_setzero_si256());
    const int64_t count = kDigits != 0 ? kDigits : digits;
    for (int64_t digit = 0; digit < count; ++digit, to += digit_bytes) {
      store(words_of(_mm256_and_si256(codes, _mm256_set1_epi8((1 << kBits) - 1))), to);
      codes = _mm256_srli_epi16(codes, kBits);
    }
    return sums;
  }

  // 1 to 31 codes, then `lo`. Loads of whole quarters, so that nothing waits for single bytes to be stored.
  __m256i load_some(const uint8_t* from, int64_t count) const {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int32_t quarters = static_cast<int32_t>(count / 4);
    const __m256i whole = _mm256_cmpgt_epi32(_mm256_set1_epi32(quarters), places);
    __m256i x = _mm256_blendv_epi8(lo, _mm256_maskload_epi32(reinterpret_cast<const int*>(from), whole), whole);
    if (count % 4 != 0) {
      uint32_t last = static_cast<uint32_t>(_mm256_extract_epi32(lo, 0));
      for (int64_t i = count % 4 - 1; i >= 0; --i) last = last << 8 | from[quarters * 4 + i];
      const __m256i there = _mm256_cmpeq_epi32(_mm256_set1_epi32(quarters), places);
      x = _mm256_blendv_epi8(x, _mm256_set1_epi32(static_cast<int32_t>(last)), there);
    }
    return x;
  }

  static void store_some(__m128i words, int64_t count, uint8_t* to) {
    if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
    uint64_t left = static_cast<uint64_t>(_mm_cvtsi128_si64(words));
    if (count >= 4) {
      std::memcpy(to, &left, 8);
      left = static_cast<uint64_t>(_mm_extract_epi64(words, 1));
      to += 8, count -= 4;
    }
    for (; count > 0; --count, to += kWordBytes, left >>= 16) {
      const uint16_t word = static_cast<uint16_t>(left);
      std::memcpy(to, &word, kWordBytes);
    }
  }

  // Of 32 digits: kTableBytes * (the bits of each four, the first one's lowest).
  static __m128i words_of(__m256i d) {
    const __m256i pairs = _mm256_maddubs_epi16(d, _mm256_set1_epi16(1 << (8 + kBits) | 1));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32((kTableBytes << 2 * kBits) << 16 | kTableBytes));
    const __m256i words = _mm256_packus_epi32(fours, fours);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 8));
  }

  int64_t digits;
  __m256i lo;
};

}  // namespace
}  // namespace bitstrata
