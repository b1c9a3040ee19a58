// How many cells there are. The cache begins small, grows when a batch finds no slot, and shrinks after a merge. Where it
// may not grow any further, a merge makes room.
//
// llama.cpp sizes its table of cells and its tensors once. Here both are replaced by others of another size, between two
// graphs: the context reserves its graphs anew after any update of the memory.
//
// Layers that hold fewer cells of a merged sequence than the widest one hold them at its end. Where that sequence is the
// first in the cache, such a layer does not store the cells in front: its tensors are shorter, and attention begins later.
// No token may come into the cells below n_low, the first one that all layers store.

#include "kvmerge-room.h"

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-fault.h"
#include "kvmerge-host.h"
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

// tokens that fit after a merge for want of room, before the next one: a merge costs as much as some ten of them
static constexpr int32_t MIN_STRETCH = 64;

// A layer stores a multiple of so many cells: on a device as many as the kernels are made for, in the host's memory the
// tile of its flash attention.
static uint32_t layer_step(const kvmerge_layer & layer) {
    return kvmerge_is_host(layer.k) ? 64 : STEP;
}

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

// Cells of K or V that move: n of them, from row `from` of one tensor to row `to` of another.
struct cell_move {
    uint32_t from;
    uint32_t to;
    uint32_t n;
};

