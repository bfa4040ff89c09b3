/* C interface of the bitstrata engine: open an artifact, run it in integers, change its precision while it serves.
 *
 *   bs_artifact *artifact;
 *   bs_session *session;
 *   bs_artifact_open("net.strata", &artifact);
 *   bs_session_create(artifact, NULL, &session);
 *   bs_output output = BS_OUTPUT_INIT;
 *   output.logits = logits, output.count = classes;
 *   bs_run_u8(session, pixels, pixel_count, 1, &output, NULL, 0);
 *
 * Functions return a status, except bs_last_error, bs_status_name and the two that free, which take NULL. On anything
 * but BS_OK, outputs and handles are as they were, and bs_last_error tells function, argument, value and cause. NULL
 * where a pointer is required is BS_INVALID_ARGUMENT.
 *
 * Versions. A structure begins with its size, which the caller sets (the BS_..._INIT macros do): new members are added
 * at the end and take their default where the caller's structure lacks them; bs_file alone stays as it is. Functions
 * are added, never changed.
 *
 * Threads. Every function may be called from several threads at once, on the same handles too, but a handle must not be
 * freed while it is in use. A session may be shared: runs that are under way when its precision changes finish at the
 * precision they started with. Results do not depend on threads, batch or instruction set. A session keeps what it
 * needs of its artifact, so either may be freed first.
 *
 * Arrays of images are N, C, H, W, contiguous, in the machine's byte order. Memory is in bytes. Strings are UTF-8,
 * end with a zero byte and live as long as the handle that gave them.
 */
#ifndef BITSTRATA_H
#define BITSTRATA_H

#include <stddef.h>
#include <stdint.h>

#define BS_API_VERSION 1 /* grows when functions or members are added */

#if defined(__GNUC__)
#define BS_API __attribute__((visibility("default")))
#else
#define BS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t bs_status;
enum {
  BS_OK = 0,
  BS_INVALID_ARGUMENT = 1,  /* NULL, a wrong size or value, input that is not finite or outside its range */
  BS_UNREADABLE = 2,        /* a file of the artifact is missing or cannot be read */
  BS_INVALID_ARTIFACT = 3,  /* a file is not what the format or the manifest says */
  BS_NEWER_FORMAT = 4,      /* the artifact is of a format version that this library does not know */
  BS_UNKNOWN_PRECISION = 5, /* no such precision, plan or layer; or not in the direction asked for */
  BS_NOT_DERIVABLE = 6,     /* the program has no proved integer constants at this precision */
  BS_UNSUPPORTED = 7,       /* an instruction set that this build or processor lacks */
  BS_OUT_OF_MEMORY = 8,
  BS_INTERNAL = 9 /* a fault of the library */
};

/* The message of the last call on this thread that did not return BS_OK; "" before. Valid until the next such call. */
BS_API const char* bs_last_error(void);
/* The name of a status, such as "BS_OK". */
BS_API const char* bs_status_name(bs_status status);

/* BS_API_VERSION of the library that is loaded, and the highest format version of artifacts that it reads. */
BS_API bs_status bs_version(uint32_t* api_version, uint32_t* format_version);

/* Instruction sets that this build and this processor have, slowest first; name lives as long as the library. */
BS_API bs_status bs_isa_count(size_t* count);
BS_API bs_status bs_isa_name(size_t index, const char** name);

/* ---- Artifacts --------------------------------------------------------------------------------------------------- */

typedef struct bs_artifact bs_artifact;

/* A file of an artifact in memory. */
typedef struct bs_file {
  const char* name; /* "manifest.json", "base.safetensors", ... */
  const void* data;
  uint64_t bytes;
} bs_file;

/* Where files come from, if not from a directory. Functions return 0 on success, anything else if the file is missing
 * or cannot be read. They are called one at a time for an artifact, from the thread that opens it or changes a
 * precision, and must not call this library with that artifact or its sessions. */
typedef struct bs_source {
  size_t struct_size;
  void* user; /* passed on */
  int (*size)(void* user, const char* name, uint64_t* bytes);
  int (*read)(void* user, const char* name, void* data, uint64_t bytes); /* all `bytes` of the file, into data */
  void (*close)(void* user);                                             /* when it is used no more; NULL: nothing */
} bs_source;

/* Reads and checks manifest.json and nothing else; other files are read when a session needs them, each once.
 * files: what is at hand, the manifest among it. It is read where it is, so data must stay as it is until the artifact
 * and its sessions have been freed. */
BS_API bs_status bs_artifact_open(const char* directory, bs_artifact** artifact);
BS_API bs_status bs_artifact_open_files(const bs_file* files, size_t count, bs_artifact** artifact);
BS_API bs_status bs_artifact_open_source(const bs_source* source, bs_artifact** artifact);
BS_API void bs_artifact_free(bs_artifact* artifact);

/* Gives the bytes of a file that the artifact has not read yet, such as a further bit-plane that arrived by radio.
 * Copied; it takes the place of the artifact's own source for that file, and is checked when a precision needs it. */
BS_API bs_status bs_artifact_supply(bs_artifact* artifact, const bs_file* file);

enum { BS_PIXELS = 0, BS_CODES = 1 };

typedef struct bs_info {
  size_t struct_size;
  int32_t input_kind;      /* BS_PIXELS: uint8, or floats in [0, 1]. BS_CODES: floats, normalized as in training */
  int32_t input_shape[3];  /* C, H, W */
  int32_t output_shape[3]; /* C, H, W; H = W = 1 for classes */
  size_t precisions, plans, layers; /* how many there are */
  char sha256[65];                  /* names the artifact */
} bs_info;
#define BS_INFO_INIT {sizeof(bs_info), 0, {0}, {0}, 0, 0, 0, {0}}

