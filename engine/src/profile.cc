#include "bitstrata/profile.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <thread>

#include "aligned.h"
#include "timed.h"

namespace bitstrata {
namespace {

constexpr size_t kLine = 64 / sizeof(uint64_t);
constexpr double kPieceSeconds = 0.5e-3;  // long beside the clock, short beside a time slice of the scheduler
constexpr int kPieces = 30;               // of which the fastest counts: whatever else runs only slows them

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Both clocks at one time: of several readings the one that nothing came between.
void read_clocks(uint64_t* tick, double* seconds) {
  uint64_t gap = UINT64_MAX;
  for (int i = 0; i < 5; ++i) {
    const uint64_t before = ticks();
    const double at = now();
    const uint64_t after = ticks();
    if (after - before >= gap) continue;
    gap = after - before;
    *tick = before + gap / 2;
    *seconds = at;
  }
}

template <typename Body>
double seconds_of(const Body& body, int64_t rounds) {
  const double begin = now();
  body(rounds);
  return now() - begin;
}

// Rounds per second of body(rounds).
template <typename Body>
double fastest(const Body& body) {
  int64_t rounds = 1;
  double seconds;
  while ((seconds = seconds_of(body, rounds)) < kPieceSeconds) rounds *= 2;
  for (int i = 0; i < kPieces; ++i) seconds = std::min(seconds, seconds_of(body, rounds));
  return static_cast<double>(rounds) / seconds;
}

// The least of what `body(thread)` returns on each of `threads` threads at the same time.
template <typename Body>
double slowest_thread(int threads, const Body& body) {
  std::vector<double> found(static_cast<size_t>(threads));
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { found[static_cast<size_t>(t)] = body(); });
  found[0] = body();
  for (std::thread& other : others) other.join();
  return *std::min_element(found.begin(), found.end());
}

template <typename T>
T read_file(const std::string& path) {
  T value{};
  std::ifstream(path) >> value;
  return value;
}

// Of the first processor, as Linux describes it; what is usual where nothing is told. The C library's answer is no
// substitute: in virtual machines it has been ten times the truth.
int64_t cache_bytes(int level) {
  for (int i = 0; i < 8; ++i) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    if (read_file<int>(folder + "level") != level || read_file<std::string>(folder + "type") == "Instruction") continue;
    const int64_t kilobytes = read_file<int64_t>(folder + "size");  // "32K"
    if (kilobytes > 0) return kilobytes << 10;
  }
  const int64_t usual[] = {32 << 10, 512 << 10, 8 << 20};
  return usual[level - 1];
}

double measure_level(const Limits& limits, int threads, int64_t bytes) {
  return slowest_thread(threads, [&] {
    const int64_t half = align_up(bytes / 2);
    const AlignedBuffer from(half), to(half);
    limits.copy(from.data(), to.data(), half);  // untouched memory would be read from one page of zeros
    limits.copy(to.data(), from.data(), half);
    const double reads = fastest([&](int64_t rounds) {
      for (int64_t i = 0; i < rounds; ++i) limits.read(i % 2 == 0 ? from.data() : to.data(), half);
    });
    const double copies = fastest([&](int64_t rounds) {
      for (int64_t i = 0; i < rounds; ++i) limits.copy(from.data(), to.data(), half);
    });
    return static_cast<double>(half) * std::max(reads, 2 * copies);
  });
}

}  // namespace

Profile::Profile(int ops, int threads)
    : ops_(static_cast<size_t>(ops)),
      threads_(static_cast<size_t>(threads)),
      pitch_((ops_ + kLine - 1) / kLine * kLine + kLine),
      counts_(pitch_ * threads_) {}

void Profile::begin() {
  std::fill(counts_.begin(), counts_.end(), 0);
  read_clocks(&begin_ticks_, &begin_seconds_);
}

void Profile::end() {
  uint64_t end_ticks = 0;
  double end_seconds = 0;
  read_clocks(&end_ticks, &end_seconds);
  Span span{end_ticks - begin_ticks_, end_seconds - begin_seconds_, std::vector<uint64_t>(ops_)};
  for (size_t t = 0; t < threads_; ++t)
    for (size_t i = 0; i < ops_; ++i) span.ops[i] += counts_[t * pitch_ + i];
  spans_.push_back(std::move(span));
}

std::vector<Profile::Run> Profile::runs() const {
  double seconds = 0, ticks = 0;  // over all runs: a short one alone is too short to tell a tick's length
  for (const Span& span : spans_) seconds += span.seconds, ticks += static_cast<double>(span.ticks);
  std::vector<Run> runs;
  for (const Span& span : spans_) {
    Run run{span.seconds, {}};
    for (uint64_t op : span.ops) run.ops.push_back(ticks > 0 ? static_cast<double>(op) * (seconds / ticks) : 0);
    runs.push_back(std::move(run));
  }
  return runs;
}

double measure_products(const PeakLoop& loop, int threads) {
  return slowest_thread(threads, [&] { return fastest(loop.run); }) * static_cast<double>(loop.products);
}

std::vector<MemoryLevel> measure_memory(const Limits& limits, int threads) {
  std::vector<MemoryLevel> levels;
  int64_t bytes = 0;
  for (int level = 1; level <= 3; ++level) {
    const int64_t holds = cache_bytes(level);
    if (holds <= bytes) continue;
    bytes = holds;
    const int64_t share = level == 3 ? bytes / threads : bytes;  // the last one is common to the cores
    levels.push_back({"L" + std::to_string(level), bytes, measure_level(limits, threads, share / 2)});
  }
  const int64_t most = int64_t{256} << 20;
  levels.push_back({"memory", 0, measure_level(limits, threads, std::min(4 * bytes, most) / threads)});
  return levels;
}

}  // namespace bitstrata
