/* See bitstrata_mcu.h. Unsigned arithmetic wraps, so sums that are known to fit in the end may pass beyond 32 bits. */
#include "bitstrata_mcu.h"

#include <string.h>

#if defined(__ARM_FEATURE_DSP)
#include <arm_acle.h>
#endif

/* What C leaves to the implementation, and this file needs: right shifts of negative numbers are arithmetic. */
typedef char bs_shifts_are_arithmetic[((int32_t)-3 >> 1) == -2 && ((int64_t)-3 >> 1) == -2 ? 1 : -1];
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are read four at a time in little-endian order"
#endif

static int32_t to_signed(uint32_t x) { return x <= INT32_MAX ? (int32_t)x : -(int32_t)(UINT32_MAX - x) - 1; }

static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

static int32_t clamp(int32_t x, int32_t lowest, int32_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

static uint32_t size_of(const bs_value* v) { return v->type == BS_I32 ? 4u : 1u; }

/* Where a pixel of a value is to be written. */
static uint8_t* at(const bs_state* s, const bs_value* v, uint32_t pixel) {
  const uint32_t bytes = v->channels * size_of(v);
  if (v->place == BS_OUTPUT) return (uint8_t*)s->output + pixel * bytes;
  return s->arena + v->offset + (v->place == BS_TILE ? pixel - s->tile : pixel) * bytes;
}

/* Where a pixel of a value is to be read. */
static const uint8_t* from(const bs_state* s, const bs_value* v, uint32_t pixel) {
  if (v->place == BS_INPUT) return (const uint8_t*)s->input + pixel * v->channels * size_of(v);
  return at(s, v, pixel);
}

static const int32_t* integers(const bs_state* s, const bs_value* v, uint32_t pixel) {
  return (const int32_t*)(const void*)from(s, v, pixel);
}

void bs_run(const bs_group* groups, uint32_t count, uint8_t* arena, const void* input, int32_t* output) {
  bs_state state;
  state.arena = arena;
  state.input = input;
  state.output = output;
  for (; count > 0; --count, ++groups) {
    const uint32_t tile = groups->tile, tiles = (groups->pixels + tile - 1) / tile;
    for (uint32_t i = 0; i < tiles; ++i) {
      state.tile = (groups->backward ? tiles - 1 - i : i) * tile;
      for (uint32_t k = 0; k < groups->count; ++k)
        groups->steps[k].run(&state, &groups->steps[k], state.tile, smaller(tile, groups->pixels - state.tile));
    }
  }
}

/* Windows. A position is counted from the first row and column of the padding. */

typedef struct {
  uint32_t y, x; /* of the result */
} position;

static position start_at(const bs_step* step, uint32_t pixel) {
  position p;
  p.y = pixel / step->out->width;
  p.x = pixel - p.y * step->out->width;
  return p;
}

static void advance(const bs_step* step, position* p) {
  if (++p->x == step->out->width) {
    p->x = 0;
    ++p->y;
  }
}

/* The pixel of `v` under an element of the window, or -1 outside the map. */
static int32_t under(const bs_window* w, const bs_value* v, position p, uint32_t ky, uint32_t kx) {
  const uint32_t y = p.y * w->stride_h + ky * w->dilation_h - w->top;
  const uint32_t x = p.x * w->stride_w + kx * w->dilation_w - w->left;
  return y < v->height && x < v->width ? (int32_t)(y * v->width + x) : -1;
}

/* Convolution */

static const uint32_t BYTES = 0x01010101u, HALVES = 0x00010001u; /* a 1 in each lane of a word */

/* A section of a row of weights: fields of `width` bits, shifted by `shift`, become or are added to `count` words,
 * every `pitch`th of `out`. Returns the next section. */
static inline const uint32_t* unpack_section(const uint32_t* in, uint32_t* out, uint32_t count, uint32_t pitch,
                                             uint32_t lanes, uint32_t width, uint32_t shift, int first) {
  const uint32_t mask = lanes * ((1u << width) - 1u), fields = (lanes == BYTES ? 8u : 16u) / width;
  if (first && shift == 0) { /* the common case: a row of one section */
    for (; count >= fields; count -= fields) {
      uint32_t word = *in++, n = fields;
      for (; n >= 2; n -= 2, out += 2 * pitch) {
        out[0] = word & mask;
        out[pitch] = word >> width & mask;
        word >>= 2 * width;
      }
      if (n > 0) {
        *out = word & mask;
        out += pitch;
      }
    }
  }
  while (count > 0) {
    uint32_t word = *in++, n = smaller(fields, count);
    count -= n;
    for (; n > 0; --n, out += pitch, word >>= width) {
      const uint32_t field = (word & mask) << shift;
      *out = first ? field : *out | field;
    }
  }
  return in;
}

static inline void unpack_sections(const bs_conv* c, uint32_t row, uint32_t* out, uint32_t pitch, uint32_t lanes) {
  const uint32_t* in = c->weights + row * c->row_words;
  uint32_t shift = c->bits;
  int first = 1;
  for (uint32_t width = 8; width > 0; width >>= 1) {
    if ((c->bits & width) == 0) continue;
    shift -= width;
    in = unpack_section(in, out, c->words, pitch, lanes, width, shift, first);
    first = 0;
  }
}

/* A row into every second word, and into every word. */
static void unpack_apart(const bs_conv* c, uint32_t row, uint32_t* out, uint32_t lanes) {
  unpack_sections(c, row, out, 2, lanes);
}

static void unpack_row(const bs_conv* c, uint32_t row, uint32_t* out) { unpack_sections(c, row, out, 1, BYTES); }

/* memcpy, which small C libraries have byte by byte. */
static void copy(uint8_t* to, const uint8_t* from_bytes, uint32_t count) {
  for (; count >= 4; count -= 4, to += 4, from_bytes += 4) memcpy(to, from_bytes, 4);
  for (; count > 0; --count) *to++ = *from_bytes++;
}

/* Codes less `low`. */
static void take_bytes(const uint8_t* in, uint32_t count, int32_t low, uint8_t* out) {
  if (low == 0) {
    copy(out, in, count);
  } else {
    const int8_t* codes = (const int8_t*)in;
    for (uint32_t i = 0; i < count; ++i) out[i] = (uint8_t)(codes[i] - low);
  }
}

/* The codes under the window at p, `count` channels from `channel` on; elements of the window are `pitch` bytes apart.
 */
static void take_patch(const bs_state* s, const bs_step* step, position p, uint32_t channel, uint32_t count,
                       uint32_t pitch, uint8_t* out) {
  const bs_conv* c = step->args;
  const bs_window* w = &c->window;
  const int whole_rows = w->dilation_w == 1 && count == step->a->channels && count == pitch;
  for (uint32_t ky = 0; ky < w->kernel_h; ++ky) {
    for (uint32_t kx = 0, run; kx < w->kernel_w; kx += run, out += run * pitch) {
      const int32_t pixel = under(w, step->a, p, ky, kx);
      run = 1;
      if (pixel >= 0) {
        if (whole_rows) run = smaller(w->kernel_w - kx, step->a->width - (p.x * w->stride_w + kx - w->left));
        take_bytes(from(s, step->a, (uint32_t)pixel) + channel, run * count, c->low, out);
      } else if (c->pad != NULL) {
        copy(out, c->pad + channel, count);
      } else {
        memset(out, c->pad_code, count);
      }
    }
  }
}

static uint32_t even_bytes(uint32_t x) { return x & 0x00ff00ffu; }

/* sum + the four bytes of x. */
static uint32_t add_bytes(uint32_t x, uint32_t sum) {
#if defined(__ARM_FEATURE_DSP)
  return __usada8(x, 0, sum);
#else
  return sum + ((even_bytes(x) + even_bytes(x >> 8)) * 0x00010001u >> 16);
#endif
}

/* Lays out a patch in every second word and returns the sum of its codes. */
static uint32_t lay_out(const uint32_t* patch, uint32_t words, uint32_t lanes, uint32_t* out) {
  uint32_t sum = 0;
  if (lanes == BYTES) {
    for (; words > 0; --words, out += 2) {
      *out = *patch++;
      sum = add_bytes(*out, sum);
    }
  } else {
    for (; words > 0; words -= 2, out += 4) {
      const uint32_t x = *patch++;
      out[0] = even_bytes(x);
      out[2] = even_bytes(x >> 8);
      sum = add_bytes(x, sum);
    }
  }
  return sum;
}

/* sum + the products of both halves, of numbers below 256. */
static uint32_t multiply_pairs(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__ARM_FEATURE_DSP)
  return (uint32_t)__smlad(to_signed(a), to_signed(b), to_signed(sum));
#else
  return sum + (a & 0xffffu) * (b & 0xffffu) + (a >> 16) * (b >> 16);
#endif
}

