#include "status.h"

#include <cstdio>
#include <new>
#include <stdexcept>

#include "bitstrata/dispatch.h"
#include "bitstrata/error.h"

namespace bitstrata::capi {
namespace {

constexpr size_t kMessageBytes = 2048;
thread_local char last_message[kMessageBytes] = "";

bs_status status_of(const ArtifactError& error) {
  switch (error.kind()) {
    case ArtifactError::Kind::source:
      return BS_UNREADABLE;
    case ArtifactError::Kind::newer:
      return BS_NEWER_FORMAT;
    case ArtifactError::Kind::request:
      return BS_UNKNOWN_PRECISION;
    default:
      return BS_INVALID_ARTIFACT;
  }
}

}  // namespace

bs_status keep(const char* function, bs_status status, const char* message) noexcept {
  std::snprintf(last_message, kMessageBytes, "%s: %s", function, message);
  return status;
}

bs_status keep_current(const char* function) noexcept {
  try {
    throw;
  } catch (const ApiError& error) {
    return keep(function, error.status, error.what());
  } catch (const ArtifactError& error) {
    return keep(function, status_of(error), error.what());
  } catch (const std::invalid_argument& error) {
    return keep(function, BS_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return keep(function, BS_OUT_OF_MEMORY, "memory ran out");
  } catch (const std::exception& error) {
    return keep(function, BS_INTERNAL, error.what());
  } catch (...) {
    return keep(function, BS_INTERNAL, "an exception of unknown type");
  }
}

}  // namespace bitstrata::capi

using bitstrata::capi::guarded;
using bitstrata::capi::required;

extern "C" {

const char* bs_last_error(void) { return bitstrata::capi::last_message; }

const char* bs_status_name(bs_status status) {
  static const char* const kNames[] = {"BS_OK",
                                       "BS_INVALID_ARGUMENT",
                                       "BS_UNREADABLE",
                                       "BS_INVALID_ARTIFACT",
                                       "BS_NEWER_FORMAT",
                                       "BS_UNKNOWN_PRECISION",
                                       "BS_NOT_DERIVABLE",
                                       "BS_UNSUPPORTED",
                                       "BS_OUT_OF_MEMORY",
                                       "BS_INTERNAL"};
  return status >= BS_OK && status <= BS_INTERNAL ? kNames[status] : "unknown status";
}

bs_status bs_version(uint32_t* api_version, uint32_t* format_version) {
  return guarded("bs_version", [&] {
    required(format_version, "format_version");
    required(api_version, "api_version") = BS_API_VERSION;
    *format_version = 1;
  });
}

bs_status bs_isa_count(size_t* count) {
  return guarded("bs_isa_count", [&] { required(count, "count") = bitstrata::available_isas().size(); });
}

bs_status bs_isa_name(size_t index, const char** name) {
  return guarded("bs_isa_name", [&] {
    required(name, "name");
    const auto isas = bitstrata::available_isas();
    if (index >= isas.size())
      bitstrata::capi::invalid("index is " + std::to_string(index) + ", there are " + std::to_string(isas.size()));
    *name = bitstrata::select_kernels(isas[index]).isa;
  });
}

}  // extern "C"
