// Where a graph's time goes, and what the machine could do at best.
//
//   Profile profile(graph.values() - 1, graph.threads());
//   for (int i = 0; i < repeats; ++i) graph.run(pixels, batch, destinations, &profile);
//   profile.runs()[i].ops[v - 1];  // seconds of the operation that makes value v
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitstrata/kernels.h"

namespace bitstrata {

// The times of runs. A run adds one entry; one run at a time.
class Profile {
 public:
  struct Run {
    double seconds;           // from call to return
    std::vector<double> ops;  // of each operation, seconds of all threads together; less than threads * seconds
  };

  Profile(int ops, int threads);

  // For the graph that runs.
  void begin();
  void add(int thread, size_t op, uint64_t ticks) { counts_[static_cast<size_t>(thread) * pitch_ + op] += ticks; }
  void end();

  // Every run so far.
  std::vector<Run> runs() const;

 private:
  struct Span {
    uint64_t ticks;
    double seconds;
    std::vector<uint64_t> ops;
  };
  size_t ops_, threads_, pitch_;  // pitch: threads count in cache lines of their own
  std::vector<uint64_t> counts_;
  uint64_t begin_ticks_ = 0;
  double begin_seconds_ = 0;
  std::vector<Span> spans_;
};

// What an operation does to one image, and of which kind that is.
struct OpWork {
  int64_t operations;                  // two for each product of a convolution, else one for each element of a window
  int64_t input_bytes, output_bytes;   // every element that takes part, once
  int64_t weight_bytes;                // of constants, for all images together
  int64_t scratch_bytes;               // written once and read once
  int group;                           // operations of a group run together on tiles
  bool output_in_tile, input_in_tile;  // of which no more than a tile exists
  const PeakLoop* peak;                // the products of a convolution's kernel; null for other operations
  double passes;                       // of these products, that each of the convolution's takes
};

// The processor's caches and memory, from the inside.
struct MemoryLevel {
  std::string name;
  int64_t bytes;            // how much it holds; 0: no limit is known
  double bytes_per_second;  // of one thread while `threads` are busy, reading, or reading and writing if that is more
};

// Products per second of one thread, while `threads` threads are busy; each loop takes about 20 ms.
double measure_products(const PeakLoop& loop, int threads);

// First-level cache to memory; takes about 0.2 s and, for the last level, up to 256 MiB.
std::vector<MemoryLevel> measure_memory(const Limits& limits, int threads);

}  // namespace bitstrata
