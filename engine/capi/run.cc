// Runs: images in, logits or integers out, in the library's memory or in the caller's.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "handles.h"
#include "status.h"

namespace bitstrata::capi {
namespace {

constexpr int64_t kTransposed = 64;  // pixels whose channels are brought together at once

size_t aligned(size_t bytes) { return (bytes + kWorkAlignment - 1) / kWorkAlignment * kWorkAlignment; }

const Value& input_of(const Ready& r) { return r.graph.value(0); }
const Value& output_of(const Ready& r) { return r.graph.value(r.graph.output()); }

// Of a run's memory: the input's codes and the output's integers of some images.
size_t codes_bytes(const Ready& r, int64_t images) {
  return aligned(static_cast<size_t>(input_of(r).bytes() * images));
}
size_t result_bytes(const Ready& r, int64_t images) {
  return aligned(static_cast<size_t>(output_of(r).bytes() * images));
}

// Calls convert(i, c) for the element of a (C, H, W) image whose place in (H, W, C) is i, and whose own is c * pixels +
// p.
template <typename Convert>
void for_each_element(const Shape& shape, const Convert& convert) {
  const int64_t pixels = shape.pixels();
  for (int64_t begin = 0; begin < pixels; begin += kTransposed) {
    const int64_t end = std::min(begin + kTransposed, pixels);
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t p = begin; p < end; ++p) convert(p * shape.c + c, c * pixels + p, c);
  }
}

void encode(const Ready& r, bool, const uint8_t* image, uint8_t* codes) {
  for_each_element(input_of(r).shape, [&](int64_t to, int64_t from, int64_t) { codes[to] = image[from]; });
}

// numerics.md, section 5: the one rounding that floats see.
void encode(const Ready& r, bool pixels, const float* image, uint8_t* codes) {
  const double lo = input_of(r).lo, hi = input_of(r).hi;
  for_each_element(input_of(r).shape, [&](int64_t to, int64_t from, int64_t c) {
    const double x = image[from];
    const double code = std::nearbyint(pixels ? x * 255.0 : x / r.input_step - r.input_offset[static_cast<size_t>(c)]);
    codes[to] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(code, lo), hi)));
  });
}

void decode(const Ready& r, const int32_t* result, int64_t image, bs_output* output) {
  const Shape& shape = output_of(r).shape;
  float* logits = output->logits != nullptr ? output->logits + image * shape.elements() : nullptr;
  int32_t* integers = output->integers != nullptr ? output->integers + image * shape.elements() : nullptr;
  for_each_element(shape, [&](int64_t from, int64_t to, int64_t) {
    if (logits != nullptr) logits[to] = static_cast<float>(r.scale * result[from]);
    if (integers != nullptr) integers[to] = result[from];
  });
}

// What a run was called with.
template <typename T>
struct Request {
  const char* argument;  // what the function calls its input
  const T* input;
  size_t count, batch;
  bs_output* output;
  uint8_t* work;
  size_t work_bytes;
};

void check_count(const char* argument, size_t count, size_t batch, const Shape& shape, bool exact) {
  const auto elements = static_cast<size_t>(shape.elements());
  const bool fits = batch <= static_cast<size_t>(INT64_MAX) / 8 / elements;
  if (fits && (exact ? count == batch * elements : count >= batch * elements)) return;
  invalid(std::string(argument) + " is " + std::to_string(count) + ", " + std::to_string(batch) +
          " images of (C, H, W) = (" + std::to_string(shape.c) + ", " + std::to_string(shape.h) + ", " +
          std::to_string(shape.w) + ") have " + (fits ? std::to_string(batch * elements) : "too many") + " elements");
}

void check_values(const Program& program, const uint8_t*, size_t) {
  if (!program.pixels) invalid("the network's input are real values, not pixels; use bs_run_f32");
}

void check_values(const Program& program, const float* x, size_t count) {
  const float least = program.pixels ? 0.0F : -FLT_MAX, most = program.pixels ? 1.0F : FLT_MAX;
  bool outside = false;  // a reduction that compilers vectorize
  for (size_t i = 0; i < count; ++i) outside |= !(x[i] >= least) | !(x[i] <= most);
  if (!outside) return;
  const float* at = std::find_if(x, x + count, [&](float v) { return !(v >= least && v <= most); });
  invalid("values[" + std::to_string(at - x) + "] is " + std::to_string(*at) + ", " +
          (std::isfinite(*at) ? "real pixels must lie in [0, 1]" : "must be finite"));
}

