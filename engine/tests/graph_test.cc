// Whole graphs on every instruction set available or emulated here, on 1, 2 and 3 threads:
//   graph_test COUNT [FILE...]
// COUNT random graphs are compared with the generic kernels on one thread; each FILE holds a graph and what its values
// must be, as little-endian int64: the numbers of graph_numbers.h, the batch, the input's elements, then those of each
// further value.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bitstrata/dispatch.h"
#include "graph_numbers.h"
#include "guarded.h"
#include "random_graphs.h"

namespace bitstrata::test {
namespace {

using Elements = std::vector<int64_t>;  // of one value

struct Case {
  std::string name;
  std::vector<int64_t> numbers;  // of the graph
  int64_t batch;
  std::vector<Elements> values;  // the input, and all others
};

int64_t element(const Guarded& buffer, DType t, int64_t i) {
  if (t == DType::u8) return buffer.get<uint8_t>()[i];
  if (t == DType::s8) return buffer.get<int8_t>()[i];
  return buffer.get<int32_t>()[i];
}

// A buffer for a value; it ends, or begins, at an unmapped page.
std::unique_ptr<Guarded> buffer_of(const Value& v, int64_t batch, Edge edge) {
  return std::make_unique<Guarded>(batch * v.bytes(), edge, size_of(v.dtype));
}

std::unique_ptr<Graph> build(const Case& c, const std::string& isa, int threads) {
  auto graph = std::make_unique<Graph>(isa, threads);
  Numbers numbers(c.numbers);
  append_all(numbers, *graph);
  graph->finish(graph->values() - 1);
  return graph;
}

// Values of a run that writes all of them, or the output alone; the others are empty.
std::vector<Elements> run(Graph& g, const Case& c, bool all, Edge edge) {
  const auto input = buffer_of(g.value(0), c.batch, edge);
  for (size_t i = 0; i < c.values[0].size(); ++i)
    input->get<uint8_t>()[i] = static_cast<uint8_t>(c.values[0][i]);  // codes
  std::vector<std::unique_ptr<Guarded>> buffers(static_cast<size_t>(g.values()));
  std::vector<void*> to(buffers.size(), nullptr);
  for (size_t v = all ? 0 : buffers.size() - 1; v < buffers.size(); ++v) {
    buffers[v] = buffer_of(g.value(static_cast<int>(v)), c.batch, edge);
    to[v] = buffers[v]->get();
  }
  g.run(input->get(), c.batch, to);
  std::vector<Elements> found(buffers.size());
  for (size_t v = 0; v < buffers.size(); ++v) {
    const Value& value = g.value(static_cast<int>(v));
    for (int64_t i = 0; buffers[v] && i < c.batch * value.shape.elements(); ++i)
      found[v].push_back(element(*buffers[v], value.dtype, i));
  }
  return found;
}

void check(const Case& c, const std::string& isa) {
  for (int threads : {1, 2, 3}) {
    const auto graph = build(c, isa, threads);
    for (bool all : {true, false}) {
      const auto found = run(*graph, c, all, threads == 2 ? Edge::begin : Edge::end);
      for (size_t v = 0; v < found.size(); ++v) {
        if (found[v].empty()) continue;
        const std::string where = c.name + ", value " + std::to_string(v) + ", threads " + std::to_string(threads);
        const Elements& want = c.values.at(v);
        expect_equal(isa.c_str(), "number of elements", where.c_str(), 0, static_cast<int64_t>(found[v].size()),
                     static_cast<int64_t>(want.size()));
        for (size_t i = 0; i < found[v].size() && i < want.size(); ++i)
          expect_equal(isa.c_str(), "graph", where.c_str(), static_cast<int64_t>(i), found[v][i], want[i]);
      }
    }
  }
}

Case random_case(uint64_t seed) {
  Random random(seed);
  Case c{"random graph " + std::to_string(seed), RandomGraph(seed).numbers(), 1 + static_cast<int64_t>(seed % 3), {}};
  const auto graph = build(c, "generic", 1);
  const Value& input = graph->value(0);
  c.values.emplace_back();
  for (int64_t i = 0; i < c.batch * input.shape.elements(); ++i) c.values[0].push_back(random.in(input.lo, input.hi));
  c.values = run(*graph, c, true, Edge::end);
  return c;
}

std::vector<int64_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::vector<int64_t> all(static_cast<size_t>(file.tellg()) / 8);
  file.seekg(0);
  file.read(reinterpret_cast<char*>(all.data()), static_cast<std::streamsize>(all.size() * 8));
  return all;
}

Case file_case(const std::string& path) {
  Case c{path, read_file(path), 0, {}};
  Numbers rest(c.numbers);
  Graph graph("generic", 1);
  append_all(rest, graph);
  c.batch = rest.next();
  for (int v = 0; v < graph.values(); ++v)
    c.values.push_back(rest.take<int64_t>(c.batch * graph.value(v).shape.elements()));
  if (!rest.at_end()) throw std::runtime_error(path + ": there is more than the graph's values");
  return c;
}

// Whether the output depends on the input at all: a graph whose values are all clamped away tests little.
bool varies(const Case& c) {
  const Elements& output = c.values.back();
  return std::any_of(output.begin(), output.end(), [&](int64_t e) { return e != output[0]; });
}

int run_all(int count, const std::vector<std::string>& files) {
  std::vector<Case> cases;
  for (int seed = 1; seed <= count; ++seed) cases.push_back(random_case(static_cast<uint64_t>(seed)));
  const auto varied = std::count_if(cases.begin(), cases.end(), varies);
  if (2 * varied < count) {
    std::fprintf(stderr, "only %d of %d random graphs have an output that varies\n", static_cast<int>(varied), count);
    return 1;
  }
  for (const std::string& path : files) cases.push_back(file_case(path));
  std::vector<std::string> isas = available_isas();
  for (const std::string& isa : emulated_isas()) isas.push_back(isa);
  for (const std::string& isa : isas) {
    for (const Case& c : cases) check(c, isa);
    std::printf("%s: %d random graphs, %d files: %s\n", isa.c_str(), count, static_cast<int>(files.size()),
                failures == 0 ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bitstrata::test

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: graph_test COUNT [FILE...]\n");
    return 2;
  }
  try {
    return bitstrata::test::run_all(std::atoi(argv[1]), {argv + 2, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
