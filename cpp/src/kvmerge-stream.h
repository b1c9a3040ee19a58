#pragma once

// Values in a saved state, one after the other, and how one that cannot be used is refused.

#include "llama-io.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

template <typename T>
void kvmerge_write(llama_io_write_i & io, const T & value) {
    static_assert(std::is_trivially_copyable_v<T>);
    io.write(&value, sizeof(value));
}

template <typename T>
T kvmerge_read(llama_io_read_i & io) {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    io.read(&value, sizeof(value));
    return value;
}

// throws like llama_kv_cache, which then takes back what it has read
[[noreturn]] inline void kvmerge_refuse(const std::string & reason) {
    throw std::runtime_error("the saved state cannot be used: " + reason);
}

// of tokens, positions and segments: beyond any context, and they can still be counted on
static constexpr int32_t KVMERGE_MAX_COUNT = 1 << 30;

inline bool kvmerge_is_count(int64_t value) {
    return value >= 0 && value <= KVMERGE_MAX_COUNT;
}