/* Sums of products of two patches and two rows, of which words alternate: [patch 0 row 0, patch 0 row 1, patch 1 row 0,
 * patch 1 row 1]. */
typedef void dot_kernel(const uint32_t* a, const uint32_t* w, uint32_t words, uint32_t turns, uint32_t* sums);

/* Four codes a word. Byte 3 of the product of two words is the sum of four products, as the weights are in reverse. */
static void dot_bytes(const uint32_t* a, const uint32_t* w, uint32_t words, uint32_t turns, uint32_t* sums) {
  sums[0] = sums[1] = sums[2] = sums[3] = 0;
  while (words > 0) {
    uint32_t p0 = 0, p1 = 0, p2 = 0, p3 = 0, n = smaller(turns, words);
    words -= n;
    for (; n >= 4; n -= 4, a += 8, w += 8) {
      p0 += a[0] * w[0], p1 += a[0] * w[1], p2 += a[1] * w[0], p3 += a[1] * w[1];
      p0 += a[2] * w[2], p1 += a[2] * w[3], p2 += a[3] * w[2], p3 += a[3] * w[3];
      p0 += a[4] * w[4], p1 += a[4] * w[5], p2 += a[5] * w[4], p3 += a[5] * w[5];
      p0 += a[6] * w[6], p1 += a[6] * w[7], p2 += a[7] * w[6], p3 += a[7] * w[7];
    }
    for (; n > 0; --n, a += 2, w += 2) p0 += a[0] * w[0], p1 += a[0] * w[1], p2 += a[1] * w[0], p3 += a[1] * w[1];
    sums[0] += p0 >> 24, sums[1] += p1 >> 24, sums[2] += p2 >> 24, sums[3] += p3 >> 24;
  }
}

