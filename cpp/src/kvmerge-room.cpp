// How many cells there are. The cache begins small, grows when a batch finds no slot, and shrinks after a merge. Where it
// may not grow any further, a merge makes room.
//
// llama.cpp sizes its table of cells and its tensors once. Here both are replaced by others of another size, between two
// graphs: the context reserves its graphs anew after any update of the memory.

#include "kvmerge-room.h"

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-select.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// get_n_kv() pads to as many, and so do the backends' attention kernels
static constexpr uint32_t STEP = 256;

static uint32_t round_up  (uint32_t n) { return (n + STEP - 1)/STEP*STEP; }
static uint32_t round_down(uint32_t n) { return n/STEP*STEP; }

//
// the first size
//

static thread_local uint32_t n_first = 0;

int32_t kvmerge_begin_small(int32_t n_cells) {
    if (n_cells < 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells is %d, accepted is 0 and more", n_cells);
    }

    n_first = round_up(n_cells);

    return KVMERGE_OK;
}

uint32_t kvmerge_first_size(uint32_t n_cells, bool is_swa) {
    // a cache with a sliding window is small already
    return n_first == 0 || is_swa ? n_cells : std::min(n_cells, n_first);
}

//
// the size
//

void kvmerge_give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

uint32_t kvmerge_engine::n_cells_max() const {
    const uint32_t n_ctx = lctx->get_cparams().n_ctx_seq;

    return room.n_cells_max > 0 ? std::min<uint32_t>(n_ctx, room.n_cells_max) : n_ctx;
}

kvmerge_status kvmerge_engine::set_room(int32_t n_cells, float share, int32_t n_whole) {
    if (n_cells < 0 || (n_cells > 0 && n_cells < (int32_t) STEP)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells_max is %d, accepted is 0 (no limit) and %u or more", n_cells, STEP);
    }
    if (!(share >= 0 && share <= 1)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "share is %g, accepted is 0 to 1", share);
    }
    if (n_whole < 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_whole is %d, accepted is 0 and more", n_whole);
    }

    room.n_cells_max = round_down(n_cells);
    room.share       = share;
    room.n_whole     = n_whole;

    return KVMERGE_OK;
}

// the first n_copy cells; trans: memory holds one row a channel, over all cells
static void copy_cells(const ggml_tensor * old, ggml_tensor * dst, bool trans, uint32_t n_copy) {
    if (n_copy == 0) {
        return;
    }

    if (!trans) {
        // the cells lie one after the other
        ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

        ggml_tensor * from = ggml_view_2d(ctx.get(), const_cast<ggml_tensor *>(old), old->ne[0], n_copy, old->nb[1], 0);
        ggml_tensor * to   = ggml_view_2d(ctx.get(), dst,                            dst->ne[0], n_copy, dst->nb[1], 0);

        ggml_backend_view_init(from);
        ggml_backend_view_init(to);
        ggml_backend_tensor_copy(from, to);

        return;
    }

    const size_t size = ggml_type_size(old->type);

    std::vector<uint8_t> rows(ggml_nbytes(old));
    ggml_backend_tensor_get(old, rows.data(), 0, rows.size());

    std::vector<uint8_t> res(ggml_nbytes(dst));
    for (int64_t e = 0; e < old->ne[0]; ++e) {
        std::copy_n(rows.data() + e*old->ne[1]*size, n_copy*size, res.data() + e*dst->ne[1]*size);
    }
    ggml_backend_tensor_set(dst, res.data(), 0, res.size());
}

// the same where both lie at the same place, of memory that holds one row a channel
static void stretch_rows(const ggml_tensor * old, ggml_tensor * dst, uint32_t n_copy) {
    const size_t size = ggml_type_size(old->type);

    char * data = static_cast<char *>(dst->data);

    for (int64_t i = 0; i < dst->ne[0]; ++i) {
        // no row is written over before it was moved
        const int64_t e = dst->ne[1] > old->ne[1] ? dst->ne[0] - 1 - i : i;

        char * row = data + e*dst->ne[1]*size;

        memmove(row, data + e*old->ne[1]*size, n_copy*size);
        memset (row + n_copy*size, 0, (dst->ne[1] - n_copy)*size);
    }
}

// bytes of K or V up to the end of the last used cell
static size_t n_bytes_used(const ggml_tensor * t, bool trans, uint32_t n_used) {
    return trans ? ggml_nbytes(t) : n_used*t->nb[1];
}

