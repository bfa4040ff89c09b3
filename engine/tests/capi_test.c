/* The C interface under bad input, and without allocations: every refusal has its status and says why.
 *
 *   capi_test GOOD TRUNCATED NEWER IMAGE_BYTES CLASSES
 *
 * GOOD: an artifact on pixels at 1, 2, 3, 4 bits without plans, of which TRUNCATED lacks the end of a file and NEWER is
 * of a later format version. IMAGE_BYTES, CLASSES: sizes of GOOD's input and output.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitstrata.h"

static int failures = 0;

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) {                                                           \
      ++failures;                                                                 \
      printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, bs_last_error()); \
    }                                                                             \
  } while (0)

/* The call is refused with `status`, and the message names `text`. */
#define REFUSED(status, text, call)                                                                     \
  do {                                                                                                  \
    const bs_status found = (call);                                                                     \
    if (found != (status) || strstr(bs_last_error(), (text)) == NULL) {                                 \
      ++failures;                                                                                       \
      printf("%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, bs_status_name(found), bs_last_error()); \
    }                                                                                                   \
  } while (0)

/* Allocations are counted where the C library lets a program put its own in front; sanitizers have theirs. */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS 1
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* data, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
static volatile long allocations = 0;
void* malloc(size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  ++allocations;
  return __libc_calloc(count, bytes);
}
void* realloc(void* data, size_t bytes) {
  ++allocations;
  return __libc_realloc(data, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  ++allocations;
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** data, size_t alignment, size_t bytes) {
  ++allocations;
  *data = __libc_memalign(alignment, bytes);
  return *data == NULL ? 12 : 0;
}
#endif

static const char* good;
static size_t pixels_bytes, classes;

static bs_choice bits(int32_t precision) {
  bs_choice choice = BS_CHOICE_INIT;
  choice.precision = precision;
  return choice;
}

static void* aligned(void* data) { return (char*)data + (64 - (uintptr_t)data % 64) % 64; }

static void test_versions(void) {
  uint32_t api = 0, format = 0;
  const char* name = NULL;
  size_t count = 0, i;
  EXPECT(bs_version(&api, &format) == BS_OK && api == BS_API_VERSION && format == 1);
  REFUSED(BS_INVALID_ARGUMENT, "api_version is NULL", bs_version(NULL, &format));
  EXPECT(bs_isa_count(&count) == BS_OK && count >= 1);
  for (i = 0; i < count; ++i) EXPECT(bs_isa_name(i, &name) == BS_OK && name[0] != '\0');
  REFUSED(BS_INVALID_ARGUMENT, "index is", bs_isa_name(count, &name));
  EXPECT(strcmp(bs_status_name(BS_NEWER_FORMAT), "BS_NEWER_FORMAT") == 0);
  EXPECT(strcmp(bs_status_name(-7), "unknown status") == 0);
}

static void test_null(void) {
  bs_artifact* artifact = NULL;
  bs_session* session = NULL;
  bs_info info = BS_INFO_INIT;
  bs_state state = BS_STATE_INIT;
  bs_layer layer = BS_LAYER_INIT;
  bs_output output = BS_OUTPUT_INIT;
  bs_choice choice = bits(1);
  bs_file file = {"base.safetensors", NULL, 0};
  bs_source source = {sizeof source, NULL, NULL, NULL, NULL};
  int32_t number;
  size_t count;
  const char* name;
  uint8_t pixel = 0;
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_open(good, NULL));
  REFUSED(BS_INVALID_ARGUMENT, "directory is NULL", bs_artifact_open(NULL, &artifact));
  REFUSED(BS_INVALID_ARGUMENT, "files is NULL", bs_artifact_open_files(NULL, 1, &artifact));
  REFUSED(BS_UNREADABLE, "manifest.json", bs_artifact_open_files(NULL, 0, &artifact));
  REFUSED(BS_INVALID_ARGUMENT, "source is NULL", bs_artifact_open_source(NULL, &artifact));
  REFUSED(BS_INVALID_ARGUMENT, "source->read is NULL", bs_artifact_open_source(&source, &artifact));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_supply(NULL, &file));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_info(NULL, &info));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_precision(NULL, 0, &number));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_plan(NULL, 0, &name));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_layer(NULL, 0, &layer));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_missing_count(NULL, &choice, &count));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_artifact_missing(NULL, &choice, 0, &file));
  REFUSED(BS_INVALID_ARGUMENT, "artifact is NULL", bs_session_create(NULL, NULL, &session));
  REFUSED(BS_INVALID_ARGUMENT, "session is NULL", bs_session_set(NULL, &choice));
  REFUSED(BS_INVALID_ARGUMENT, "session is NULL", bs_session_state(NULL, &state));
  REFUSED(BS_INVALID_ARGUMENT, "session is NULL", bs_session_map(NULL, &number, 1));
  REFUSED(BS_INVALID_ARGUMENT, "session is NULL", bs_run_u8(NULL, &pixel, 1, 1, &output, NULL, 0));
  bs_artifact_free(NULL);
  bs_session_free(NULL);
}

