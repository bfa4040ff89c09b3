#include "bitstrata/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace bitstrata {

extern const Kernels kGenericKernels;
extern const Limits kGenericLimits;
extern const FloatProducts kGenericFloatProducts;
#ifdef BITSTRATA_HAVE_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef BITSTRATA_HAVE_AVX2VNNI
extern const Kernels kAvx2VnniKernels;
#endif
#ifdef BITSTRATA_HAVE_AVX512VNNI
extern const Kernels kAvx512VnniKernels;
#endif
#ifdef BITSTRATA_HAVE_AMX
extern const Kernels kAmxKernels;
#endif
#ifdef BITSTRATA_HAVE_NEON
extern const Kernels kNeonKernels;
#endif
#ifdef BITSTRATA_HAVE_NEONDOT
extern const Kernels kNeonDotKernels;
#endif
extern const Kernels kAmxEmulatedKernels;

namespace {

// Slowest first. To add an instruction set: its file, its line here, its line in CMakeLists.txt.
const Kernels* const kTable[] = {
    &kGenericKernels,
#ifdef BITSTRATA_HAVE_AVX2
    &kAvx2Kernels,
#endif
#ifdef BITSTRATA_HAVE_AVX2VNNI
    &kAvx2VnniKernels,
#endif
#ifdef BITSTRATA_HAVE_AVX512VNNI
    &kAvx512VnniKernels,
#endif
#ifdef BITSTRATA_HAVE_AMX
    &kAmxKernels,
#endif
#ifdef BITSTRATA_HAVE_NEON
    &kNeonKernels,
#endif
#ifdef BITSTRATA_HAVE_NEONDOT
    &kNeonDotKernels,
#endif
};

// Rows that some builds lack: those for another processor, and those that the compiler cannot compile.
const char* const kNotHere[] = {
#ifndef BITSTRATA_HAVE_AVX2
    "avx2",
#endif
#ifndef BITSTRATA_HAVE_AVX2VNNI
    "avx2vnni",
#endif
#ifndef BITSTRATA_HAVE_AVX512VNNI
    "avx512vnni",
#endif
#ifndef BITSTRATA_HAVE_AMX
    "amx",
#endif
    nullptr,
};

// For tests: used only where asked for by name.
const Kernels* const kEmulated[] = {&kAmxEmulatedKernels};

const Kernels* find(const std::string& isa) {
  for (const Kernels* row : kTable)
    if (isa == row->isa) return row;
  for (const Kernels* row : kEmulated)
    if (isa == row->isa) return row;
  return nullptr;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// What a row lacks here, in words; empty if it runs.
std::string lacking(const Kernels& row) {
  if (row.supported()) return "";
  const char* what = row.lacks == nullptr ? nullptr : row.lacks();
  return what == nullptr ? "something that its row does not name" : what;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* row : kTable)
    if (row->supported()) names.emplace_back(row->isa);
  return names;
}

std::vector<std::string> emulated_isas() {
  std::vector<std::string> names;
  for (const Kernels* row : kEmulated)
    if (row->supported()) names.emplace_back(row->isa);
  return names;
}

std::vector<KernelRow> kernel_table() {
  std::vector<KernelRow> rows;
  const auto append = [&](const Kernels& row, bool emulated) { rows.push_back({row.isa, emulated, lacking(row)}); };
  for (const Kernels* row : kTable) append(*row, false);
  for (const char* const* name = kNotHere; *name != nullptr; ++name)
    rows.push_back({*name, false, "this build: it was not compiled"});
  for (const Kernels* row : kEmulated) append(*row, true);
  return rows;
}

const Kernels& select_kernels(const std::string& isa) {
  const char* env = std::getenv("BITSTRATA_ISA");
  const bool from_env = isa.empty() && env != nullptr && *env != '\0';
  const std::string wanted = from_env ? env : isa;
  const std::string what = (from_env ? "BITSTRATA_ISA=" : "isa=") + wanted;
  const Kernels* row = find(wanted.empty() ? available_isas().back() : wanted);
  if (row == nullptr)
    throw std::invalid_argument(what + ": not an instruction set of this build; available: " + join(available_isas()));
  if (!row->supported())
    throw std::invalid_argument(what + ": this processor or its operating system does not support it, for lack of " +
                                lacking(*row) + "; available: " + join(available_isas()));
  return *row;
}

std::vector<const ConvKernel*> conv_kernels(const Kernels& row, const ConvShape& shape) {
  std::vector<const ConvKernel*> found = {row.conv(shape)};
  const ConvKernel* own = row.other_conv != nullptr ? row.other_conv(shape) : nullptr;
  if (own != nullptr) found.push_back(own);
  const auto end = std::find(std::begin(kTable), std::end(kTable), &row);
  const auto slower =
      end == std::end(kTable) ? std::begin(kTable) + 1 : end;  // below an emulated row, the portable one
  for (auto other = slower; other-- != std::begin(kTable);) {
    const ConvKernel* kernel = (*other)->supported() ? (*other)->conv(shape) : found[0];
    if (std::find(found.begin(), found.end(), kernel) == found.end()) found.push_back(kernel);
  }
  return found;
}

const Limits& limits_of(const Kernels& row) { return row.limits != nullptr ? *row.limits() : kGenericLimits; }

const FloatProducts& float_products_of(const Kernels& row) {
  const FloatProducts* own = row.float_products != nullptr ? row.float_products() : nullptr;
  return own != nullptr ? *own : kGenericFloatProducts;
}

}  // namespace bitstrata