typedef struct bs_layer {
  size_t struct_size;
  const char* name;
  int32_t shape[4]; /* out, in / groups, kernel height, kernel width */
  int32_t source_bits;
  int32_t planes;    /* 1: its codes are spread over the strata, 0: they are resident */
  int32_t held_bits; /* of its codes that have been read so far */
} bs_layer;
#define BS_LAYER_INIT {sizeof(bs_layer), NULL, {0}, 0, 0, 0}

BS_API bs_status bs_artifact_info(const bs_artifact* artifact, bs_info* info);
BS_API bs_status bs_artifact_precision(const bs_artifact* artifact, size_t index, int32_t* precision);
BS_API bs_status bs_artifact_plan(const bs_artifact* artifact, size_t index, const char** name);
BS_API bs_status bs_artifact_layer(const bs_artifact* artifact, size_t index, bs_layer* layer);

/* What a network runs at: exactly one of a precision of all layers, the name of a plan, or a precision of each layer in
 * the artifact's order. */
typedef struct bs_choice {
  size_t struct_size;
  int32_t precision; /* 0: one of the others */
  const char* plan;
  const int32_t* map;
  size_t map_count; /* as many as there are layers */
} bs_choice;
#define BS_CHOICE_INIT {sizeof(bs_choice), 0, NULL, NULL, 0}

/* The files that a choice needs and that have not been read yet, in the order in which they are read. data is NULL. */
BS_API bs_status bs_artifact_missing_count(const bs_artifact* artifact, const bs_choice* choice, size_t* count);
BS_API bs_status bs_artifact_missing(const bs_artifact* artifact, const bs_choice* choice, size_t index, bs_file* file);

/* ---- Sessions ---------------------------------------------------------------------------------------------------- */

typedef struct bs_session bs_session;

typedef struct bs_options {
  size_t struct_size;
  const bs_choice* choice; /* NULL: the narrowest precision */
  const char* isa;         /* NULL: what the variable BITSTRATA_ISA names, else the fastest */
  int32_t threads;         /* 1 to 256 */
  int32_t callers_memory;  /* 1: every run brings its work memory, the session keeps none of its own */
} bs_options;
#define BS_OPTIONS_INIT {sizeof(bs_options), NULL, NULL, 1, 0}

/* Reads what the choice needs and gets ready to run. options: NULL for the defaults. */
BS_API bs_status bs_session_create(bs_artifact* artifact, const bs_options* options, bs_session** session);
BS_API void bs_session_free(bs_session* session);

/* Changes the precision, reading what is missing. Upgrade and downgrade do so only if some layers are raised and none
 * lowered, or the reverse. Going back to one of the last few precisions takes microseconds. */
BS_API bs_status bs_session_set(bs_session* session, const bs_choice* choice);
BS_API bs_status bs_session_upgrade(bs_session* session, const bs_choice* choice);
BS_API bs_status bs_session_downgrade(bs_session* session, const bs_choice* choice);

typedef struct bs_state {
  size_t struct_size;
  const char* isa; /* whose kernels run; lives as long as the library */
  int32_t threads;
  double scale;            /* logits = scale * integer, at the present precision */
  uint64_t work_bytes;     /* that a run at the present precision needs of a caller's memory */
  uint64_t work_alignment; /* of that memory */
  uint64_t code_bytes;     /* weight codes that the artifact holds, one byte a code */
  uint64_t factor_bytes;   /* real factors that the artifact holds */
  uint64_t packed_bytes;   /* weights and constants in the kernels' forms, of all precisions kept ready */
  uint64_t arena_bytes;    /* of the library's own working memory, so far */
} bs_state;
#define BS_STATE_INIT {sizeof(bs_state), NULL, 0, 0.0, 0, 0, 0, 0, 0, 0}

BS_API bs_status bs_session_state(const bs_session* session, bs_state* state);
/* The present precision of each layer; count must be the number of layers. */
BS_API bs_status bs_session_map(const bs_session* session, int32_t* precisions, size_t count);

typedef struct bs_output {
  size_t struct_size;
  float* logits;     /* batch images of output_shape, or NULL */
  int32_t* integers; /* the same in integers, exact, or NULL */
  size_t count;      /* elements that each given array has room for */
  double scale;      /* set by the run: logits = scale * integer */
} bs_output;
#define BS_OUTPUT_INIT {sizeof(bs_output), NULL, NULL, 0, 0.0}

/* Runs `batch` images. count: elements of the input, which must be batch * C * H * W.
 * bs_run_u8: pixels of a network on pixels. bs_run_f32: real pixels in [0, 1], which are multiplied by 255 and rounded;
 * or, for a network on codes, normalized values, which are rounded to the input's grid. All must be finite. work: NULL,
 * or memory that nothing else uses during the run, of work_bytes >= bs_state.work_bytes, aligned to
 * bs_state.work_alignment; then the run allocates nothing and uses the caller's thread alone. With NULL, the library's
 * own memory is used, and kept, and all threads of the session. */
BS_API bs_status bs_run_u8(bs_session* session, const uint8_t* pixels, size_t count, size_t batch, bs_output* output,
                           void* work, size_t work_bytes);
BS_API bs_status bs_run_f32(bs_session* session, const float* values, size_t count, size_t batch, bs_output* output,
                            void* work, size_t work_bytes);

#ifdef __cplusplus
}
#endif

#endif
