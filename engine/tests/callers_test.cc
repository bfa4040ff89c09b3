// Graphs that share resources, called by several threads at once: every result is that of one caller on one thread, the
// memory stays within its bound, and a caller alone allocates nothing. Built with a thread sanitizer too.
#include "bitstrata/graph.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "bitstrata/dispatch.h"

namespace {
std::atomic<int64_t> allocations{0};
}

// Not inlined: where they are, compilers take malloc and free for what does not belong to new and delete.
#define NOT_INLINED __attribute__((noinline))
NOT_INLINED void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes > 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}
NOT_INLINED void* operator new(size_t bytes, std::align_val_t align) {
  ++allocations;
  const size_t unit = static_cast<size_t>(align);
  if (void* p = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit)) return p;
  throw std::bad_alloc();
}
NOT_INLINED void operator delete(void* p) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, size_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace bitstrata::test {
namespace {

constexpr int64_t kSide = 12, kChannels = 20, kMost = 11;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

uint32_t next(uint32_t* state) { return *state = *state * 1664525u + 1013904223u, *state >> 16; }

// Two convolutions with requantizations, a residual addition, clipping and a pool, at one weight width.
std::unique_ptr<Graph> make_graph(const std::string& isa, std::shared_ptr<Resources> resources, int bits) {
  auto graph = std::make_unique<Graph>(isa, std::move(resources));
  uint32_t state = static_cast<uint32_t>(bits);
  std::vector<int8_t> codes(static_cast<size_t>(kChannels * kChannels * 9));
  const std::vector<int32_t> pad(kChannels, 0), multiplier(kChannels, 3);
  const std::vector<int64_t> bias(kChannels, 1 << 8);
  const std::vector<uint8_t> few(kChannels, 3), many(kChannels, 8);
  const auto conv = [&](int x) {
    for (int8_t& code : codes)
      code = static_cast<int8_t>(static_cast<int>(next(&state) % (1u << bits)) - (1 << (bits - 1)));
    return graph->conv(
        "conv", x,
        {codes.data(), {kChannels, kChannels, 3, 3}, pad.data(), kChannels, 2, 1, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1});
  };
  const auto requant = [&](int x, const std::vector<uint8_t>& shift, int64_t lo, int64_t hi, DType dtype) {
    return graph->requant("requant", x, {multiplier.data(), bias.data(), shift.data(), kChannels, lo, hi, dtype});
  };
  const int first = conv(graph->input({kSide, kSide, kChannels}, DType::u8, 0, 15));
  const int kept = requant(first, few, -100000, 100000, DType::i32);
  const int second = conv(requant(first, many, 0, 15, DType::u8));
  const int sum = graph->add("sum", requant(second, few, -100000, 100000, DType::i32), kept, 0, 1);
  const int clipped = graph->clip("clip", sum, -5000, 7000);
  graph->finish(graph->sum_pool("pool", clipped, {{4, 4}, {4, 4}, {0, 0, 0, 0}}, 2));
  return graph;
}

std::vector<uint8_t> pixels(int64_t batch, uint32_t seed) {
  std::vector<uint8_t> x(static_cast<size_t>(batch * kSide * kSide * kChannels));
  for (uint8_t& v : x) v = static_cast<uint8_t>(next(&seed) % 16);
  return x;
}

std::vector<int32_t> result_of(const Graph& graph, const std::vector<uint8_t>& x, int64_t batch,
                               void* memory = nullptr) {
  std::vector<int32_t> out(static_cast<size_t>(batch * graph.value(graph.output()).shape.elements()));
  std::vector<void*> destinations(static_cast<size_t>(graph.values()), nullptr);
  destinations[static_cast<size_t>(graph.output())] = out.data();
  if (memory != nullptr)
    graph.run_in(memory, x.data(), batch, destinations);
  else
    graph.run(x.data(), batch, destinations);
  return out;
}

void check_alone(const std::string& isa, int threads) {
  const auto graph = make_graph(isa, std::make_shared<Resources>(threads), 3);
  for (const int64_t batch : {int64_t{1}, kMost}) {
    const std::vector<uint8_t> x = pixels(batch, 5);
    std::vector<int32_t> out(static_cast<size_t>(batch * graph->value(graph->output()).shape.elements()));
    std::vector<void*> destinations(static_cast<size_t>(graph->values()), nullptr);
    destinations[static_cast<size_t>(graph->output())] = out.data();
    const int64_t before = allocations;
    for (int i = 0; i < 3; ++i) graph->run(x.data(), batch, destinations);
    require(allocations == before, "a caller alone allocates nothing, from the first run on");
    const auto one = make_graph("generic", std::make_shared<Resources>(1), 3);
    require(out == result_of(*one, x, batch), "threads and instruction sets change nothing");
    std::vector<uint8_t> memory(static_cast<size_t>(graph->run_bytes() + 64));
    uint8_t* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    require(out == result_of(*graph, x, batch, aligned), "the caller's memory changes nothing");
  }
}

void check_callers(const std::string& isa, int runs) {
  constexpr int kCallers = 4, kThreads = 2, kAllowed = 3;
  const auto resources = std::make_shared<Resources>(kThreads, kAllowed);
  const std::unique_ptr<Graph> graphs[] = {make_graph(isa, resources, 1), make_graph(isa, resources, 4)};
  const std::vector<uint8_t> x = pixels(kMost, 9);
  std::vector<std::vector<int32_t>> expected;
  for (const auto& graph : graphs)
    for (const int64_t batch : {int64_t{1}, kMost}) expected.push_back(result_of(*graph, x, batch));
  require(expected[1] != expected[3], "the graphs differ");

  std::atomic<int> wrong{0};
  std::atomic<bool> over{false};
  int64_t most = 0;
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c)
    callers.emplace_back([&, c] {
      for (int i = 0; i < runs; ++i) {
        const int g = (i + c) % 2, large = (i / 2 + c) % 2;
        if (result_of(*graphs[g], x, large != 0 ? kMost : 1) != expected[static_cast<size_t>(2 * g + large)]) ++wrong;
      }
    });
  std::thread changing([&] {
    for (int i = 0; !over; ++i) {
      resources->set_threads(i % 3 + 1);
      if (i % 5 == 0) resources->trim(graphs[1]->run_bytes());
      most = std::max(most, resources->bytes());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (std::thread& caller : callers) caller.join();
  over = true;
  changing.join();
  require(wrong == 0, "several callers get the results of one");
  const int64_t each = std::max(graphs[0]->run_bytes(), graphs[1]->run_bytes());
  // Teams of threads that are being replaced may each still be with one caller.
  require(most <= (kAllowed + 3 * (kAllowed + 1)) * each, "memory has a bound");
  resources->set_threads(1);
  resources->trim(each);
  require(resources->bytes() == each, "memory can be given back");
}

}  // namespace
}  // namespace bitstrata::test

// Arguments: runs of each caller, and the only instruction set.
int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 40;
  const std::vector<std::string> isas = argc > 2 ? std::vector<std::string>{argv[2]} : bitstrata::available_isas();
  for (const std::string& isa : isas) {
    for (const int threads : {1, 2, 3}) bitstrata::test::check_alone(isa, threads);
    bitstrata::test::check_callers(isa, runs);
    std::printf("%s: ok\n", isa.c_str());
  }
  return 0;
}
