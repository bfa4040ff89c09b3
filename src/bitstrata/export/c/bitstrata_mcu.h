/* Runs an exported network in integers: C99, no allocation, no floating point, no dependency but the C library's
 * <stdint.h> and <string.h>. model.c holds the tables that the types below describe; a user needs model.h only.
 *
 * A network is a list of groups. A group goes over the pixels of one map, a tile of them at a time; each of its steps
 * computes a tile of one value, so that a value which only the same group reads exists as one tile. Maps are stored
 * pixel by pixel (height, width, channels). */
#ifndef BITSTRATA_MCU_H
#define BITSTRATA_MCU_H

#include <stdint.h>

enum { BS_U8, BS_S8, BS_I32 };                   /* types of values */
enum { BS_ARENA, BS_TILE, BS_INPUT, BS_OUTPUT }; /* places of values; BS_TILE: in the arena, one tile only */

/* A map. offset: bytes from the start of the arena. */
typedef struct {
  uint32_t height, width, channels, offset;
  uint8_t type, place;
} bs_value;

/* What a run works on. tile: the first pixel of the tile that is computed. */
typedef struct {
  uint8_t* arena;
  const void* input;
  int32_t* output;
  uint32_t tile;
} bs_state;

struct bs_step;

/* Computes pixels first .. first + count - 1 of the step's result. */
typedef void bs_kernel(const bs_state* state, const struct bs_step* step, uint32_t first, uint32_t count);

/* One operation. b: the second input of an addition. scratch: its offset in the arena. args: as the kernel says. */
typedef struct bs_step {
  bs_kernel* run;
  const bs_value *out, *a, *b;
  const void* args;
  uint32_t scratch;
} bs_step;

/* steps over the pixels of a map, tile of them at a time; backward: from the last tile to the first, which lets results
 * take the place of what has been read. */
typedef struct {
  const bs_step* steps;
  uint32_t pixels;
  uint16_t count, tile;
  uint8_t backward;
} bs_group;

/* The extent of a window, its steps over the map and between its elements; top, left: rows and columns outside the map
 * before the first one inside. */
typedef struct {
  uint16_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  uint16_t top, left;
} bs_window;

/* A convolution. Codes u of weights are unsigned, weight = multiplier * u + addend. A row of weights is one section of
 * words for each power of two in `bits`, largest first, which holds so many bits of each code: fields of that width are
 * spread over the lanes of a word, which is filled from its lowest bits on. Unpacked, a row has `words` words.
 *   bs_conv_bytes: one row an output channel; lanes are bytes, four codes a word, the first one in the highest byte
 *   bs_conv_pairs: one row an output channel; lanes are halves; of four codes 0 and 2 share a word, 1 and 3 the next
 *   bs_conv_depthwise: for each `block` of channels one row a window element; lanes are bytes, the first one lowest
 * low: subtracted from the input's codes, so that they are unsigned as well; base, one an output channel or none, makes
 * up for it. pad: codes outside the map, less low, one an input channel, or none where pad_code is all of them. depth:
 * codes in a group's window. turns: how many words can be multiplied before their sums overflow (bs_conv_bytes). */
typedef struct {
  bs_window window;
  const uint32_t* weights;
  const int32_t* base;
  const uint8_t* pad;
  uint32_t depth, row_words, words, groups, block;
  int32_t multiplier, addend;
  int16_t low;
  uint8_t bits, pad_code, turns;
} bs_conv;

enum { BS_MOST_THRESHOLDS = 3 };

/* result = lowest + (number of the channel's thresholds that x reaches), or highest - that number for channels whose
 * bit in falling is set. shared: one set of thresholds for all channels. */
typedef struct {
  const void* thresholds; /* int16_t (bs_thresholds16) or int32_t (bs_thresholds32), ascending, count a channel */
  const uint32_t* falling;
  int32_t lowest, highest;
  uint8_t count, shared;
} bs_thresholds;

/* result = clamp((clamp(x, from, to) * multiplier + addend) >> shift, lowest, highest) in 32 bits; no from, no clamp.
 */
typedef struct {
  const int32_t *multiplier, *addend, *from, *to;
  const uint8_t* shift;
  int32_t lowest, highest;
  uint8_t shared;
} bs_requant_short_args;

/* result = clamp((x * multiplier + bias) >> shift, lowest, highest) in 64 bits. bs_requant_split computes the same in
 * 32 bits where the result needs no clamp and x * (2^shift - 1) + 2^shift - 1 fits. */
typedef struct {
  const int32_t* multiplier;
  const int64_t* bias;
  const uint8_t* shift;
  int32_t lowest, highest;
  uint8_t shared;
} bs_requant_wide_args;

/* result = a >> shift_a + b >> shift_b, rounded half up; negative shifts go left. */
typedef struct {
  int8_t shift_a, shift_b;
} bs_add_args;

typedef struct {
  int32_t lowest, highest;
} bs_clip_args;

/* result = (sum + half) >> shift. */
typedef struct {
  bs_window window;
  uint8_t shift;
} bs_sum_pool_args;

/* First row, column and channel that are taken, and the distance to the next. */
typedef struct {
  uint32_t row, column, channel, row_step, column_step, channel_step;
} bs_slice_args;

/* Rows, columns and channels of zeros in front. */
typedef struct {
  uint32_t top, left, front;
} bs_pad_args;

/* Runs `count` groups. arena: aligned to 4 bytes, of the size that the tables were made for. */
void bs_run(const bs_group* groups, uint32_t count, uint8_t* arena, const void* input, int32_t* output);

/* Scratch, in words: two rows of `words`, then for each pixel of a tile, an even number of them, `words` of codes and
 * one for their sum. */
bs_kernel bs_conv_bytes, bs_conv_pairs;
/* Scratch, in words: a block's rows of `words`, and as many of codes. */
bs_kernel bs_conv_depthwise;
bs_kernel bs_thresholds16, bs_thresholds32; /* bs_thresholds */
bs_kernel bs_requant_short, bs_requant_split, bs_requant_wide, bs_add, bs_clip, bs_sum_pool, bs_slice, bs_pad;
bs_kernel bs_max_pool; /* bs_window */
bs_kernel bs_flatten;  /* nothing */

#endif