static void test_artifacts(const char* truncated, const char* newer) {
  bs_artifact* artifact = NULL;
  bs_session* session = NULL;
  bs_info info = BS_INFO_INIT;
  bs_layer layer = BS_LAYER_INIT;
  bs_file file = {"notes.txt", "x", 1};
  bs_choice choice = bits(4);
  bs_options options = BS_OPTIONS_INIT;
  int32_t number;
  const char* name;
  size_t count = 0;
  REFUSED(BS_UNREADABLE, "no such directory", bs_artifact_open("/nowhere/at/all.strata", &artifact));
  REFUSED(BS_NEWER_FORMAT, "format version 2", bs_artifact_open(newer, &artifact));
  EXPECT(artifact == NULL);

  EXPECT(bs_artifact_open(truncated, &artifact) == BS_OK); /* its manifest is whole */
  options.choice = &choice;
  REFUSED(BS_INVALID_ARTIFACT, ".safetensors", bs_session_create(artifact, &options, &session));
  EXPECT(session == NULL);
  bs_artifact_free(artifact);

  EXPECT(bs_artifact_open(good, &artifact) == BS_OK);
  EXPECT(bs_artifact_info(artifact, &info) == BS_OK && info.precisions == 4 && info.plans == 0 && info.layers > 1);
  EXPECT(info.input_kind == BS_PIXELS && strlen(info.sha256) == 64);
  info.struct_size = 4;
  REFUSED(BS_INVALID_ARGUMENT, "info->struct_size is 4", bs_artifact_info(artifact, &info));
  REFUSED(BS_INVALID_ARGUMENT, "index is 4", bs_artifact_precision(artifact, 4, &number));
  REFUSED(BS_INVALID_ARGUMENT, "index is 0", bs_artifact_plan(artifact, 0, &name));
  REFUSED(BS_INVALID_ARGUMENT, "index is 99", bs_artifact_layer(artifact, 99, &layer));
  EXPECT(bs_artifact_layer(artifact, 1, &layer) == BS_OK && layer.planes == 1 && layer.held_bits == 0);
  REFUSED(BS_INVALID_ARGUMENT, "does not list", bs_artifact_supply(artifact, &file));
  file.name = NULL;
  REFUSED(BS_INVALID_ARGUMENT, "file->name is NULL", bs_artifact_supply(artifact, &file));
  EXPECT(bs_artifact_missing_count(artifact, &choice, &count) == BS_OK && count >= 5);
  REFUSED(BS_INVALID_ARGUMENT, "index is", bs_artifact_missing(artifact, &choice, count, &file));

  /* A supplied file that is not what the manifest says changes nothing; the right one may follow. */
  EXPECT(bs_artifact_missing(artifact, &choice, 0, &file) == BS_OK);
  file.data = "x";
  file.bytes = 1;
  EXPECT(bs_artifact_supply(artifact, &file) == BS_OK);
  REFUSED(BS_INVALID_ARTIFACT, file.name, bs_session_create(artifact, &options, &session));
  bs_artifact_free(artifact);
}