/* The same for turns of 6 or 7 words: no inner loop. */
static void dot_bytes_six(const uint32_t* a, const uint32_t* w, uint32_t words, uint32_t turns, uint32_t* sums) {
  sums[0] = sums[1] = sums[2] = sums[3] = 0;
  for (; words >= 6; words -= 6, a += 12, w += 12) {
    uint32_t p0 = a[0] * w[0], p1 = a[0] * w[1], p2 = a[1] * w[0], p3 = a[1] * w[1];
    p0 += a[2] * w[2], p1 += a[2] * w[3], p2 += a[3] * w[2], p3 += a[3] * w[3];
    p0 += a[4] * w[4], p1 += a[4] * w[5], p2 += a[5] * w[4], p3 += a[5] * w[5];
    p0 += a[6] * w[6], p1 += a[6] * w[7], p2 += a[7] * w[6], p3 += a[7] * w[7];
    p0 += a[8] * w[8], p1 += a[8] * w[9], p2 += a[9] * w[8], p3 += a[9] * w[9];
    p0 += a[10] * w[10], p1 += a[10] * w[11], p2 += a[11] * w[10], p3 += a[11] * w[11];
    sums[0] += p0 >> 24, sums[1] += p1 >> 24, sums[2] += p2 >> 24, sums[3] += p3 >> 24;
  }
  if (words > 0) {
    uint32_t rest[4];
    dot_bytes(a, w, words, turns, rest);
    for (int i = 0; i < 4; ++i) sums[i] += rest[i];
  }
}

