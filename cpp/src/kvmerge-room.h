#pragma once

// How many cells a cache begins with. What happens later is in kvmerge-room.cpp.

#include <cstdint>

// called by llama_kv_cache's constructor: the cells that were asked for with kvmerge_begin_small(), at most n_cells
uint32_t kvmerge_first_size(uint32_t n_cells, bool is_swa);