// replace K or V of a layer by a tensor of n_cells cells, which holds the first n_copy; the caller owns its buffer
static bool resize_tensor(ggml_tensor *& t, bool trans, uint32_t n_cells, uint32_t n_copy, kvmerge_pages & pages,
        std::pair<ggml_context_ptr, ggml_backend_buffer_ptr> & owner) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

    ggml_tensor * res = ggml_new_tensor_3d(ctx.get(), t->type, t->ne[0], n_cells, 1);

    ggml_set_name(res, t->name);

    ggml_backend_buffer_ptr buf;

    if (pages.data()) {
        buf.reset(ggml_backend_cpu_buffer_from_ptr(pages.data(), ggml_nbytes(res)));
        ggml_backend_tensor_alloc(buf.get(), res, pages.data());
    } else {
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(t->buffer)));

        if (!buf) {
            return false;
        }
        ggml_backend_buffer_clear(buf.get(), 0); // no NaN in cells that were never used
    }

    if (t->data != res->data) {
        copy_cells(t, res, trans, n_copy);
    } else if (trans) {
        stretch_rows(t, res, n_copy);
    }

    if (pages.data()) {
        pages.keep(n_bytes_used(res, trans, n_copy));
    }

    t     = res;
    owner = { std::move(ctx), std::move(buf) };

    return true;
}

bool kvmerge_engine::resize(uint32_t n_cells) {
    auto & table = cache.v_cells[0];

    const uint32_t n_before = table.size();
    const uint32_t n_used   = table.used_max_p1();

    GGML_ASSERT(n_used <= n_cells && !table.get_has_shift());

    if (n_cells == n_before) {
        return true;
    }

    lctx->synchronize();

    // From the first time on every tensor has a buffer of its own: in pages that grow, or replaced one by one, so that never
    // more than one is there twice.
    const size_t n_tensors = 2*cache.layers.size();

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> first(has_own_bufs ? 0 : n_tensors);

    auto & bufs = has_own_bufs ? cache.ctxs_bufs : first;

    const auto before = cache.layers;

    if (!has_own_bufs) {
        pages.clear();
        pages.resize(n_tensors);
    }

    for (size_t i = 0; i < n_tensors; ++i) {
        auto & t = cache_tensor(i);

        if (!has_own_bufs && ggml_backend_buffer_get_type(t->buffer) == ggml_backend_cpu_buffer_type()) {
            pages[i] = kvmerge_pages(ggml_row_size(t->type, t->ne[0])*lctx->get_cparams().n_ctx_seq);
        }

        if (!resize_tensor(t, is_trans(i), n_cells, n_used, pages[i], bufs[i])) {
            LLAMA_LOG_ERROR("%s: no memory for %u cells in layer %u\n", __func__, n_cells, cache.layers[i/2].il);

            if (has_own_bufs) {
                for (size_t j = 0; j < i; ++j) {
                    const bool ok = resize_tensor(cache_tensor(j), is_trans(j), n_before, n_used, pages[j], bufs[j]);
                    GGML_ASSERT(ok && "there was memory for the smaller tensor a moment ago");
                }
            } else {
                cache.layers = before;
            }
            attach_tensors();

            return false;
        }
    }

    if (!has_own_bufs) {
        cache.ctxs_bufs = std::move(first);
        has_own_bufs    = true;
    }

    attach_tensors();

    // the table
    auto used = table.cp(0, n_used);

    table.resize(n_cells);
    table.set(0, used);

    cache.v_heads[0] = std::min(cache.v_heads[0], n_used);

    tokens   .resize(n_cells);
    is_merged.resize(n_cells);
    for (auto & layer : merged) {
        for (auto & head : layer) {
            head.resize(std::min<size_t>(head.size(), n_cells));
            head.shrink_to_fit();
        }
    }

    // bias and sums
    std::vector<std::vector<float>> sums(layers.size());
    for (size_t l = 0; l < layers.size() && layers[l].sum; ++l) {
        sums[l].resize(ggml_nelements(layers[l].sum));
        ggml_backend_tensor_get(layers[l].sum, sums[l].data(), 0, ggml_nbytes(layers[l].sum));
    }

    if (!init_bias(n_cells)) {
        throw std::bad_alloc();
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        for (int32_t h = 0; layers[l].sum && h < layers[l].n_head_kv && n_used > 0; ++h) {
            ggml_backend_tensor_set(layers[l].sum, sums[l].data() + (size_t) h*n_before, h*layers[l].sum->nb[1], n_used*sizeof(float));
        }
        if (has_bias) {
            upload_bias(l);
        }
    }

    kvmerge_give_back();

    version++;

    if (n_cells < n_before) {
        // an update lets the buffers of the graphs grow, but not shrink
        lctx->sched_reserve_later();
    }

    LLAMA_LOG_DEBUG("%s: %u -> %u cells\n", __func__, n_before, n_cells);

    return true;
}

ggml_tensor *& kvmerge_engine::cache_tensor(size_t i) {
    auto & kv = cache.layers[i/2];

    return i % 2 == 0 ? kv.k : kv.v;
}

bool kvmerge_engine::is_trans(size_t i) const {
    return i % 2 == 1 && v_trans;
}