/* The same for turns = 1. */
static void dot_bytes_once(const uint32_t* a, const uint32_t* w, uint32_t words, uint32_t turns, uint32_t* sums) {
  uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  (void)turns;
  for (; words > 0; --words, a += 2, w += 2) {
    s0 += a[0] * w[0] >> 24, s1 += a[0] * w[1] >> 24;
    s2 += a[1] * w[0] >> 24, s3 += a[1] * w[1] >> 24;
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

/* Two codes a word; an even number of words. */
static void dot_pairs(const uint32_t* a, const uint32_t* w, uint32_t words, uint32_t turns, uint32_t* sums) {
  uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  (void)turns;
  for (; words > 0; words -= 2, a += 4, w += 4) {
    s0 = multiply_pairs(a[0], w[0], s0), s1 = multiply_pairs(a[0], w[1], s1);
    s2 = multiply_pairs(a[1], w[0], s2), s3 = multiply_pairs(a[1], w[1], s3);
    s0 = multiply_pairs(a[2], w[2], s0), s1 = multiply_pairs(a[2], w[3], s1);
    s2 = multiply_pairs(a[3], w[2], s2), s3 = multiply_pairs(a[3], w[3], s3);
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

static int32_t finish(const bs_conv* c, uint32_t channel, uint32_t products, uint32_t codes) {
  const uint32_t base = c->base != NULL ? (uint32_t)c->base[channel] : 0;
  return to_signed((uint32_t)c->multiplier * products + (uint32_t)c->addend * codes + base);
}

/* Rows `row` and, if `rows` is 2, the next one with `count` patches. Two patches lie together, and behind them their
 * sums of codes. */
static void multiply_rows(const bs_conv* c, dot_kernel* dot, const uint32_t* weights, const uint32_t* patches,
                          uint32_t row, uint32_t rows, uint32_t count, int32_t* out, uint32_t channels) {
  for (uint32_t i = 0; i < count; i += 2, patches += 2 * (c->words + 1), out += 2 * channels) {
    const uint32_t* codes = patches + 2 * c->words;
    uint32_t products[4];
    dot(patches, weights, c->words, c->turns, products);
    out[row] = finish(c, row, products[0], codes[0]);
    if (rows > 1) out[row + 1] = finish(c, row + 1, products[1], codes[0]);
    if (i + 1 == count) break;
    out[channels + row] = finish(c, row, products[2], codes[1]);
    if (rows > 1) out[channels + row + 1] = finish(c, row + 1, products[3], codes[1]);
  }
}

static void convolve(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count, dot_kernel* dot,
                     uint32_t lanes) {
  const bs_conv* c = step->args;
  const uint32_t words = c->words, channels = step->out->channels, in_group = step->a->channels / c->groups;
  const uint32_t rows = channels / c->groups;
  uint32_t *const weights = (uint32_t*)(void*)(s->arena + step->scratch), *const patches = weights + 2 * words;
  int32_t* const out = (int32_t*)(void*)at(s, step->out, first);
  for (uint32_t group = 0; group < c->groups; ++group) {
    position p = start_at(step, first);
    for (uint32_t i = 0; i < count; ++i, advance(step, &p)) {
      uint32_t* pair = patches + (i & ~1u) * (words + 1);
      weights[(c->depth - 1) / 4] = 0; /* the patch, before it is laid out; its last word may not be full */
      take_patch(s, step, p, group * in_group, in_group, in_group, (uint8_t*)weights);
      pair[2 * words + (i & 1u)] = lay_out(weights, words, lanes, pair + (i & 1u));
    }
    for (uint32_t k = 0; k < rows; k += 2) {
      const uint32_t row = group * rows + k, n = smaller(2, rows - k);
      for (uint32_t i = 0; i < n; ++i) unpack_apart(c, row + i, weights + i, lanes);
      multiply_rows(c, dot, weights, patches, row, n, count, out, channels);
    }
  }
}

void bs_conv_bytes(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const uint32_t turns = ((const bs_conv*)step->args)->turns;
  dot_kernel* const dot = turns == 1 ? dot_bytes_once : turns == 6 || turns == 7 ? dot_bytes_six : dot_bytes;
  convolve(s, step, first, count, dot, BYTES);
}

void bs_conv_pairs(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  convolve(s, step, first, count, dot_pairs, HALVES);
}

static uint32_t low_product(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__ARM_FEATURE_DSP)
  return (uint32_t)__smlabb(to_signed(a), to_signed(b), to_signed(sum));
#else
  return sum + (a & 0xffffu) * (b & 0xffffu);
#endif
}

static uint32_t high_product(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__ARM_FEATURE_DSP)
  return (uint32_t)__smlatt(to_signed(a), to_signed(b), to_signed(sum));
#else
  return sum + (a >> 16) * (b >> 16);
#endif
}

/* Four channels: of each element of the window a word of codes and one of weights, both `words` apart. */
static void multiply_four(const bs_conv* c, const uint32_t* codes, const uint32_t* weights, uint32_t channel,
                          uint32_t count, int32_t* out) {
  uint32_t products[4], sums[4], p0 = 0, p1 = 0, p2 = 0, p3 = 0, even = 0, odd = 0;
  for (uint32_t i = c->depth; i > 0; --i, codes += c->words, weights += c->words) {
    const uint32_t a = even_bytes(*codes), b = even_bytes(*codes >> 8);
    const uint32_t v = even_bytes(*weights), w = even_bytes(*weights >> 8);
    p0 = low_product(a, v, p0), p1 = low_product(b, w, p1);
    p2 = high_product(a, v, p2), p3 = high_product(b, w, p3);
    even += a, odd += b;
  }
  products[0] = p0, products[1] = p1, products[2] = p2, products[3] = p3;
  sums[0] = even & 0xffffu, sums[1] = odd & 0xffffu, sums[2] = even >> 16, sums[3] = odd >> 16;
  for (uint32_t i = 0; i < count; ++i) out[channel + i] = finish(c, channel + i, products[i], sums[i]);
}

void bs_conv_depthwise(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_conv* c = step->args;
  const uint32_t channels = step->out->channels, row_bytes = 4 * c->words;
  uint32_t *const weights = (uint32_t*)(void*)(s->arena + step->scratch), *const codes = weights + c->depth * c->words;
  for (uint32_t from_channel = 0, row = 0; from_channel < channels; from_channel += c->block) {
    const uint32_t n = smaller(c->block, channels - from_channel);
    position p = start_at(step, first);
    for (uint32_t i = 0; i < c->depth; ++i, ++row) unpack_row(c, row, weights + i * c->words);
    for (uint32_t i = 0; i < count; ++i, advance(step, &p)) {
      take_patch(s, step, p, from_channel, n, row_bytes, (uint8_t*)codes);
      for (uint32_t k = 0; k < n; k += 4)
        multiply_four(c, codes + k / 4, weights + k / 4, from_channel + k, smaller(4, n - k),
                      (int32_t*)(void*)at(s, step->out, first + i));
    }
  }
}

/* Requantization goes through the pixels of one channel after the other, so that constants are loaded once. */

static void compare(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count, int wide) {
  const bs_thresholds* t = step->args;
  const uint32_t channels = step->out->channels;
  const int32_t* in = integers(s, step->a, first);
  uint8_t* out = at(s, step->out, first);
  int32_t row[BS_MOST_THRESHOLDS] = {0};
  for (uint32_t k = 0; k < channels; ++k, ++in, ++out) {
    const uint32_t c = t->shared ? 0 : k, n = t->count;
    const int falls = t->falling != NULL && (t->falling[c / 32] >> c % 32 & 1u) != 0;
    const int32_t least = falls ? t->highest : t->lowest, each = falls ? -1 : 1;
    for (uint32_t i = 0; i < n && (k == 0 || !t->shared); ++i)
      row[i] = wide ? ((const int32_t*)t->thresholds)[c * n + i] : ((const int16_t*)t->thresholds)[c * n + i];
    if (n == 1) {
      const int32_t r0 = row[0], more = least + each;
      for (uint32_t i = 0; i < count; ++i) out[i * channels] = (uint8_t)(in[i * channels] >= r0 ? more : least);
    } else {
      const int32_t r0 = row[0], r1 = row[1], r2 = n > 2 ? row[2] : INT32_MAX;
      for (uint32_t i = 0; i < count; ++i) {
        const int32_t x = in[i * channels];
        int32_t y = least;
        if (x >= r0) y += each;
        if (x >= r1) y += each;
        if (x >= r2) y += each;
        out[i * channels] = (uint8_t)y;
      }
    }
  }
}

void bs_thresholds16(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  compare(s, step, first, count, 0);
}

void bs_thresholds32(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  compare(s, step, first, count, 1);
}

void bs_requant_short(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_requant_short_args* r = step->args;
  const uint32_t channels = step->out->channels;
  const int32_t lowest = r->lowest, highest = r->highest;
  const int32_t* in = integers(s, step->a, first);
  uint8_t* out = at(s, step->out, first);
  for (uint32_t k = 0; k < channels; ++k, ++in, ++out) {
    const uint32_t c = r->shared ? 0 : k, shift = r->shift[c];
    const int32_t multiplier = r->multiplier[c], addend = r->addend[c];
    if (r->from != NULL) {
      const int32_t least = r->from[c], most = r->to[c];
      for (uint32_t i = 0; i < count; ++i)
        out[i * channels] =
            (uint8_t)clamp((clamp(in[i * channels], least, most) * multiplier + addend) >> shift, lowest, highest);
    } else {
      for (uint32_t i = 0; i < count; ++i)
        out[i * channels] = (uint8_t)clamp((in[i * channels] * multiplier + addend) >> shift, lowest, highest);
    }
  }
}

/* The multiplier's and the bias' upper parts are whole numbers after the shift. */
void bs_requant_split(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_requant_wide_args* r = step->args;
  const uint32_t channels = step->out->channels;
  const int32_t* in = integers(s, step->a, first);
  int32_t* out = (int32_t*)(void*)at(s, step->out, first);
  for (uint32_t k = 0; k < channels; ++k, ++in, ++out) {
    const uint32_t c = r->shared ? 0 : k, shift = r->shift[c];
    const int32_t mask = (int32_t)((1u << shift) - 1u), multiplier = r->multiplier[c];
    const int32_t low = multiplier & mask, bias_low = (int32_t)(r->bias[c] & mask);
    const uint32_t high = (uint32_t)(multiplier >> shift), bias_high = (uint32_t)(r->bias[c] >> shift);
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t x = in[i * channels];
      out[i * channels] = to_signed((uint32_t)x * high + bias_high + (uint32_t)((x * low + bias_low) >> shift));
    }
  }
}

static void store(uint8_t* out, uint32_t type, uint32_t i, int32_t x) {
  if (type == BS_I32)
    ((int32_t*)(void*)out)[i] = x;
  else
    out[i] = (uint8_t)x;
}

void bs_requant_wide(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_requant_wide_args* r = step->args;
  const uint32_t type = step->out->type, channels = step->out->channels;
  const int32_t* in = integers(s, step->a, first);
  uint8_t* out = at(s, step->out, first);
  for (uint32_t k = 0; k < channels; ++k) {
    const uint32_t c = r->shared ? 0 : k, shift = r->shift[c], last = k + count * channels;
    const int32_t multiplier = r->multiplier[c];
    const int64_t bias = r->bias[c];
    if (shift >= 32) { /* the upper half alone: processors of 32 bits need no long shift */
      for (uint32_t i = k; i < last; i += channels) {
        const int32_t upper = (int32_t)(((int64_t)in[i] * multiplier + bias) >> 32);
        store(out, type, i, clamp(upper >> (shift - 32), r->lowest, r->highest));
      }
    } else {
      for (uint32_t i = k; i < last; i += channels) {
        const int64_t y = ((int64_t)in[i] * multiplier + bias) >> shift;
        store(out, type, i, y < r->lowest ? r->lowest : y > r->highest ? r->highest : (int32_t)y);
      }
    }
  }
}

/* Operations on single elements */

static uint32_t align(int32_t x, int shift) {
  if (shift > 31) return 0;
  if (shift > 0) return (uint32_t)(x >> shift) + ((uint32_t)(x >> (shift - 1)) & 1u); /* half up */
  return shift > -32 ? (uint32_t)x << -shift : 0;
}

void bs_add(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_add_args* shifts = step->args;
  const int32_t *a = integers(s, step->a, first), *b = integers(s, step->b, first);
  int32_t* out = (int32_t*)(void*)at(s, step->out, first);
  for (count *= step->out->channels; count > 0; --count)
    *out++ = to_signed(align(*a++, shifts->shift_a) + align(*b++, shifts->shift_b));
}

void bs_clip(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_clip_args* c = step->args;
  const int32_t* in = integers(s, step->a, first);
  int32_t* out = (int32_t*)(void*)at(s, step->out, first);
  for (count *= step->out->channels; count > 0; --count) *out++ = clamp(*in++, c->lowest, c->highest);
}

/* Pooling */

static int32_t load(const uint8_t* in, uint32_t type, uint32_t i) {
  if (type == BS_I32) return ((const int32_t*)(const void*)in)[i];
  return type == BS_S8 ? ((const int8_t*)in)[i] : in[i];
}

void bs_max_pool(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_window* w = step->args;
  const uint32_t type = step->out->type, channels = step->out->channels;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    uint8_t* out = at(s, step->out, first);
    int begun = 0;
    for (uint32_t i = 0; i < (uint32_t)w->kernel_h * w->kernel_w; ++i) {
      const int32_t pixel = under(w, step->a, p, i / w->kernel_w, i % w->kernel_w);
      const uint8_t* in;
      if (pixel < 0) continue;
      in = from(s, step->a, (uint32_t)pixel);
      for (uint32_t k = 0; k < channels; ++k) {
        const int32_t x = load(in, type, k);
        if (!begun || x > load(out, type, k)) store(out, type, k, x);
      }
      begun = 1;
    }
  }
}

