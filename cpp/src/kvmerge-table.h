#pragma once

// What llama_kv_cache reads of its table of cells in a saved state.

#include "llama-io.h"
#include "llama.h"

#include <cstdint>
#include <memory>

// The table takes anything, and one position that cannot be is enough to make it contradict itself. So what is to go into
// it is read ahead and checked: returns what is to be read in place of io. Throws like llama_kv_cache.
//   seq_id   the sequence that the cells go into, -1: the ones that the state says
//   has_ext  every cell has a llama_kv_cell_ext
std::unique_ptr<llama_io_read_i> kvmerge_check_table(
        llama_io_read_i & io, llama_seq_id seq_id, uint32_t n_cells, uint32_t n_seq_max, bool has_ext);