void kvmerge_engine::attach_tensors() {
    for (size_t l = 0; l < layers.size(); ++l) {
        auto & kv = cache.layers[l];

        // with one stream the views of llama.cpp are the tensors
        kv.k_stream = { kv.k };
        kv.v_stream = { kv.v };

        layers[l].k = kv.k;
        layers[l].v = kv.v;
    }
}

void kvmerge_engine::shrink() {
    auto & table = cache.v_cells[0];

    if (!room.is_elastic || room.is_tight || table.get_has_shift()) {
        return;
    }

    const uint32_t n = std::min(n_cells_max(), std::max(round_up(lctx->get_cparams().n_ubatch), round_up(table.used_max_p1() + 1)));

    if (n < table.size()) {
        resize(n);
        return;
    }

    for (size_t i = 0; i < pages.size(); ++i) {
        if (pages[i].data()) {
            pages[i].keep(n_bytes_used(cache_tensor(i), is_trans(i), table.used_max_p1()));
        }
    }
}

int64_t kvmerge_engine::bytes() const {
    int64_t res = 0;

    const std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> * const owners[] = { &cache.ctxs_bufs, &bufs_bias };

    for (const auto * bufs : owners) {
        for (const auto & [ctx, buf] : *bufs) {
            res += ggml_backend_buffer_get_size(buf.get());
        }
    }

    return res;
}

//
// room
//

void kvmerge_engine::on_no_slot(const std::vector<llama_ubatch> & ubatches) {
    n_wanted = 0;
    for (const auto & ubatch : ubatches) {
        n_wanted += ubatch.n_tokens;
    }
}

void kvmerge_engine::on_restore(uint32_t n_cells) {
    const auto & table = cache.get_cells(0);

    const uint32_t n = round_up(table.get_used() + n_cells);

    if (room.is_elastic && n > table.size() && n <= n_cells_max() && !table.get_has_shift()) {
        resize(n);

        // this is no update of the memory, after which the context would do it
        lctx->sched_reserve_later();
    }
}

bool kvmerge_engine::make_room(uint32_t n_tokens) {
    const auto & table = cache.get_cells(0);

    const uint32_t n_max = n_cells_max();

    if (table.get_used() + n_tokens > n_max && room.n_cells_max > 0 && is_attached) {
        const uint32_t n_used = table.get_used();

        room.is_tight = true;

        for (size_t s = 0; s < sequences.size(); ++s) {
            const auto cells = sequence_cells(s);

            if (cells.empty() || n_max <= n_tokens || check_merge(s, cells) != KVMERGE_OK) {
                continue;
            }

            // its share of what may stay; some less, lest the next batch merges again
            const int32_t n_most = (int64_t) (n_max - n_tokens)*cells.size()/n_used;

            int32_t n_target = n_most - n_most/8;
            if (room.share > 0) {
                n_target = std::min(n_target, (int32_t) std::ceil(room.share*sequences[s].n_seen));
            }
            n_target = std::max(n_target, std::min(params.n_sink + kvmerge_n_keep(params) + 1, n_most));

            if (n_target < 1 || n_target >= (int32_t) cells.size()) {
                continue;
            }
            if (run(s, n_target, n_most) != KVMERGE_OK) {
                break;
            }
        }

        room.is_tight = false;
    }

    const uint32_t n = table.get_used() + n_tokens;

    if (n > n_max) {
        LLAMA_LOG_ERROR("%s: %u tokens do not fit next to %u cells: there may be %u\n", __func__, n_tokens, table.get_used(), n_max);
        return false;
    }

    return n <= table.size() || resize(std::min(n_max, round_up(n)));
}

void kvmerge_engine::mark_whole(int32_t n_cells, std::vector<kvmerge_plan> & plans) const {
    // while a prompt is being read, the newest picture has not been asked about yet
    const int32_t n_whole = std::max<int32_t>(room.n_whole, room.is_tight);

    int32_t n_left  = n_cells - params.n_sink - kvmerge_n_keep(params);
    int32_t segment = -1; // the last one that was marked

    // where nothing else is asked for, one half goes to what is older
    n_left = room.n_whole > 0 ? n_left : std::min(n_left, n_cells/2);

    for (auto & plan : plans) {
        for (auto & cell : plan.cells) {
            cell.is_whole = false; // what an earlier merge said
        }
    }

    for (int32_t i = 0; i < n_whole; ++i) {
        int32_t next = -1;
        int32_t n    = 0;

        for (const auto & cell : plans[0].cells) {
            if (cell.modality != KVMERGE_TEXT && (segment < 0 || cell.segment < segment)) {
                n    = cell.segment > next ? 1 : n + (cell.segment == next);
                next = std::max(next, cell.segment);
            }
        }

        if (next < 0 || n > n_left) {
            break;
        }

        for (auto & plan : plans) {
            for (auto & cell : plan.cells) {
                cell.is_whole = cell.is_whole || (cell.segment == next && cell.modality != KVMERGE_TEXT);
            }
        }

        n_left -= n;
        segment = next;
    }
}
