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

static uint32_t size_of(const bs_value *v) { return v->type == BS_I32 ? 4u : 1u; }

/* Where a pixel of a value is to be written. */
static uint8_t *at(const bs_state *s, const bs_value *v, uint32_t pixel) {
  const uint32_t bytes = v->channels * size_of(v);
  if (v->place == BS_OUTPUT) return (uint8_t *)s->output + pixel * bytes;
  return s->arena + v->offset + (v->place == BS_TILE ? pixel - s->tile : pixel) * bytes;
}

/* Where a pixel of a value is to be read. */
static const uint8_t *from(const bs_state *s, const bs_value *v, uint32_t pixel) {
  if (v->place == BS_INPUT) return (const uint8_t *)s->input + pixel * v->channels * size_of(v);
  return at(s, v, pixel);
}

static const int32_t *integers(const bs_state *s, const bs_value *v, uint32_t pixel) {
  return (const int32_t *)(const void *)from(s, v, pixel);
}

void bs_run(const bs_group *groups, uint32_t count, uint8_t *arena, const void *input, int32_t *output) {
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

static position start_at(const bs_step *step, uint32_t pixel) {
  position p;
  p.y = pixel / step->out->width;
  p.x = pixel - p.y * step->out->width;
  return p;
}

static void advance(const bs_step *step, position *p) {
  if (++p->x == step->out->width) {
    p->x = 0;
    ++p->y;
  }
}

/* The pixel of `v` under an element of the window, or -1 outside the map. */
static int32_t under(const bs_window *w, const bs_value *v, position p, uint32_t ky, uint32_t kx) {
  const uint32_t y = p.y * w->stride_h + ky * w->dilation_h - w->top;
  const uint32_t x = p.x * w->stride_w + kx * w->dilation_w - w->left;
  return y < v->height && x < v->width ? (int32_t)(y * v->width + x) : -1;
}

/* Convolution */

static const uint32_t BYTES = 0x01010101u, HALVES = 0x00010001u; /* a 1 in each lane of a word */

/* Adds a section of a row of weights to the words `out`, count of them: fields of `width` bits, shifted by `shift`.
 * Returns the next section. */
static const uint32_t *unpack_section(const uint32_t *in, uint32_t *out, uint32_t count, uint32_t width, uint32_t shift,
                                      uint32_t lanes, int first) {
  const uint32_t mask = lanes * ((1u << width) - 1u), fields = (lanes == BYTES ? 8u : 16u) / width;
  while (count > 0) {
    const uint32_t n = smaller(fields, count);
    uint32_t word = *in++;
    count -= n;
    if (first) {
      for (uint32_t i = 0; i < n; ++i, word >>= width % 32u) *out++ = (word & mask) << shift;
    } else {
      for (uint32_t i = 0; i < n; ++i, word >>= width % 32u) *out++ |= (word & mask) << shift;
    }
  }
  return in;
}

static void unpack_row(const bs_conv *c, uint32_t row, uint32_t *out, uint32_t lanes) {
  const uint32_t *in = c->weights + row * c->row_words;
  uint32_t shift = c->bits;
  int first = 1;
  for (uint32_t width = 8; width > 0; width >>= 1) {
    if ((c->bits & width) == 0) continue;
    shift -= width;
    in = unpack_section(in, out, c->words, width, shift, lanes, first);
    first = 0;
  }
}

/* Codes of one position, less `low`. */
static void take_bytes(const uint8_t *in, uint32_t count, int32_t low, uint8_t *out) {
  if (low == 0) {
    memcpy(out, in, count);
  } else {
    const int8_t *codes = (const int8_t *)in;
    for (uint32_t i = 0; i < count; ++i) out[i] = (uint8_t)(codes[i] - low);
  }
}

/* The codes under the window at p, `count` channels from `channel` on; elements of the window are `pitch` bytes apart. */
static void take_patch(const bs_state *s, const bs_step *step, position p, uint32_t channel, uint32_t count,
                       uint32_t pitch, uint8_t *out) {
  const bs_conv *c = step->args;
  for (uint32_t ky = 0; ky < c->window.kernel_h; ++ky) {
    for (uint32_t kx = 0; kx < c->window.kernel_w; ++kx, out += pitch) {
      const int32_t pixel = under(&c->window, step->a, p, ky, kx);
      if (pixel >= 0)
        take_bytes(from(s, step->a, (uint32_t)pixel) + channel, count, c->low, out);
      else if (c->pad != NULL)
        memcpy(out, c->pad + channel, count);
      else
        memset(out, c->pad_code, count);
    }
  }
}

static uint32_t sum_bytes(const uint8_t *codes, uint32_t count) {
  uint32_t sum = 0;
  for (uint32_t i = 0; i < count; ++i) sum += codes[i];
  return sum;
}

static uint32_t even_bytes(uint32_t x) { return x & 0x00ff00ffu; }

/* Bytes in the second half of `words` words become pairs, in the same memory: four bytes a time, 0 and 2, then 1 and 3. */
static void spread(uint32_t *words, uint32_t count) {
  const uint8_t *bytes = (const uint8_t *)words + 2 * count;
  for (; count > 0; count -= 2, bytes += 4) {
    uint32_t x;
    memcpy(&x, bytes, 4);
    *words++ = even_bytes(x);
    *words++ = even_bytes(x >> 8);
  }
}

/* sum + the products of both halves, of numbers below 256. */
static uint32_t multiply_pairs(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__ARM_FEATURE_DSP)
  return (uint32_t)__smlad(to_signed(a), to_signed(b), to_signed(sum));
#else
  return sum + (a & 0xffffu) * (b & 0xffffu) + (a >> 16) * (b >> 16);
#endif
}

