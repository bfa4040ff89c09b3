// How failures leave the library: as a status and a message of the calling thread, never as an exception.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

#include "bitstrata.h"

namespace bitstrata::capi {

struct ApiError : std::exception {
  ApiError(bs_status status, std::string message) : status(status), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }
  const bs_status status;
  const std::string message;
};

[[noreturn]] inline void invalid(const std::string& message) { throw ApiError(BS_INVALID_ARGUMENT, message); }

// Keeps a failure's message for bs_last_error. Allocates nothing; what is too long is cut.
bs_status keep(const char* function, bs_status status, const char* message) noexcept;

// The status of the exception that is being handled, its message kept.
bs_status keep_current(const char* function) noexcept;

// Runs the body of an exported function.
template <typename Body>
bs_status guarded(const char* function, const Body& body) noexcept {
  try {
    body();
    return BS_OK;
  } catch (...) {
    return keep_current(function);
  }
}

template <typename T>
T& required(T* pointer, const char* argument) {
  if (pointer == nullptr) invalid(std::string(argument) + " is NULL");
  return *pointer;
}

// Structures begin with their size as the caller knows them; `least` is the size in the first version that had them.
template <typename T>
void check_size(const T& given, const char* argument, size_t least = sizeof(T)) {
  if (given.struct_size < least)
    invalid(std::string(argument) + "->struct_size is " + std::to_string(given.struct_size) + ", must be at least " +
            std::to_string(least) + "; initialize the structure with its BS_..._INIT");
}

// The caller's structure as this library knows it: members that the caller lacks are as in `defaults`; members that
// this library lacks must be zero.
template <typename T>
T read_struct(const T* given, const char* argument, T defaults) {
  check_size(required(given, argument), argument);
  const size_t known = std::min(given->struct_size, sizeof(T));
  std::memcpy(&defaults, given, known);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + known, bytes + given->struct_size, [](unsigned char b) { return b != 0; }))
    invalid(std::string(argument) + " uses members that this version of the library does not know");
  return defaults;
}

// Fills the caller's structure as far as both sides know it, its size aside.
template <typename T>
void write_struct(const T& value, T* to) {
  const size_t skip = sizeof(to->struct_size), known = std::min(to->struct_size, sizeof(T));
  auto* bytes = reinterpret_cast<unsigned char*>(to);
  std::memcpy(bytes + skip, reinterpret_cast<const unsigned char*>(&value) + skip, known - skip);
  std::memset(bytes + known, 0, to->struct_size - known);
}

}  // namespace bitstrata::capi
