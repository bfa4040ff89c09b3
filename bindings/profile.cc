#include "profile.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>

#include "bitstrata/dispatch.h"
#include "bitstrata/graph.h"
#include "bitstrata/profile.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bitstrata::Graph;
using bitstrata::OpWork;
using Batch = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// (seconds of the run, seconds of each operation) of every run. The caller has checked shape and dtype of x.
nb::list profile(Graph& g, Batch x, int64_t repeats) {
  const bitstrata::Value& in = g.value(0);
  const int64_t batch = x.ndim() > 0 ? static_cast<int64_t>(x.shape(0)) : 0;
  if (batch < 1 || static_cast<int64_t>(x.nbytes()) != batch * in.bytes())
    throw std::invalid_argument("profile: the input must be at least one image of the graph's input");
  if (repeats < 1) throw std::invalid_argument("profile: repeats must be at least 1, got " + std::to_string(repeats));
  bitstrata::Profile profile(g.values() - 1, g.threads());
  {
    nb::gil_scoped_release unlocked;
    std::vector<uint8_t> result(static_cast<size_t>(batch * g.value(g.output()).bytes()));
    std::vector<void*> destinations(static_cast<size_t>(g.values()), nullptr);
    destinations[static_cast<size_t>(g.output())] = result.data();
    for (int64_t i = 0; i < repeats; ++i) g.run(x.data(), batch, destinations, &profile);
  }
  nb::list runs;
  for (const auto& run : profile.runs()) runs.append(nb::make_tuple(run.seconds, nb::cast(run.ops)));
  return runs;
}

nb::dict work(const Graph& g, int value) {
  const OpWork w = g.work(value);
  nb::dict d;
  d["operations"] = w.operations, d["weight_bytes"] = w.weight_bytes, d["scratch_bytes"] = w.scratch_bytes;
  d["input_bytes"] = w.input_bytes, d["output_bytes"] = w.output_bytes;
  d["group"] = w.group;
  d["output_in_tile"] = w.output_in_tile, d["input_in_tile"] = w.input_in_tile;
  d["peak"] = w.peak == nullptr ? "" : w.peak->name;
  d["passes"] = w.passes;
  return d;
}

// Instructions of the graph's convolutions -> products per second of one thread.
nb::dict measure_products(const Graph& g) {
  std::map<std::string, double> found;
  {
    nb::gil_scoped_release unlocked;
    for (int v = 1; v < g.values(); ++v) {
      const bitstrata::PeakLoop* loop = g.work(v).peak;
      if (loop != nullptr && found.count(loop->name) == 0)
        found[loop->name] = bitstrata::measure_products(*loop, g.threads());
    }
  }
  nb::dict d;
  for (const auto& [name, rate] : found) d[name.c_str()] = rate;
  return d;
}

// (name, bytes, bytes per second of one thread) of each level.
nb::list measure_memory(const Graph& g) {
  std::vector<bitstrata::MemoryLevel> levels;
  {
    nb::gil_scoped_release unlocked;
    levels = bitstrata::measure_memory(bitstrata::limits_of(bitstrata::select_kernels(g.isa())), g.threads());
  }
  nb::list all;
  for (const auto& level : levels) all.append(nb::make_tuple(level.name, level.bytes, level.bytes_per_second));
  return all;
}

}  // namespace

void bind_profile(nb::module_& m) {
  m.def("profile", &profile, "graph"_a, "x"_a.noconvert(), "repeats"_a);
  m.def("work", &work, "graph"_a, "value"_a);
  m.def("measure_products", &measure_products, "graph"_a);
  m.def("measure_memory", &measure_memory, "graph"_a);
}
