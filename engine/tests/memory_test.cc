// Whole graphs on every instruction set available or emulated here, with 1, 2 and 3 threads, on buffers that touch
// unmapped pages, and from several threads at once: always the integers of the portable kernels on one thread.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../src/parallel.h"
#include "bitstrata/dispatch.h"
#include "bitstrata/graph.h"
#include "bitstrata/guard.h"
#include "bitstrata/profile.h"
#include "guarded.h"

namespace bitstrata::test {
namespace {

constexpr int64_t kMostImages = 7;

struct Sizes {
  int64_t h, w, in, mid, out;
};

// Adds operations with numbers that repeat from graph to graph.
class Builder {
 public:
  Builder(Graph* graph, uint64_t seed) : graph_(*graph), random_(seed) {}

  int conv(int x, int64_t out, int64_t kernel, int64_t stride, int64_t groups, int bits) {
    const int64_t in = graph_.value(x).shape.c, lo = -(int64_t{1} << (bits - 1)), hi = -lo - 1;
    std::vector<int8_t> codes(static_cast<size_t>(out * (in / groups) * kernel * kernel));
    for (int8_t& code : codes) code = static_cast<int8_t>(random_.in(lo, hi));
    std::vector<int32_t> pad(static_cast<size_t>(in));
    for (int32_t& code : pad) code = static_cast<int32_t>(random_.in(graph_.value(x).lo, graph_.value(x).hi));
    const int64_t p = kernel / 2;
    return graph_.conv("conv", x,
                       {codes.data(),
                        {out, in / groups, kernel, kernel},
                        pad.data(),
                        in,
                        2,
                        1,
                        {stride, stride},
                        {p, p, p, p},
                        {1, 1},
                        groups});
  }

  int requant(int x, int64_t lo, int64_t hi, DType dtype) {
    const int64_t channels = graph_.value(x).shape.c;
    std::vector<int32_t> multiplier(static_cast<size_t>(channels));
    std::vector<int64_t> bias(multiplier.size());
    std::vector<uint8_t> shift(multiplier.size());
    for (size_t c = 0; c < multiplier.size(); ++c) {
      multiplier[c] = static_cast<int32_t>(random_.in(-(1 << 20), 1 << 20));
      bias[c] = random_.in(-(int64_t{1} << 26), int64_t{1} << 26);
      shift[c] = static_cast<uint8_t>(random_.in(20, 26));
    }
    return graph_.requant("requant", x, {multiplier.data(), bias.data(), shift.data(), channels, lo, hi, dtype});
  }

 private:
  Graph& graph_;
  Random random_;
};

// Every operation, groups of several in tiles, values read twice.
std::unique_ptr<Graph> make_graph(const std::string& isa, int threads, const Sizes& s, int bits, uint64_t seed) {
  auto graph = std::make_unique<Graph>(isa, threads);
  Builder b(graph.get(), seed);
  const int64_t hi = (1 << bits) - 1;
  const int x = graph->input({s.h, s.w, s.in}, DType::u8, 0, 255);
  const int stem = b.requant(b.conv(x, s.mid, 3, 1, 1, 8), -1000, 1000, DType::i32);
  const int codes = b.requant(stem, 0, hi, DType::u8);
  const int branch = b.requant(b.conv(codes, s.mid, 3, 1, 1, bits), -1000, 1000, DType::i32);
  const int sum = graph->clip("clip", graph->add("add", stem, branch, 1, -1), -900, 1200);
  const int depthwise =
      b.requant(b.conv(b.requant(sum, -hi / 2, hi / 2, DType::s8), s.mid, 3, 2, s.mid, bits), 0, hi, DType::u8);
  const int wide = b.requant(b.conv(depthwise, s.out, 1, 1, 1, bits), -1000, 1000, DType::i32);
  const Shape shape = graph->value(wide).shape;
  const int cut = graph->slice("slice", sum, {0, s.h, 2}, {0, s.w, 2}, {0, std::min(s.mid, s.out), 1});
  const int padded = graph->pad("pad", cut, {0, 0}, {0, 0}, {0, shape.c - graph->value(cut).shape.c});
  const int joined = graph->add("add", wide, padded, 0, 1);
  const int most = graph->max_pool("max_pool", joined, {{2, 2}, {1, 1}, {1, 0, 0, 1}});
  const int mean = graph->sum_pool("sum_pool", most, {{2, 2}, {2, 2}, {0, 1, 1, 0}}, 2);
  const int last = graph->sum_codes("sum_codes", b.requant(mean, 0, 63, DType::u8), {{2, 1}, {1, 1}, {1, 0, 0, 0}});
  graph->finish(
      b.requant(b.conv(graph->flatten("flatten", last), 10, 1, 1, 1, bits), INT32_MIN, INT32_MAX, DType::i32));
  return graph;
}

using Buffers = std::vector<std::unique_ptr<Guarded>>;

// Buffers for each value of `batch` images; with `all` false, for the output only.
Buffers buffers(const Graph& graph, int64_t batch, Edge edge, bool all) {
  Buffers made(static_cast<size_t>(graph.values()));
  for (int v = 0; v < graph.values(); ++v)
    if (all || v == graph.output())
      made[static_cast<size_t>(v)] =
          std::make_unique<Guarded>(batch * graph.value(v).bytes(), edge, size_of(graph.value(v).dtype));
  return made;
}

std::vector<void*> pointers(const Buffers& buffers) {
  std::vector<void*> all;
  for (const auto& buffer : buffers) all.push_back(buffer == nullptr ? nullptr : buffer->get());
  return all;
}

void compare(const Graph& graph, const Buffers& found, const Buffers& expected, int64_t batch, const char* what) {
  for (int v = 0; v < graph.values(); ++v) {
    const auto& got = found[static_cast<size_t>(v)];
    if (got == nullptr) continue;
    const std::string where = "value " + std::to_string(v) + ", " + std::to_string(graph.threads()) + " threads";
    for (int64_t i = 0; i < batch * graph.value(v).bytes(); ++i)
      expect_equal(graph.isa(), what, where.c_str(), i, got->get<uint8_t>()[i],
                   expected[static_cast<size_t>(v)]->get<uint8_t>()[i]);
  }
}

// Calls of one graph from several threads at once, one of them with a profile.
void run_at_once(Graph& graph, const Guarded& images, const Buffers& expected) {
  Profile profile(graph.values() - 1, graph.threads());
  std::vector<std::thread> callers;
  std::vector<Buffers> results;
  for (int i = 0; i < 3; ++i) results.push_back(buffers(graph, kMostImages, Edge::end, i == 1));
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&, i] {
      for (int64_t batch : {int64_t{1}, kMostImages})
        graph.run(images.get(), batch, pointers(results[static_cast<size_t>(i)]), i == 0 ? &profile : nullptr);
    });
  for (std::thread& caller : callers) caller.join();
  for (const Buffers& found : results) compare(graph, found, expected, kMostImages, "at once");
  for (const Profile::Run& run : profile.runs()) {
    double sum = 0;
    for (double seconds : run.ops) sum += seconds;
    expect_equal(graph.isa(), "profile", "operations within the run", 0,
                 sum > 0 && sum <= run.seconds * graph.threads() * 1.05, 1);
  }
  expect_equal(graph.isa(), "profile", "runs", 0, static_cast<int64_t>(profile.runs().size()), 2);
}

