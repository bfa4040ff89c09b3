// Prints plans, number by number, for comparison with another derivation.
//
//   derive_dump ARTIFACT CHOICE...      CHOICE: bits:4 | plan:NAME | map:4,2,8 (a precision for each layer)
//
// A choice that is refused prints "error MESSAGE". Real numbers are printed by their bits, weight codes as a checksum.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <sstream>

#include "bitstrata/artifact.h"
#include "bitstrata/error.h"
#include "bitstrata/plan.h"

namespace {

using namespace bitstrata;

void print(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  std::printf(" %016" PRIx64, bits);
}

template <typename Numbers>
void print_all(const Numbers& numbers) {
  for (const auto n : numbers) std::printf(" %" PRId64, static_cast<int64_t>(n));
}

// Adler-32 of the codes in use.
uint32_t checksum(const PlanConv& c) {
  uint32_t a = 1, b = 0;
  for (const int8_t code : *c.codes) {
    a = (a + static_cast<uint8_t>(static_cast<int8_t>(code >> c.code_shift))) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

void print_window(const PoolParams& p) {
  print_all(p.kernel);
  print_all(p.stride);
  print_all(p.padding);
}

struct Printer {
  const Program& program;

  void operator()(const PlanConv& c) const {
    std::printf("conv %" PRIu32 " %" PRId64 " %" PRId64 " %" PRId64, checksum(c), c.mul, c.add, c.groups);
    print_all(c.dims);
    print_all(c.stride);
    print_all(c.padding);
    print_all(c.dilation);
    print_all(c.pad_code);
    std::printf(" %s", program.layers[static_cast<size_t>(c.layer)].name.c_str());
  }
  void operator()(const PlanRequant& r) const {
    std::printf("requant %" PRId64 " %" PRId64, r.lo, r.hi);
    print_all(r.multiplier);
    print_all(r.bias);
    print_all(r.shift);
  }
  void operator()(const PlanAdd& a) const { std::printf("add %" PRId64 " %" PRId64, a.shift_a, a.shift_b); }
  void operator()(const PlanClip& c) const { std::printf("clip %" PRId64 " %" PRId64, c.lo, c.hi); }
  void operator()(const PlanMaxPool& p) const {
    std::printf("maxpool");
    print_window(p.window);
  }
  void operator()(const PlanSumPool& p) const {
    std::printf("sumpool %" PRId64, p.shift);
    print_window(p.window);
  }
  void operator()(const PlanSlice& s) const {
    std::printf("slice");
    for (const Triple& axis : {s.h, s.w, s.c}) print_all(axis);
  }
  void operator()(const PlanPad& p) const {
    std::printf("pad");
    for (const Pair& axis : {p.h, p.w, p.c}) print_all(axis);
  }
  void operator()(const PlanFlatten&) const { std::printf("flatten"); }
};

void print_plan(const Program& program, const Plan& plan) {
  std::printf("plan %d", plan.output);
  print(plan.input_step);
  for (const double z : plan.input_offset) print(z);
  for (const PlanValue& v : plan.values) {
    const Shape& s = v.value.shape;
    std::printf("\nvalue %" PRId64 " %" PRId64 " %" PRId64 " %s %d %d", s.h, s.w, s.c, name_of(v.value.dtype),
                v.value.lo, v.value.hi);
    if (v.scaled) print(v.scale);
    std::printf(" %s", v.name.c_str());
  }
  for (const PlanOp& op : plan.ops) {
    std::printf("\n");
    std::visit(Printer{program}, op.operation);
    std::printf(" from");
    print_all(op.inputs);
  }
  std::printf("\n");
}

Selection parse(const Program& program, const std::string& choice) {
  const std::string value = choice.substr(choice.find(':') + 1);
  if (choice.rfind("bits:", 0) == 0) return select(program, std::stoi(value));
  if (choice.rfind("plan:", 0) == 0) return select(program, value);
  std::vector<std::pair<std::string, int>> map;
  std::istringstream numbers(value);
  std::string number;
  for (const Layer& layer : program.layers)
    if (std::getline(numbers, number, ',')) map.emplace_back(layer.name, std::stoi(number));
  return select(program, map);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  Artifact artifact(std::make_unique<DirectorySource>(argv[1]));
  for (int i = 2; i < argc; ++i) {
    std::printf("choice %s\n", argv[i]);
    try {
      const Selection selection = parse(artifact.program(), argv[i]);
      artifact.load(selection);
      const Plan plan = derive(artifact.program(), selection);
      print_plan(artifact.program(), plan);
      Graph graph("generic", 1);
      build(plan, &graph);
    } catch (const std::exception& error) {
      std::printf("error %s\n", error.what());
    }
  }
  return 0;
}