/* Sums of products of two patches and two rows: [patch 0 row 0, patch 0 row 1, patch 1 row 0, patch 1 row 1]. */
typedef void dot_kernel(const uint32_t *a0, const uint32_t *a1, const uint32_t *w0, const uint32_t *w1, uint32_t words,
                        uint32_t turns, uint32_t *sums);

/* Four codes a word. Byte 3 of the product of two words is the sum of four products, as the weights are in reverse. */
static void dot_bytes(const uint32_t *a0, const uint32_t *a1, const uint32_t *w0, const uint32_t *w1, uint32_t words,
                      uint32_t turns, uint32_t *sums) {
  uint32_t s00 = 0, s01 = 0, s10 = 0, s11 = 0;
  while (words > 0) {
    uint32_t p00 = 0, p01 = 0, p10 = 0, p11 = 0, n = smaller(turns, words);
    words -= n;
    for (; n >= 4; n -= 4) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t a = *a0++, b = *a1++, v = *w0++, w = *w1++;
        p00 += a * v, p01 += a * w, p10 += b * v, p11 += b * w;
      }
    }
    for (; n > 0; --n) {
      const uint32_t a = *a0++, b = *a1++, v = *w0++, w = *w1++;
      p00 += a * v, p01 += a * w, p10 += b * v, p11 += b * w;
    }
    s00 += p00 >> 24, s01 += p01 >> 24, s10 += p10 >> 24, s11 += p11 >> 24;
  }
  sums[0] = s00, sums[1] = s01, sums[2] = s10, sums[3] = s11;
}

/* Two codes a word; an even number of words. */
static void dot_pairs(const uint32_t *a0, const uint32_t *a1, const uint32_t *w0, const uint32_t *w1, uint32_t words,
                      uint32_t turns, uint32_t *sums) {
  uint32_t s00 = 0, s01 = 0, s10 = 0, s11 = 0;
  (void)turns;
  for (; words > 0; words -= 2) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = *a0++, b = *a1++, v = *w0++, w = *w1++;
      s00 = multiply_pairs(a, v, s00), s01 = multiply_pairs(a, w, s01);
      s10 = multiply_pairs(b, v, s10), s11 = multiply_pairs(b, w, s11);
    }
  }
  sums[0] = s00, sums[1] = s01, sums[2] = s10, sums[3] = s11;
}

static int32_t finish(const bs_conv *c, uint32_t channel, uint32_t products, uint32_t codes) {
  const uint32_t base = c->base != NULL ? (uint32_t)c->base[channel] : 0;
  return to_signed((uint32_t)c->multiplier * products + (uint32_t)c->addend * codes + base);
}

/* Rows `row` and, if `rows` is 2, the next one with a tile of patches; each patch is followed by the sum of its codes. */
static void multiply_rows(const bs_conv *c, dot_kernel *dot, const uint32_t *weights, uint32_t row, uint32_t rows,
                          uint32_t count, int32_t *out, uint32_t channels) {
  const uint32_t words = c->words;
  const uint32_t *patch = weights + 2 * words, *second_row = rows > 1 ? weights + words : weights;
  for (uint32_t i = 0; i < count; i += 2, patch += 2 * (words + 1), out += 2 * channels) {
    const uint32_t *other = i + 1 < count ? patch + words + 1 : patch;
    uint32_t products[4];
    dot(patch, other, weights, second_row, words, c->turns, products);
    out[row] = finish(c, row, products[0], patch[words]);
    if (rows > 1) out[row + 1] = finish(c, row + 1, products[1], patch[words]);
    if (other == patch) continue;
    out[channels + row] = finish(c, row, products[2], other[words]);
    if (rows > 1) out[channels + row + 1] = finish(c, row + 1, products[3], other[words]);
  }
}

