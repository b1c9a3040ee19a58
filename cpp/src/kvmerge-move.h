#pragma once

// K or V of a layer in a tensor of another size: made before anything changes, then put in the place of the one there was.

#include "kvmerge-pages.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <utility>
#include <vector>

// Cells that move: n of them, from row `from` of one tensor to row `to` of another.
struct kvmerge_cell_move {
    uint32_t from;
    uint32_t to;
    uint32_t n;
};

struct kvmerge_sized_tensor {
    ggml_context_ptr        ctx;
    ggml_tensor *           t;
    ggml_backend_buffer_ptr buf; // where there are pages; else it is made when the tensor is put in its place

    // throws std::bad_alloc: what is small may find no memory either
    kvmerge_sized_tensor(const ggml_tensor * like, uint32_t n_rows, const kvmerge_pages & pages);
};

// What kvmerge_replace_tensor() takes in memory of the host at most, for a tensor of n_rows cells that becomes one of
// n_rows_new; nothing where there are pages.
//   trans  memory holds one row a channel, over all cells
size_t kvmerge_n_bytes_staged(const ggml_tensor * t, bool trans, uint32_t n_rows_new);

// Puts `next` in the place of t, K or V of a layer, and its buffer into `owner`.
// false: there is no memory for its buffer. That happens only where the tensor grows, or where the buffer that was there is
// not its own.
bool kvmerge_replace_tensor(ggml_tensor *& t, kvmerge_sized_tensor & next, bool trans, const kvmerge_cell_move & move, kvmerge_pages & pages,
        std::pair<ggml_context_ptr, ggml_backend_buffer_ptr> & owner, std::vector<uint8_t> & staging);

// What lies behind the used cells goes back to the system. Where memory holds one row a channel it cannot, and is cleared:
// attention multiplies it by 0, which leaves a NaN what it is.
void kvmerge_keep_used(const ggml_tensor * t, bool trans, uint32_t n_used, kvmerge_pages & pages);