static void test_choices(void) {
  bs_artifact* artifact;
  bs_session* session = NULL;
  bs_options options = BS_OPTIONS_INIT;
  bs_choice choice = bits(5);
  bs_state state = BS_STATE_INIT;
  int32_t map[64];
  size_t i;
  struct {
    bs_options known;
    size_t later;
  } future = {BS_OPTIONS_INIT, 0};
  EXPECT(bs_artifact_open(good, &artifact) == BS_OK);
  options.choice = &choice;
  REFUSED(BS_UNKNOWN_PRECISION, "5", bs_session_create(artifact, &options, &session));
  options.choice = NULL;
  options.threads = 0;
  REFUSED(BS_INVALID_ARGUMENT, "threads", bs_session_create(artifact, &options, &session));
  options.threads = 1;
  options.isa = "z80";
  REFUSED(BS_UNSUPPORTED, "z80", bs_session_create(artifact, &options, &session));
  options.struct_size = 0;
  REFUSED(BS_INVALID_ARGUMENT, "struct_size is 0", bs_session_create(artifact, &options, &session));
  EXPECT(session == NULL);

  /* A caller with a later header: what it leaves at zero is no matter, what it uses is refused. */
  future.known.struct_size = sizeof future;
  EXPECT(bs_session_create(artifact, &future.known, &session) == BS_OK);
  bs_session_free(session);
  future.later = 1;
  REFUSED(BS_INVALID_ARGUMENT, "does not know", bs_session_create(artifact, &future.known, &session));

  EXPECT(bs_session_create(artifact, NULL, &session) == BS_OK);
  EXPECT(bs_session_map(session, map, 3) == BS_OK && map[0] == 1 && map[2] == 1);
  REFUSED(BS_INVALID_ARGUMENT, "count is 2", bs_session_map(session, map, 2));
  REFUSED(BS_UNKNOWN_PRECISION, "5", bs_session_set(session, &choice));
  REFUSED(BS_INVALID_ARGUMENT, "choice is NULL", bs_session_set(session, NULL));
  choice = bits(1);
  REFUSED(BS_UNKNOWN_PRECISION, "no upgrade", bs_session_upgrade(session, &choice));
  REFUSED(BS_UNKNOWN_PRECISION, "no downgrade", bs_session_downgrade(session, &choice));
  choice.plan = "fast";
  REFUSED(BS_INVALID_ARGUMENT, "exactly one", bs_session_set(session, &choice));
  choice.precision = 0;
  REFUSED(BS_UNKNOWN_PRECISION, "fast", bs_session_set(session, &choice));
  choice.plan = NULL;
  REFUSED(BS_INVALID_ARGUMENT, "exactly one", bs_session_set(session, &choice));
  choice.map = map;
  choice.map_count = 2;
  REFUSED(BS_INVALID_ARGUMENT, "map_count is 2", bs_session_set(session, &choice));
  choice.map_count = 3;
  map[1] = 9;
  REFUSED(BS_UNKNOWN_PRECISION, "9", bs_session_set(session, &choice));
  map[1] = 3;
  EXPECT(bs_session_upgrade(session, &choice) == BS_OK);
  EXPECT(bs_session_map(session, map, 3) == BS_OK && map[0] == 1 && map[1] == 3 && map[2] == 1);
  for (i = 1; i <= 4; ++i) {
    choice = bits((int32_t)i);
    EXPECT(bs_session_set(session, &choice) == BS_OK);
  }
  bs_artifact_free(artifact); /* the session goes on without */
  EXPECT(bs_session_state(session, &state) == BS_OK && state.threads == 1 && state.scale > 0 && state.isa != NULL);
  EXPECT(state.code_bytes > 0 && state.factor_bytes > 0 && state.packed_bytes > 0 && state.arena_bytes > 0);
  bs_session_free(session);
}

