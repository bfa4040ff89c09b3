/* Classifies an image with a network in integers, raises its precision by adding bit-planes, and goes back.
 *
 *   classify NET.strata IMAGE [FOLDER]
 *
 * IMAGE: a PGM or PPM file (P5, P6, 8 bits) of the network's size; or raw bytes in C, H, W order; or, for networks on
 * real values, raw float32. FOLDER: where files come from that NET.strata lacks, as if they arrived later.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitstrata.h"

static void check(bs_status status) {
  if (status == BS_OK) return;
  fprintf(stderr, "%s: %s\n", bs_status_name(status), bs_last_error());
  exit(1);
}

static void fail(const char* message, const char* detail) {
  fprintf(stderr, "%s: %s\n", message, detail);
  exit(1);
}

static void* allocate(size_t bytes) {
  void* data = malloc(bytes > 0 ? bytes : 1);
  if (data == NULL) fail("no memory", "malloc");
  return data;
}

static unsigned char* read_file(const char* path, size_t* bytes) {
  FILE* file = fopen(path, "rb");
  unsigned char* data;
  long size;
  if (file == NULL) fail("cannot open", path);
  if (fseek(file, 0, SEEK_END) != 0 || (size = ftell(file)) < 0) fail("cannot tell the size of", path);
  rewind(file);
  data = allocate((size_t)size);
  if (fread(data, 1, (size_t)size, file) != (size_t)size) fail("cannot read", path);
  fclose(file);
  *bytes = (size_t)size;
  return data;
}

/* One number of a PNM header, behind white space and comments. */
static long header_number(const unsigned char* data, size_t bytes, size_t* at) {
  long value = 0;
  while (*at < bytes && (data[*at] <= ' ' || data[*at] == '#')) {
    if (data[*at] == '#')
      while (*at < bytes && data[*at] != '\n') ++*at;
    else
      ++*at;
  }
  while (*at < bytes && data[*at] >= '0' && data[*at] <= '9' && value < 65536)
    value = 10 * value + (data[(*at)++] - '0');
  return value;
}

/* The image in C, H, W order. A PNM file has H, W, C. */
static unsigned char* read_image(const char* path, const int32_t shape[3], size_t element, size_t* bytes) {
  const size_t channels = (size_t)shape[0], pixels = (size_t)shape[1] * (size_t)shape[2];
  unsigned char *data = read_file(path, bytes), *image;
  size_t at = 2, c, p;
  if (*bytes < 2 || data[0] != 'P' || data[1] != (channels == 1 ? '5' : '6')) {
    if (*bytes != channels * pixels * element) fail("not an image of the network's size", path);
    return data;
  }
  if (header_number(data, *bytes, &at) != shape[2] || header_number(data, *bytes, &at) != shape[1] ||
      header_number(data, *bytes, &at) != 255 || ++at + channels * pixels != *bytes || element != 1)
    fail("not an image of the network's size with 8 bits a sample", path);
  *bytes = channels * pixels;
  image = allocate(*bytes);
  for (p = 0; p < pixels; ++p)
    for (c = 0; c < channels; ++c) image[c * pixels + p] = data[at + p * channels + c];
  free(data);
  return image;
}

static bs_choice at_precision(int32_t precision) {
  bs_choice choice = BS_CHOICE_INIT;
  choice.precision = precision;
  return choice;
}

/* Hands over what the artifact has not read yet and the choice needs, from `folder`. */
static void supply_missing(bs_artifact* artifact, const bs_choice* choice, const char* folder) {
  size_t count, i, bytes;
  check(bs_artifact_missing_count(artifact, choice, &count));
  for (i = 0; i < count; ++i) {
    bs_file file;
    char path[4096];
    unsigned char* data;
    check(bs_artifact_missing(artifact, choice, i, &file));
    if (snprintf(path, sizeof path, "%s/%s", folder, file.name) >= (int)sizeof path) fail("path too long", folder);
    data = read_file(path, &bytes);
    file.data = data;
    file.bytes = bytes;
    check(bs_artifact_supply(artifact, &file));
    free(data); /* it has been copied */
    printf("added %s, %lu bytes\n", file.name, (unsigned long)bytes);
  }
}

