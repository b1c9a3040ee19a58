#pragma once

// nearest: the pivot whose key has the largest cosine to that of a token. On the CPU, no product leaves the registers.

#include "kvmerge-keys.h"

#include <cstdint>
#include <vector>

// nearest[i]: which of `pivots` is nearest to evicted[i], both numbers of keys; of equally near ones the last.
void kvmerge_nearest(const kvmerge_keys_of_head & keys, const std::vector<int32_t> & pivots, const int32_t * evicted, int64_t n, int32_t * nearest);