static void convolve(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count, dot_kernel *dot,
                     uint32_t lanes) {
  const bs_conv *c = step->args;
  const uint32_t words = c->words, channels = step->out->channels, in_group = step->a->channels / c->groups;
  const uint32_t rows = channels / c->groups, in_bytes = lanes == BYTES ? 4 * words : 2 * words;
  uint32_t *const weights = (uint32_t *)(void *)(s->arena + step->scratch);
  int32_t *const out = (int32_t *)(void *)at(s, step->out, first);
  for (uint32_t group = 0; group < c->groups; ++group) {
    uint32_t *patch = weights + 2 * words;
    position p = start_at(step, first);
    for (uint32_t i = 0; i < count; ++i, patch += words + 1, advance(step, &p)) {
      uint8_t *bytes = (uint8_t *)(patch + words) - in_bytes;
      take_patch(s, step, p, group * in_group, in_group, in_group, bytes);
      memset(bytes + c->depth, 0, in_bytes - c->depth);
      patch[words] = sum_bytes(bytes, c->depth);
      if (lanes != BYTES) spread(patch, words);
    }
    for (uint32_t k = 0; k < rows; k += 2) {
      const uint32_t row = group * rows + k, n = smaller(2, rows - k);
      for (uint32_t i = 0; i < n; ++i) unpack_row(c, row + i, weights + i * words, lanes);
      multiply_rows(c, dot, weights, row, n, count, out, channels);
    }
  }
}

void bs_conv_bytes(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  convolve(s, step, first, count, dot_bytes, BYTES);
}