static void test_runs(void) {
  bs_artifact* artifact;
  bs_session* session;
  bs_output output = BS_OUTPUT_INIT;
  uint8_t* pixels = calloc(2, pixels_bytes);
  float* values = calloc(2 * pixels_bytes, sizeof(float));
  float* logits = calloc(2 * classes, sizeof(float));
  char* work = malloc(64);
  EXPECT(bs_artifact_open(good, &artifact) == BS_OK);
  EXPECT(bs_session_create(artifact, NULL, &session) == BS_OK);
  REFUSED(BS_INVALID_ARGUMENT, "output is NULL", bs_run_u8(session, pixels, pixels_bytes, 1, NULL, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "output->logits and", bs_run_u8(session, pixels, pixels_bytes, 1, &output, NULL, 0));
  output.logits = logits;
  output.count = classes;
  REFUSED(BS_INVALID_ARGUMENT, "pixels is NULL", bs_run_u8(session, NULL, pixels_bytes, 1, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "values is NULL", bs_run_f32(session, NULL, pixels_bytes, 1, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "count is", bs_run_u8(session, pixels, pixels_bytes - 1, 1, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "count is", bs_run_u8(session, pixels, pixels_bytes, 2, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "too many", bs_run_u8(session, pixels, pixels_bytes, (size_t)-1, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "output->count is", bs_run_u8(session, pixels, 2 * pixels_bytes, 2, &output, NULL, 0));
  REFUSED(BS_INVALID_ARGUMENT, "work_bytes is 8", bs_run_u8(session, pixels, pixels_bytes, 1, &output, work, 8));
  output.count = 2 * classes;
  EXPECT(bs_run_u8(session, pixels, 0, 0, &output, NULL, 0) == BS_OK); /* no images */
  EXPECT(bs_run_u8(session, pixels, 2 * pixels_bytes, 2, &output, NULL, 0) == BS_OK && output.scale > 0);
  EXPECT(bs_run_f32(session, values, 2 * pixels_bytes, 2, &output, NULL, 0) == BS_OK);
  values[pixels_bytes + 3] = (float)NAN;
  REFUSED(BS_INVALID_ARGUMENT, "must be finite", bs_run_f32(session, values, 2 * pixels_bytes, 2, &output, NULL, 0));
  values[pixels_bytes + 3] = (float)-INFINITY;
  REFUSED(BS_INVALID_ARGUMENT, "must be finite", bs_run_f32(session, values, 2 * pixels_bytes, 2, &output, NULL, 0));
  values[pixels_bytes + 3] = 1.5F;
  REFUSED(BS_INVALID_ARGUMENT, "[0, 1]", bs_run_f32(session, values, 2 * pixels_bytes, 2, &output, NULL, 0));
  free(pixels);
  free(values);
  free(logits);
  free(work);
  bs_session_free(session);
  bs_artifact_free(artifact);
}

/* In the caller's memory runs allocate nothing, stay inside it, and give what they give in the library's own. */
static void test_callers_memory(void) {
  enum { kBatch = 70 };
  bs_artifact* artifact;
  bs_session *session, *plain;
  bs_options options = BS_OPTIONS_INIT;
  bs_state state = BS_STATE_INIT;
  bs_output output = BS_OUTPUT_INIT;
  int32_t precision;
  const size_t count = kBatch * pixels_bytes;
  uint8_t* pixels = malloc(count);
  int32_t *expected = malloc(kBatch * classes * sizeof *expected), *found = malloc(kBatch * classes * sizeof *found);
  size_t i;
  for (i = 0; i < count; ++i) pixels[i] = (uint8_t)(i * 2654435761U >> 13);
  options.callers_memory = 1;
  EXPECT(bs_artifact_open(good, &artifact) == BS_OK);
  EXPECT(bs_session_create(artifact, &options, &session) == BS_OK);
  EXPECT(bs_session_create(artifact, NULL, &plain) == BS_OK);
  output.count = kBatch * classes;
  output.integers = found;
  REFUSED(BS_INVALID_ARGUMENT, "work is NULL", bs_run_u8(session, pixels, count, kBatch, &output, NULL, 0));
  for (precision = 1; precision <= 4; ++precision) {
    const bs_choice choice = bits(precision);
    char *block, *work;
    EXPECT(bs_session_set(session, &choice) == BS_OK && bs_session_set(plain, &choice) == BS_OK);
    EXPECT(bs_session_state(session, &state) == BS_OK && state.arena_bytes == 0 && state.work_alignment == 64);
    block = malloc(state.work_bytes + 192);
    work = aligned(block + 64);
    memset(block, 0xA5, state.work_bytes + 192);
    REFUSED(BS_INVALID_ARGUMENT, "aligned",
            bs_run_u8(session, pixels, count, kBatch, &output, work + 1, state.work_bytes));
    output.integers = expected;
    EXPECT(bs_run_u8(plain, pixels, count, kBatch, &output, NULL, 0) == BS_OK);
    output.integers = found;
#ifdef COUNTS_ALLOCATIONS
    allocations = 0;
#endif
    EXPECT(bs_run_u8(session, pixels, count, kBatch, &output, work, state.work_bytes) == BS_OK);
#ifdef COUNTS_ALLOCATIONS
    EXPECT(allocations == 0);
#endif
    EXPECT(memcmp(expected, found, kBatch * classes * sizeof *found) == 0);
    for (i = 0; i < 32; ++i) EXPECT((uint8_t)work[-1 - (long)i] == 0xA5 && (uint8_t)work[state.work_bytes + i] == 0xA5);
    free(block);
  }
#ifdef COUNTS_ALLOCATIONS
  free(malloc(1));
  EXPECT(allocations > 0); /* they are counted */
#endif
  free(pixels);
  free(expected);
  free(found);
  bs_session_free(session);
  bs_session_free(plain);
  bs_artifact_free(artifact);
}

/* Runs from several threads while the precision changes: each result is one precision's. */
enum { kThreads = 3, kRuns = 200 };
typedef struct {
  bs_session* session;
  const uint8_t* pixels;
  const int32_t* expected; /* of precisions 1 and 2 */
  int wrong;
} shared_t;

static void* serve(void* argument) {
  shared_t* shared = argument;
  int32_t* found = malloc(classes * sizeof *found);
  bs_output output = BS_OUTPUT_INIT;
  int i;
  output.integers = found;
  output.count = classes;
  for (i = 0; i < kRuns; ++i) {
    const size_t bytes = classes * sizeof *found;
    if (bs_run_u8(shared->session, shared->pixels, pixels_bytes, 1, &output, NULL, 0) != BS_OK ||
        (memcmp(found, shared->expected, bytes) != 0 && memcmp(found, shared->expected + classes, bytes) != 0))
      ++shared->wrong;
  }
  free(found);
  return NULL;
}

static void test_shared_session(void) {
  bs_artifact* artifact;
  bs_session* session;
  bs_output output = BS_OUTPUT_INIT;
  pthread_t threads[kThreads];
  shared_t shared[kThreads];
  uint8_t* pixels = malloc(pixels_bytes);
  int32_t *expected = malloc(2 * classes * sizeof *expected), precision;
  size_t i;
  for (i = 0; i < pixels_bytes; ++i) pixels[i] = (uint8_t)(37 * i);
  EXPECT(bs_artifact_open(good, &artifact) == BS_OK);
  EXPECT(bs_session_create(artifact, NULL, &session) == BS_OK);
  output.count = classes;
  for (precision = 1; precision <= 2; ++precision) {
    const bs_choice choice = bits(precision);
    EXPECT(bs_session_set(session, &choice) == BS_OK);
    output.integers = expected + (size_t)(precision - 1) * classes;
    EXPECT(bs_run_u8(session, pixels, pixels_bytes, 1, &output, NULL, 0) == BS_OK);
  }
  for (i = 0; i < kThreads; ++i) {
    const shared_t own = {session, pixels, expected, 0};
    shared[i] = own;
    EXPECT(pthread_create(&threads[i], NULL, serve, &shared[i]) == 0);
  }
  for (i = 0; i < kRuns; ++i) {
    const bs_choice choice = bits(1 + (int32_t)(i % 2));
    EXPECT(bs_session_set(session, &choice) == BS_OK);
  }
  for (i = 0; i < kThreads; ++i) {
    pthread_join(threads[i], NULL);
    EXPECT(shared[i].wrong == 0);
  }
  free(pixels);
  free(expected);
  bs_session_free(session);
  bs_artifact_free(artifact);
}

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  good = argv[1];
  pixels_bytes = (size_t)atol(argv[4]);
  classes = (size_t)atol(argv[5]);
  EXPECT(strcmp(bs_last_error(), "") == 0);
  test_versions();
  test_null();
  test_artifacts(argv[2], argv[3]);
  test_choices();
  test_runs();
  test_callers_memory();
  test_shared_session();
#ifdef COUNTS_ALLOCATIONS
  printf("allocations counted\n");
#endif
  if (failures == 0) printf("ok\n");
  return failures != 0;
}