void check_output(const Ready& r, size_t batch, const bs_output& output) {
  if (output.logits == nullptr && output.integers == nullptr) invalid("output->logits and output->integers are NULL");
  check_count("output->count", output.count, batch, output_of(r).shape, false);
}

void check_work(const Ready& r, const uint8_t* work, size_t bytes) {
  if (bytes < work_bytes(r))
    invalid("work_bytes is " + std::to_string(bytes) + ", the present precision needs " +
            std::to_string(work_bytes(r)));
  if (reinterpret_cast<uintptr_t>(work) % kWorkAlignment != 0)
    invalid("work is not aligned to " + std::to_string(kWorkAlignment) + " bytes");
}

template <typename T>
void run_images(const Ready& r, bool pixels, const Request<T>& q, uint8_t* staging, int64_t step) {
  auto* codes = staging;
  auto* result = reinterpret_cast<int32_t*>(staging + codes_bytes(r, step));
  const Value &in = input_of(r), &out = output_of(r);
  for (int64_t begin = 0; begin < static_cast<int64_t>(q.batch); begin += step) {
    const int64_t images = std::min(step, static_cast<int64_t>(q.batch) - begin);
    for (int64_t i = 0; i < images; ++i)
      encode(r, pixels, q.input + (begin + i) * in.shape.elements(), codes + i * in.bytes());
    if (q.work != nullptr)
      r.graph.run_in(q.work, codes, images, static_cast<void*>(result));
    else
      r.graph.run(codes, images, static_cast<void*>(result));
    for (int64_t i = 0; i < images; ++i) decode(r, result + i * out.shape.elements(), begin + i, q.output);
  }
}

template <typename T>
void run(Session& session, const Request<T>& q) {
  const std::shared_ptr<const Ready> ready = session.current();
  const Program& program = session.artifact().program();
  check_size(required(q.output, "output"), "output");
  if (q.count > 0) required(q.input, q.argument);
  check_count("count", q.count, q.batch, input_of(*ready).shape, true);
  check_values(program, q.input, q.count);
  check_output(*ready, q.batch, *q.output);
  const int64_t chunk = ready->graph.chunk();
  if (q.work != nullptr) {
    check_work(*ready, q.work, q.work_bytes);
    run_images(*ready, program.pixels, q, q.work + aligned(static_cast<size_t>(ready->graph.run_bytes())), chunk);
  } else {
    if (session.callers_memory()) invalid("work is NULL, but the session was created with callers_memory");
    const int64_t step =
        std::max<int64_t>(std::min<int64_t>(chunk * ready->graph.threads(), static_cast<int64_t>(q.batch)), 1);
    Session::Buffer buffer = session.take_buffer(codes_bytes(*ready, step) + result_bytes(*ready, step));
    run_images(*ready, program.pixels, q, buffer.data(), step);
    session.give_back(std::move(buffer));
  }
  q.output->scale = ready->scale;
}

}  // namespace

uint64_t work_bytes(const Ready& r) {
  const int64_t images = r.graph.chunk();
  return aligned(static_cast<size_t>(r.graph.run_bytes())) + codes_bytes(r, images) + result_bytes(r, images);
}

}  // namespace bitstrata::capi

using bitstrata::capi::guarded;
using bitstrata::capi::Request;
using bitstrata::capi::required;

extern "C" {

bs_status bs_run_u8(bs_session* session, const uint8_t* pixels, size_t count, size_t batch, bs_output* output,
                    void* work, size_t work_bytes) {
  return guarded("bs_run_u8", [&] {
    bitstrata::capi::run(
        required(session, "session").session,
        Request<uint8_t>{"pixels", pixels, count, batch, output, static_cast<uint8_t*>(work), work_bytes});
  });
}

bs_status bs_run_f32(bs_session* session, const float* values, size_t count, size_t batch, bs_output* output,
                     void* work, size_t work_bytes) {
  return guarded("bs_run_f32", [&] {
    bitstrata::capi::run(required(session, "session").session, Request<float>{"values", values, count, batch, output,
                                                                              static_cast<uint8_t*>(work), work_bytes});
  });
}

}  // extern "C"
