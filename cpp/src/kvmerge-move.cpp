#include "kvmerge-move.h"

#include "kvmerge-fault.h"
#include "kvmerge-graph.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>

kvmerge_sized_tensor::kvmerge_sized_tensor(const ggml_tensor * like, uint32_t n_rows, const kvmerge_pages & pages) :
    ctx(kvmerge_make_context(3)), // with the views of a copy
    t(ggml_new_tensor_3d(ctx.get(), like->type, like->ne[0], n_rows, 1)) {
    ggml_set_name(t, like->name);

    if (pages.data()) {
        buf.reset(ggml_backend_cpu_buffer_from_ptr(pages.data(), ggml_nbytes(t)));
        ggml_backend_tensor_alloc(buf.get(), t, pages.data());
    }
}

// through memory of the host; trans: memory holds one row a channel, over all cells
static void copy_staged(const ggml_tensor * old, ggml_tensor * dst, bool trans, const kvmerge_cell_move & move, std::vector<uint8_t> & staging) {
    if (!trans) {
        staging.resize(move.n*old->nb[1]);
        ggml_backend_tensor_get(old, staging.data(), move.from*old->nb[1], staging.size());
        ggml_backend_tensor_set(dst, staging.data(), move.to  *dst->nb[1], staging.size());

        return;
    }

    const size_t size  = ggml_type_size(old->type);
    const size_t n_old = ggml_nbytes(old);
    const size_t n_dst = ggml_nbytes(dst);

    staging.assign(n_old + n_dst, 0);
    ggml_backend_tensor_get(old, staging.data(), 0, n_old);

    for (int64_t e = 0; e < old->ne[0]; ++e) {
        std::copy_n(
                staging.data() +         (e*old->ne[1] + move.from)*size, move.n*size,
                staging.data() + n_old + (e*dst->ne[1] + move.to  )*size);
    }
    ggml_backend_tensor_set(dst, staging.data() + n_old, 0, n_dst);
}

size_t kvmerge_n_bytes_staged(const ggml_tensor * t, bool trans, uint32_t n_rows_new) {
    const size_t n_old = ggml_nbytes(t);
    const size_t n_new = ggml_row_size(t->type, t->ne[0])*n_rows_new;

    return trans ? n_old + n_new : std::min(n_old, n_new);
}

// ctx has room for two views
static void copy_cells(ggml_context * ctx, ggml_tensor * old, ggml_tensor * dst, bool trans, const kvmerge_cell_move & move, std::vector<uint8_t> & staging) {
    if (move.n == 0) {
        return;
    }

    if (!trans && old->data != dst->data) {
        // the cells lie one after the other
        ggml_tensor * from = ggml_view_2d(ctx, old, old->ne[0], move.n, old->nb[1], move.from*old->nb[1]);
        ggml_tensor * to   = ggml_view_2d(ctx, dst, dst->ne[0], move.n, dst->nb[1], move.to  *dst->nb[1]);

        ggml_backend_view_init(from);
        ggml_backend_view_init(to);
        ggml_backend_tensor_copy(from, to);
    } else if (trans || move.from != move.to) {
        copy_staged(old, dst, trans, move, staging);
    }
}

// the same where both lie at the same place; what was not moved there is zero
static void move_cells(const ggml_tensor * old, ggml_tensor * dst, bool trans, const kvmerge_cell_move & move) {
    const size_t  unit   = trans ? ggml_type_size(old->type) : old->nb[1];
    const int64_t n_rows = trans ? dst->ne[0] : 1;
    const int64_t n_old  = old->ne[1];
    const int64_t n_dst  = dst->ne[1];

    char * data = static_cast<char *>(dst->data);

    const bool is_up = n_dst >= n_old && move.to >= move.from;

    GGML_ASSERT(is_up || (n_dst <= n_old && move.to <= move.from));

    for (int64_t i = 0; i < n_rows; ++i) {
        // no row is written over before it was moved
        const int64_t e = is_up ? n_rows - 1 - i : i;

        char * row = data + e*n_dst*unit;

        memmove(row + move.to*unit, data + (e*n_old + move.from)*unit, move.n*unit);
        memset (row, 0, move.to*unit);
    }
}

void kvmerge_keep_used(const ggml_tensor * t, bool trans, uint32_t n_used, kvmerge_pages & pages) {
    if (!trans) {
        pages.keep(n_used*t->nb[1]);
        return;
    }

    const size_t unit = ggml_type_size(t->type);

    for (int64_t e = 0; e < t->ne[0]; ++e) {
        memset(static_cast<char *>(t->data) + (e*t->ne[1] + n_used)*unit, 0, (t->ne[1] - n_used)*unit);
    }

    pages.keep(ggml_nbytes(t));
}

bool kvmerge_replace_tensor(ggml_tensor *& t, kvmerge_sized_tensor & next, bool trans, const kvmerge_cell_move & move, kvmerge_pages & pages,
        std::pair<ggml_context_ptr, ggml_backend_buffer_ptr> & owner, std::vector<uint8_t> & staging) {
    ggml_tensor * res = next.t;

    if (!next.buf) {
        next.buf.reset(kvmerge_fails() ? nullptr : ggml_backend_alloc_ctx_tensors_from_buft(next.ctx.get(), ggml_backend_buffer_get_type(t->buffer)));

        if (next.buf) {
            ggml_backend_buffer_clear(next.buf.get(), 0); // no NaN in cells that were never used
        } else if (owner.second && res->ne[1] <= t->ne[1]) {
            LLAMA_LOG_WARN("%s: no memory for a smaller buffer: %s stays in the one that it has\n", __func__, t->name);

            next.buf = std::move(owner.second);
            ggml_backend_tensor_alloc(next.buf.get(), res, t->data);
        } else {
            return false;
        }
    }

    if (pages.data() && t->data == res->data) {
        move_cells(t, res, trans, move);
    } else {
        copy_cells(next.ctx.get(), t, res, trans, move, staging);
    }

    if (pages.data()) {
        kvmerge_keep_used(res, trans, move.to + move.n, pages);
    }

    t     = res;
    owner = { std::move(next.ctx), std::move(next.buf) };

    return true;
}