void bs_sum_pool(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_sum_pool_args* pool = step->args;
  const bs_window* w = &pool->window;
  const uint32_t type = step->out->type;
  const int64_t half = pool->shift > 0 ? (int64_t)1 << (pool->shift - 1) : 0;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    uint8_t* out = at(s, step->out, first);
    for (uint32_t k = 0; k < step->out->channels; ++k) {
      int64_t sum = half;
      for (uint32_t ky = 0; ky < w->kernel_h; ++ky) {
        for (uint32_t kx = 0; kx < w->kernel_w; ++kx) {
          const int32_t pixel = under(w, step->a, p, ky, kx);
          if (pixel >= 0) sum += load(from(s, step->a, (uint32_t)pixel), type, k);
        }
      }
      store(out, type, k, (int32_t)(sum >> pool->shift));
    }
  }
}

/* Movement */

void bs_slice(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_slice_args* a = step->args;
  const uint32_t size = size_of(step->out);
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    const uint32_t y = a->row + p.y * a->row_step, x = a->column + p.x * a->column_step;
    const uint8_t* in = from(s, step->a, y * step->a->width + x) + a->channel * size;
    uint8_t* out = at(s, step->out, first);
    for (uint32_t k = 0; k < step->out->channels; ++k, out += size, in += a->channel_step * size) memcpy(out, in, size);
  }
}

void bs_pad(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const bs_pad_args* a = step->args;
  const uint32_t size = size_of(step->out), bytes = step->a->channels * size;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    const uint32_t y = p.y - a->top, x = p.x - a->left;
    uint8_t* out = at(s, step->out, first);
    memset(out, 0, step->out->channels * size);
    if (y < step->a->height && x < step->a->width)
      memcpy(out + a->front * size, from(s, step->a, y * step->a->width + x), bytes);
  }
}

void bs_flatten(const bs_state* s, const bs_step* step, uint32_t first, uint32_t count) {
  const uint32_t size = size_of(step->out), pixels = step->a->height * step->a->width;
  uint8_t* out = at(s, step->out, first);
  (void)count; /* one pixel holds all */
  for (uint32_t c = 0; c < step->a->channels; ++c)
    for (uint32_t i = 0; i < pixels; ++i, out += size) memcpy(out, from(s, step->a, i) + c * size, size);
}