/* Memory that runs work in: as much as the session asks for now, aligned. `block` is what to free. */
static void* work_memory(bs_session* session, void** block, size_t* bytes) {
  bs_state state = BS_STATE_INIT;
  check(bs_session_state(session, &state));
  free(*block);
  *bytes = (size_t)state.work_bytes;
  *block = allocate(*bytes + (size_t)state.work_alignment);
  return (char*)*block + (state.work_alignment - (uintptr_t)*block % state.work_alignment) % state.work_alignment;
}

typedef struct {
  const void* data;
  size_t bytes;
  int pixels; /* else float32 */
} image_t;

static void classify(bs_session* session, const image_t* image, size_t classes, void** block) {
  int32_t* integers = allocate(classes * sizeof *integers);
  bs_output output = BS_OUTPUT_INIT;
  size_t work_bytes, best = 0, i;
  void* work = work_memory(session, block, &work_bytes);
  output.integers = integers;
  output.count = classes;
  if (image->pixels)
    check(bs_run_u8(session, image->data, image->bytes, 1, &output, work, work_bytes));
  else
    check(bs_run_f32(session, image->data, image->bytes / sizeof(float), 1, &output, work, work_bytes));
  for (i = 0; i < classes; ++i)
    if (integers[i] > integers[best]) best = i;
  printf("class %lu, logit %.6g, integers", (unsigned long)best, output.scale * integers[best]);
  for (i = 0; i < classes; ++i) printf(" %ld", (long)integers[i]);
  printf("\n");
  free(integers);
}

int main(int argc, char** argv) {
  bs_artifact* artifact;
  bs_session* session;
  bs_info info = BS_INFO_INIT;
  bs_options options = BS_OPTIONS_INIT;
  bs_choice choice;
  image_t image;
  unsigned char* data;
  void* block = NULL;
  int32_t narrowest, precision;
  size_t classes, i;

  if (argc != 3 && argc != 4) fail("usage", "classify NET.strata IMAGE [FOLDER]");
  check(bs_artifact_open(argv[1], &artifact));
  check(bs_artifact_info(artifact, &info));
  printf("input %ld x %ld x %ld, %lu precisions\n", (long)info.input_shape[0], (long)info.input_shape[1],
         (long)info.input_shape[2], (unsigned long)info.precisions);
  image.pixels = info.input_kind == BS_PIXELS;
  data = read_image(argv[2], info.input_shape, image.pixels ? 1 : sizeof(float), &image.bytes);
  image.data = data;
  classes = (size_t)info.output_shape[0] * (size_t)info.output_shape[1] * (size_t)info.output_shape[2];

  /* The narrowest precision, in memory of our own. */
  check(bs_artifact_precision(artifact, 0, &narrowest));
  choice = at_precision(narrowest);
  options.choice = &choice;
  options.callers_memory = 1;
  check(bs_session_create(artifact, &options, &session));
  printf("precision %ld: ", (long)narrowest);
  classify(session, &image, classes, &block);

  /* Up by what is missing: a bit-plane and the factors of the precision. */
  for (i = 1; i < info.precisions; ++i) {
    check(bs_artifact_precision(artifact, i, &precision));
    choice = at_precision(precision);
    if (argc == 4) supply_missing(artifact, &choice, argv[3]);
    check(bs_session_upgrade(session, &choice));
    printf("precision %ld: ", (long)precision);
    classify(session, &image, classes, &block);
  }

  /* And back, while serving: microseconds, since the session still has it. */
  choice = at_precision(narrowest);
  check(bs_session_set(session, &choice));
  printf("precision %ld: ", (long)narrowest);
  classify(session, &image, classes, &block);

  free(block);
  free(data);
  bs_session_free(session);
  bs_artifact_free(artifact);
  return 0;
}