void test_graph(const std::string& isa, const Sizes& s, int bits, uint64_t seed) {
  const auto plain = make_graph("generic", 1, s, bits, seed);
  const Guarded images(kMostImages * plain->value(0).bytes(), Edge::end);
  Random random(seed + 99);
  for (int64_t i = 0; i < kMostImages * plain->value(0).bytes(); ++i)
    images.get<uint8_t>()[i] = static_cast<uint8_t>(random.in(0, 255));
  const Buffers expected = buffers(*plain, kMostImages, Edge::end, true);
  plain->run(images.get(), kMostImages, pointers(expected));
  for (int threads : {1, 2, 3}) {
    const auto graph = make_graph(isa, threads, s, bits, seed);
    for (int64_t batch : {int64_t{1}, int64_t{2}, kMostImages})
      for (const auto& [edge, all] : {std::pair(Edge::end, true), {Edge::begin, true}, {Edge::end, false}}) {
        const Buffers found = buffers(*graph, batch, edge, all);
        graph->run(images.get(), batch, pointers(found));
        compare(*graph, found, expected, batch, all ? "all values" : "output");
      }
    run_at_once(*graph, images, expected);
  }
}

// Loops from several threads at once take turns with the one pool.
void test_parallel_loops() {
  std::vector<std::thread> callers;
  std::vector<std::vector<int>> counts(3, std::vector<int>(1000));
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&counts, i] {
      for (int threads : {1, 2, 3, 2})
        parallel_for(threads, 1000, 7, [&](int64_t begin, int64_t end) {
          for (int64_t at = begin; at < end; ++at) ++counts[static_cast<size_t>(i)][static_cast<size_t>(at)];
        });
    });
  for (std::thread& caller : callers) caller.join();
  for (const auto& count : counts)
    for (int64_t at = 0; at < 1000; ++at)
      expect_equal("all", "parallel_for", "visits", at, count[static_cast<size_t>(at)], 4);
}

int run_all() {
  test_parallel_loops();
  std::vector<std::string> isas = available_isas();
  for (const std::string& isa : emulated_isas()) isas.push_back(isa);
  for (const std::string& isa : isas) {
    uint64_t seed = 0;
    if (!guard_memory(true)) return 1;
    for (int bits : {1, 2, 4, 8}) test_graph(isa, {7, 9, 3, 5, 7}, bits, ++seed);
    test_graph(isa, {13, 11, 3, 33, 66}, 4, ++seed);  // enough work for threads to share an image
    if (!guard_memory(false)) return 1;               // the allocations of every day, which sanitizers watch
    test_graph(isa, {7, 9, 3, 5, 7}, 4, ++seed);
    std::printf("%s: %s\n", isa.c_str(), failures == 0 ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bitstrata::test

int main() { return bitstrata::test::run_all(); }