// through memory of the host; trans: memory holds one row a channel, over all cells
static void copy_staged(const ggml_tensor * old, ggml_tensor * dst, bool trans, const cell_move & move, std::vector<uint8_t> & staging) {
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

// what copy_staged() takes at most, for a tensor of n_rows cells that becomes one of n_rows_new
static size_t n_bytes_staged(const ggml_tensor * t, bool trans, uint32_t n_rows_new) {
    const size_t n_old = ggml_nbytes(t);
    const size_t n_new = ggml_row_size(t->type, t->ne[0])*n_rows_new;

    return trans ? n_old + n_new : std::min(n_old, n_new);
}

// ctx has room for two views
static void copy_cells(ggml_context * ctx, ggml_tensor * old, ggml_tensor * dst, bool trans, const cell_move & move, std::vector<uint8_t> & staging) {
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
static void move_cells(const ggml_tensor * old, ggml_tensor * dst, bool trans, const cell_move & move) {
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

// What lies behind the used cells goes back to the system. Where memory holds one row a channel it cannot, and is cleared:
// attention multiplies it by 0, which leaves a NaN what it is.
static void keep_used(const ggml_tensor * t, bool trans, uint32_t n_used, kvmerge_pages & pages) {
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

namespace {

// K or V of a layer in another size. It is made before anything changes: what is small may find no memory either.
struct sized_tensor {
    ggml_context_ptr        ctx;
    ggml_tensor *           t;
    ggml_backend_buffer_ptr buf; // where there are pages; else it is made when the tensor is put in its place

    sized_tensor(const ggml_tensor * like, uint32_t n_rows, const kvmerge_pages & pages) :
        ctx(kvmerge_make_context(3)), // with the views of a copy
        t(ggml_new_tensor_3d(ctx.get(), like->type, like->ne[0], n_rows, 1)) {
        ggml_set_name(t, like->name);

        if (pages.data()) {
            buf.reset(ggml_backend_cpu_buffer_from_ptr(pages.data(), ggml_nbytes(t)));
            ggml_backend_tensor_alloc(buf.get(), t, pages.data());
        }
    }
};

} // namespace

// Puts `next` in the place of t, K or V of a layer, and its buffer into `owner`. Fails only where the tensor grows, or where
// the buffer that was there is not its own.
static bool replace_tensor(ggml_tensor *& t, sized_tensor & next, bool trans, const cell_move & move, kvmerge_pages & pages,
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
        keep_used(res, trans, move.to + move.n, pages);
    }

    t     = res;
    owner = { std::move(next.ctx), std::move(next.buf) };

    return true;
}

std::vector<uint32_t> kvmerge_engine::first_cells() const {
    std::vector<uint32_t> res(layers.size());

    const auto & table = cache.get_cells(0);

    for (size_t l = 0; l < layers.size() && room.is_elastic; ++l) {
        const auto holds_nothing = [&](uint32_t idx) {
            return !table.is_empty(idx) && is_merged[idx] && std::all_of(merged[l].begin(), merged[l].end(),
                    [&](const auto & head) { return kvmerge_is_empty(head[idx]); });
        };

        while (res[l] < table.size() && holds_nothing(res[l])) {
            res[l]++;
        }

        res[l] = res[l]/layer_step(layers[l])*layer_step(layers[l]);
    }

    return res;
}

bool kvmerge_engine::resize(uint32_t n_cells, const std::vector<uint32_t> & first) {
    auto & table = cache.v_cells[0];

    const uint32_t n_before = table.size();
    const uint32_t n_used   = table.used_max_p1();

    std::vector<uint32_t> first_before;
    for (const auto & layer : layers) {
        first_before.push_back(layer.first);
    }

    if (n_cells == n_before && first == first_before) {
        return true;
    }

    // In place, cells move up or down. Where it would be both, they move up first.
    bool is_up   = n_cells > n_before;
    bool is_down = n_cells < n_before;
    for (size_t l = 0; l < layers.size(); ++l) {
        is_up   = is_up   || first[l] < first_before[l];
        is_down = is_down || first[l] > first_before[l];
    }
    if (is_up && is_down) {
        auto lower = first;
        for (size_t l = 0; l < layers.size(); ++l) {
            lower[l] = std::min(first[l], first_before[l]);
        }
        return resize(std::max(n_cells, n_before), lower) && resize(n_cells, first);
    }

    GGML_ASSERT(n_used <= n_cells);

    lctx->synchronize();

    // What may fail comes first: nothing has changed when it does.
    biases         bias;
    llama_kv_cells table_new;

    // From the first time on every tensor has a buffer of its own: in pages that grow, or replaced one by one, so that never
    // more than one is there twice.
    const size_t n_tensors = 2*cache.layers.size();

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs_first;
    std::vector<sized_tensor> next;
    std::vector<sized_tensor> back; // to what there was
    std::vector<uint8_t>      staging;

    auto layers_before = cache.layers;

    try {
        if (!make_bias(n_cells, first, bias)) {
            throw std::bad_alloc();
        }

        if (n_cells != n_before) {
            GGML_ASSERT(!table.get_has_shift());

            table_new.resize(n_cells);
            table_new.set(0, table.cp(0, n_used));
        }

        kvmerge_may_fail();

        tokens   .reserve(n_cells);
        is_merged.reserve(n_cells);

        if (!has_own_bufs) {
            bufs_first.resize(n_tensors);
            pages.clear();
            pages.resize(n_tensors);
        }

        for (size_t i = 0; i < n_tensors; ++i) {
            const auto * t = cache_tensor(i);

            staging.reserve(has_own_bufs && pages[i].data() ? 0 : n_bytes_staged(t, is_trans(i), n_cells - first[i/2]));

            if (!has_own_bufs && kvmerge_is_host(t) && ggml_backend_buffer_get_type(t->buffer) == ggml_backend_cpu_buffer_type()) {
                pages[i] = kvmerge_pages(ggml_row_size(t->type, t->ne[0])*lctx->get_cparams().n_ctx_seq);
            }

            next.emplace_back(t, n_cells  - first       [i/2], pages[i]);
            back.emplace_back(t, n_before - first_before[i/2], pages[i]);
        }
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: no memory to go from %u cells to %u\n", __func__, n_before, n_cells);
        return false;
    }

    auto & bufs = has_own_bufs ? cache.ctxs_bufs : bufs_first;

    const auto replace = [&](size_t i, sized_tensor & tensor, const std::vector<uint32_t> & before, const std::vector<uint32_t> & after) {
        const size_t   l = i/2;
        const uint32_t c = std::max(before[l], after[l]); // the first cell that is in both

        const cell_move move = { c - before[l], c - after[l], n_used > c ? n_used - c : 0 };

        return replace_tensor(cache_tensor(i), tensor, is_trans(i), move, pages[i], bufs[i], staging);
    };

    for (size_t i = 0; i < n_tensors; ++i) {
        if (replace(i, next[i], first_before, first)) {
            continue;
        }

        LLAMA_LOG_ERROR("%s: no memory for %u cells in layer %u\n", __func__, n_cells - first[i/2], cache.layers[i/2].il);

        if (has_own_bufs) {
            for (size_t j = 0; j < i; ++j) {
                const bool ok = replace(j, back[j], first, first_before);
                GGML_ASSERT(ok && "what grew fits where it lies when it shrinks again");
            }
        } else {
            cache.layers = std::move(layers_before);
        }
        attach_tensors();

        version++; // graphs know the tensors that were there

        return false;
    }

    if (!has_own_bufs) {
        cache.ctxs_bufs = std::move(bufs_first);
        has_own_bufs    = true;
    }

    attach_tensors();

    use_bias(std::move(bias));

    for (size_t l = 0; l < layers.size(); ++l) {
        layers[l].first = first[l];
    }

    if (n_cells != n_before) {
        table = std::move(table_new);
    }

    n_low            = *std::max_element(first.begin(), first.end());
    cache.v_heads[0] = std::min(cache.v_heads[0], n_used);

    tokens   .resize(n_cells);
    is_merged.resize(n_cells);
    for (auto & layer : merged) {
        for (auto & head : layer) {
            head.resize(std::min<size_t>(head.size(), n_cells));
            head.shrink_to_fit();
        }
    }

    kvmerge_give_back();

    version++;

    if (!is_up) {
        // an update lets the buffers of the graphs grow, but not shrink
        lctx->sched_reserve_later();
    }

    LLAMA_LOG_DEBUG("%s: %u -> %u cells, %u in the smallest layer\n", __func__, n_before, n_cells, n_cells - n_low);

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

void kvmerge_engine::shrink() noexcept {
    auto & table = cache.v_cells[0];

    if (!room.is_elastic || table.get_has_shift()) {
        return;
    }

    uint32_t n = table.size();

    // a batch is waiting for the cells that a tight merge frees
    if (!room.is_tight) {
        n = std::min({ n, n_cells_max(), std::max(round_up(lctx->get_cparams().n_ubatch), round_up(table.used_max_p1() + 1)) });
    }

    try {
        resize(n, first_cells());
    } catch (const std::bad_alloc &) {
        // it stays larger than it needs to be
        LLAMA_LOG_WARN("%s: no memory to become smaller\n", __func__);
    }

    for (size_t i = 0; i < pages.size() && !room.is_tight; ++i) {
        if (pages[i].data()) {
            keep_used(cache_tensor(i), is_trans(i), table.used_max_p1() - layers[i/2].first, pages[i]);
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

void kvmerge_engine::on_init_update(bool optimize) {
    if (!optimize) {
        // another batch than the one that found no slot
        n_wanted    = 0;
        is_refusing = false;
    }
}

void kvmerge_engine::on_no_slot(const std::vector<llama_ubatch> & ubatches) {
    n_wanted = 0;
    for (const auto & ubatch : ubatches) {
        n_wanted += ubatch.n_tokens;
    }
}

void kvmerge_engine::make_cells(uint64_t n_cells) {
    const auto & table = cache.get_cells(0);

    uint32_t n = table.size();

    if (room.is_elastic && n_cells > n && n_cells <= n_cells_max() && !table.get_has_shift()) {
        n = std::min(n_cells_max(), round_up(n_cells));
    }

    // it is not known yet which cells the layers hold, and the tensors are filled when the whole state is read
    if (!resize(n, std::vector<uint32_t>(layers.size()))) {
        throw std::bad_alloc();
    }

    // this is no update of the memory, after which the context would do it
    lctx->sched_reserve_later();
}

bool kvmerge_engine::make_room(uint32_t n_tokens) {
    const auto & table = cache.get_cells(0);

    const uint32_t n_max = n_cells_max();

    if (table.get_used() + n_tokens > n_max && room.n_cells_max > 0 && is_attached) {
        const uint32_t n_used = table.get_used();

        // also when a merge throws: a cache that stays tight never shrinks again
        struct tight_scope {
            bool & is_tight;
            ~tight_scope() { is_tight = false; }
        } scope = { room.is_tight };

        room.is_tight = true;

        for (size_t s = 0; s < sequences.size(); ++s) {
            const auto cells = sequence_cells(s);

            if (cells.empty() || n_max <= n_tokens || check_merge(s, cells) != KVMERGE_OK) {
                continue;
            }

            // Its share of what may stay; less than that in every layer, lest the next tokens merge again.
            const int32_t n_fit  = (int64_t) (n_max - n_tokens)*cells.size()/n_used;
            const int32_t n_most = n_fit - std::min(n_fit/2, std::max<int32_t>(n_fit/8, MIN_STRETCH));

            const bool    text_alone = params.select == KVMERGE_SELECT_MEDIA;
            const int32_t n_text     = text_alone ? std::min(count_modalities(cells).n_text, n_most) : 0;

            // where layers differ, the widest has n_most
            int32_t n_target = n_most - (params.allocate == KVMERGE_ALLOCATE_UNIFORM ? 0 : (n_most - n_text)/8);
            if (room.share > 0) {
                n_target = std::min(n_target, n_text + (int32_t) std::ceil(room.share*(sequences[s].n_seen - n_text)));
            }
            n_target = std::max(n_target, std::min(params.n_sink + kvmerge_n_keep(params) + 1, n_most));

            if (n_target < 1 || n_target >= (int32_t) cells.size()) {
                continue;
            }

            const auto status = run(s, n_target, n_most);

            if (status == KVMERGE_ERROR_CLEARED) {
                is_refusing = true;
            }
            if (status != KVMERGE_OK) {
                return false; // what is said of it stands in kvmerge_error_message()
            }
        }
    }

    const uint32_t n = table.get_used() + n_tokens;

    if (n > n_max) {
        LLAMA_LOG_ERROR("%s: %u tokens do not fit next to %u cells: there may be %u\n", __func__, n_tokens, table.get_used(), n_max);
        return false;
    }

    // cells that were freed and that some layer does not store are stored again
    return resize(std::max(table.size(), std::min(n_max, round_up(n))), first_cells());
}

void kvmerge_engine::mark_whole(int32_t n_cells, int32_t n_text, std::vector<kvmerge_plan> & plans) const {
    // while a prompt is being read, the newest picture has not been asked about yet
    const int32_t n_whole = std::max<int32_t>(room.n_whole, room.is_tight);

    const int32_t n_free = n_cells - n_text;

    int32_t n_left  = n_free - (n_text > 0 ? 0 : params.n_sink + kvmerge_n_keep(params));
    int32_t segment = -1; // the last one that was marked

    // where nothing else is asked for, one half goes to what is older
    n_left = room.n_whole > 0 ? n_left : std::min(n_left, n_free/2);

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
                next = std::max<int32_t>(next, cell.segment);
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
