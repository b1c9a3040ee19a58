#pragma once

// How many cells a cache begins with, and memory that goes back to the system. What happens in between is in
// kvmerge-room.cpp.

#include <cstdint>

// get_n_kv() pads to as many cells, and so do the backends' attention kernels
static constexpr uint32_t KVMERGE_CELL_STEP = 256;

// called by llama_kv_cache's constructor: the cells that were asked for with kvmerge_begin_small(), at most n_cells
uint32_t kvmerge_first_size(uint32_t n_cells, bool is_swa);

// What was freed goes back to the system: allocators keep it, and buffers that grow step by step do not fit into the gaps
// that smaller ones left.
void kvmerge_give_back();