void bs_conv_pairs(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
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
static void multiply_four(const bs_conv *c, const uint32_t *codes, const uint32_t *weights, uint32_t channel,
                          uint32_t count, int32_t *out) {
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

void bs_conv_depthwise(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_conv *c = step->args;
  const uint32_t channels = step->out->channels, row_bytes = 4 * c->words;
  uint32_t *const weights = (uint32_t *)(void *)(s->arena + step->scratch), *const codes = weights + c->depth * c->words;
  for (uint32_t from_channel = 0, row = 0; from_channel < channels; from_channel += c->block) {
    const uint32_t n = smaller(c->block, channels - from_channel);
    position p = start_at(step, first);
    for (uint32_t i = 0; i < c->depth; ++i, ++row) unpack_row(c, row, weights + i * c->words, BYTES);
    for (uint32_t i = 0; i < count; ++i, advance(step, &p)) {
      take_patch(s, step, p, from_channel, n, row_bytes, (uint8_t *)codes);
      for (uint32_t k = 0; k < n; k += 4)
        multiply_four(c, codes + k / 4, weights + k / 4, from_channel + k, smaller(4, n - k),
                      (int32_t *)(void *)at(s, step->out, first + i));
    }
  }
}

/* Operations on single elements. Channels run fastest, and `count` pixels lie one after the other. */

static void store(uint8_t *out, uint32_t type, uint32_t i, int32_t x) {
  if (type == BS_I32)
    ((int32_t *)(void *)out)[i] = x;
  else
    out[i] = (uint8_t)x;
}

/* How many of `count` thresholds x reaches. */
static int32_t count_reached(const void *thresholds, int wide, uint32_t at_first, uint32_t count, int32_t x) {
  int32_t reached = 0;
  for (uint32_t i = at_first; i < at_first + count; ++i)
    reached += x >= (wide ? ((const int32_t *)thresholds)[i] : ((const int16_t *)thresholds)[i]);
  return reached;
}

static void compare(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count, int wide) {
  const bs_thresholds *t = step->args;
  const int32_t *x = integers(s, step->a, first);
  uint8_t *out = at(s, step->out, first);
  for (; count > 0; --count) {
    for (uint32_t k = 0; k < step->out->channels; ++k) {
      const uint32_t k_of = t->shared ? 0 : k;
      const int32_t reached = count_reached(t->thresholds, wide, k_of * t->count, t->count, *x++);
      const int falls = t->falling != NULL && (t->falling[k_of / 32] >> k_of % 32 & 1u) != 0;
      *out++ = (uint8_t)(falls ? t->highest - reached : t->lowest + reached);
    }
  }
}

void bs_thresholds16(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  compare(s, step, first, count, 0);
}

void bs_thresholds32(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  compare(s, step, first, count, 1);
}

void bs_requant_short(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_requant_short_args *r = step->args;
  const int32_t *in = integers(s, step->a, first);
  uint8_t *out = at(s, step->out, first);
  for (uint32_t i = 0; count > 0; --count) {
    for (uint32_t k = 0; k < step->out->channels; ++k, ++i) {
      const uint32_t c = r->shared ? 0 : k;
      const int32_t x = r->from != NULL ? clamp(in[i], r->from[c], r->to[c]) : in[i];
      store(out, step->out->type, i, clamp((x * r->multiplier[c] + r->addend[c]) >> r->shift[c], r->lowest, r->highest));
    }
  }
}

void bs_requant_wide(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_requant_wide_args *r = step->args;
  const int32_t *in = integers(s, step->a, first);
  uint8_t *out = at(s, step->out, first);
  for (uint32_t i = 0; count > 0; --count) {
    for (uint32_t k = 0; k < step->out->channels; ++k, ++i) {
      const uint32_t c = r->shared ? 0 : k, shift = r->shift[c];
      const int64_t sum = (int64_t)in[i] * r->multiplier[c] + r->bias[c];
      int64_t y;
      if (shift >= 32) { /* the upper half alone: processors of 32 bits need no long shift */
        store(out, step->out->type, i, clamp((int32_t)(sum >> 32) >> (shift - 32), r->lowest, r->highest));
        continue;
      }
      y = sum >> shift;
      store(out, step->out->type, i,
            y < r->lowest ? r->lowest : y > r->highest ? r->highest : (int32_t)y);
    }
  }
}

static uint32_t align(int32_t x, int shift) {
  if (shift > 31) return 0;
  if (shift > 0) return (uint32_t)(x >> shift) + ((uint32_t)(x >> (shift - 1)) & 1u); /* half up */
  return shift > -32 ? (uint32_t)x << -shift : 0;
}

void bs_add(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_add_args *shifts = step->args;
  const int32_t *a = integers(s, step->a, first), *b = integers(s, step->b, first);
  int32_t *out = (int32_t *)(void *)at(s, step->out, first);
  for (count *= step->out->channels; count > 0; --count)
    *out++ = to_signed(align(*a++, shifts->shift_a) + align(*b++, shifts->shift_b));
}

void bs_clip(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_clip_args *c = step->args;
  const int32_t *in = integers(s, step->a, first);
  int32_t *out = (int32_t *)(void *)at(s, step->out, first);
  for (count *= step->out->channels; count > 0; --count) *out++ = clamp(*in++, c->lowest, c->highest);
}

/* Pooling */

static int32_t load(const uint8_t *in, uint32_t type, uint32_t i) {
  if (type == BS_I32) return ((const int32_t *)(const void *)in)[i];
  return type == BS_S8 ? ((const int8_t *)in)[i] : in[i];
}

void bs_max_pool(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_window *w = step->args;
  const uint32_t type = step->out->type, channels = step->out->channels;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    uint8_t *out = at(s, step->out, first);
    int begun = 0;
    for (uint32_t i = 0; i < (uint32_t)w->kernel_h * w->kernel_w; ++i) {
      const int32_t pixel = under(w, step->a, p, i / w->kernel_w, i % w->kernel_w);
      const uint8_t *in;
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

void bs_sum_pool(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_sum_pool_args *pool = step->args;
  const bs_window *w = &pool->window;
  const uint32_t type = step->out->type;
  const int64_t half = pool->shift > 0 ? (int64_t)1 << (pool->shift - 1) : 0;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    uint8_t *out = at(s, step->out, first);
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

void bs_slice(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_slice_args *a = step->args;
  const uint32_t size = size_of(step->out);
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    const uint32_t y = a->row + p.y * a->row_step, x = a->column + p.x * a->column_step;
    const uint8_t *in = from(s, step->a, y * step->a->width + x) + a->channel * size;
    uint8_t *out = at(s, step->out, first);
    for (uint32_t k = 0; k < step->out->channels; ++k, out += size, in += a->channel_step * size) memcpy(out, in, size);
  }
}

void bs_pad(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const bs_pad_args *a = step->args;
  const uint32_t size = size_of(step->out), bytes = step->a->channels * size;
  position p = start_at(step, first);
  for (; count > 0; --count, ++first, advance(step, &p)) {
    const uint32_t y = p.y - a->top, x = p.x - a->left;
    uint8_t *out = at(s, step->out, first);
    memset(out, 0, step->out->channels * size);
    if (y < step->a->height && x < step->a->width)
      memcpy(out + a->front * size, from(s, step->a, y * step->a->width + x), bytes);
  }
}

void bs_flatten(const bs_state *s, const bs_step *step, uint32_t first, uint32_t count) {
  const uint32_t size = size_of(step->out), pixels = step->a->height * step->a->width;
  uint8_t *out = at(s, step->out, first);
  (void)count; /* one pixel holds all */
  for (uint32_t c = 0; c < step->a->channels; ++c)
    for (uint32_t i = 0; i < pixels; ++i, out += size) memcpy(out, from(s, step->a, i) + c * size, size);
}
