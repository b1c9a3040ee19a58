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
#include "kvmerge-select.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// get_n_kv() pads to as many, and so do the backends' attention kernels
static constexpr uint32_t STEP = 256;

// A layer stores a multiple of so many cells: on a device as many as the kernels are made for, in the host's memory the
// tile of its flash attention.
static uint32_t layer_step(const kvmerge_layer & layer) {
    return ggml_backend_buffer_is_host(layer.k->buffer) ? 64 : STEP;
}

// freed bytes that are given back while layers are still being replaced
static constexpr size_t MAX_FREED = 16*1024*1024;

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

// the cells [first, end)
struct cell_range {
    uint32_t first;
    uint32_t end;

    uint32_t size() const { return end - first; }

    bool operator==(const cell_range & other) const { return first == other.first && end == other.end; }
};

// n cells from row i_old to row i_dst; trans: memory holds one row a channel, over all cells
static void copy_cells(const ggml_tensor * old, ggml_tensor * dst, bool trans, uint32_t i_old, uint32_t i_dst, uint32_t n) {
    if (!trans) {
        // the cells lie one after the other
        ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

        ggml_tensor * from = ggml_view_2d(ctx.get(), const_cast<ggml_tensor *>(old), old->ne[0], n, old->nb[1], i_old*old->nb[1]);
        ggml_tensor * to   = ggml_view_2d(ctx.get(), dst,                            dst->ne[0], n, dst->nb[1], i_dst*dst->nb[1]);

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
        std::copy_n(rows.data() + (e*old->ne[1] + i_old)*size, n*size, res.data() + (e*dst->ne[1] + i_dst)*size);
    }
    ggml_backend_tensor_set(dst, res.data(), 0, res.size());
}

// replace the tensors of a layer, which hold the cells `before`, by others for `after`; the caller owns their buffer
static bool replace_layer(ggml_tensor *& k, ggml_tensor *& v, bool v_trans, cell_range before, cell_range after, uint32_t n_used,
        std::pair<ggml_context_ptr, ggml_backend_buffer_ptr> & owner) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 4*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

    ggml_tensor * k_new = ggml_new_tensor_3d(ctx.get(), k->type, k->ne[0], after.size(), 1);
    ggml_tensor * v_new = ggml_new_tensor_3d(ctx.get(), v->type, v->ne[0], after.size(), 1);

    ggml_set_name(k_new, k->name);
    ggml_set_name(v_new, v->name);

    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(k->buffer)));

    if (!buf) {
        return false;
    }
    ggml_backend_buffer_clear(buf.get(), 0); // no NaN in cells that were never used

    const uint32_t first = std::max(before.first, after.first);

    try {
        if (first < n_used) {
            copy_cells(k, k_new, false,   first - before.first, first - after.first, n_used - first);
            copy_cells(v, v_new, v_trans, first - before.first, first - after.first, n_used - first);
        }
    } catch (const std::bad_alloc &) {
        return false;
    }

    k     = k_new;
    v     = v_new;
    owner = { std::move(ctx), std::move(buf) };

    return true;
}

std::vector<uint32_t> kvmerge_engine::first_cells() const {
    std::vector<uint32_t> res(layers.size());

    const auto & table = cache.get_cells(0);

    for (size_t l = 0; l < layers.size() && room.is_elastic; ++l) {
        const auto holds_nothing = [&](uint32_t idx) {
            return !table.is_empty(idx) && is_merged[idx] && std::all_of(merged[l].begin(), merged[l].end(),
                    [&](const auto & head) { return head[idx].mass == 0 && head[idx].bias == -INFINITY; });
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
    const size_t   n_layers = cache.layers.size();

    std::vector<cell_range> before;
    std::vector<cell_range> after;
    for (size_t l = 0; l < n_layers; ++l) {
        before.push_back({ layers[l].first, n_before });
        after .push_back({ first[l],        n_cells  });
    }

    if (before == after) {
        return true;
    }

    GGML_ASSERT(n_used <= n_cells);

    lctx->synchronize();

    // What may fail comes first: nothing has changed when it does.
    biases         bias;
    llama_kv_cells table_new;

    if (!make_bias(n_cells, first, bias)) {
        LLAMA_LOG_ERROR("%s: no memory for the bias of %u cells\n", __func__, n_cells);
        return false;
    }

    if (n_cells != n_before) {
        GGML_ASSERT(!table.get_has_shift());

        table_new.resize(n_cells);
        table_new.set(0, table.cp(0, n_used));
    }

    tokens   .reserve(n_cells);
    is_merged.reserve(n_cells);

    // From the first time on every layer has a buffer of its own. They are replaced one by one, so that never more than
    // one layer is there twice.
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs_first(has_own_bufs ? 0 : n_layers);

    auto & bufs = has_own_bufs ? cache.ctxs_bufs : bufs_first;

    const auto layers_before = cache.layers;

    size_t n_freed = 0; // bytes since the last time

    for (size_t l = 0; l < n_layers; ++l) {
        auto & kv = cache.layers[l];

        if (!replace_layer(kv.k, kv.v, v_trans, before[l], after[l], n_used, bufs[l])) {
            LLAMA_LOG_ERROR("%s: no memory for %u cells in layer %u\n", __func__, after[l].size(), kv.il);

            for (size_t i = 0; i < l; ++i) {
                auto & done = cache.layers[i];

                if (has_own_bufs) {
                    const bool ok = replace_layer(done.k, done.v, v_trans, after[i], before[i], n_used, bufs[i]);
                    GGML_ASSERT(ok && "there was memory for the layer a moment ago");
                } else {
                    done = layers_before[i];
                }
            }
            attach_tensors();

            version++; // graphs know the tensors that were there

            return false;
        }

        n_freed += has_own_bufs ? before[l].size()*bytes_per_cell(layers[l]) : 0;
        if (n_freed > MAX_FREED) {
            kvmerge_give_back();
            n_freed = 0;
        }
    }

    if (!has_own_bufs) {
        cache.ctxs_bufs = std::move(bufs_first);
        has_own_bufs    = true;
    }

    attach_tensors();

    use_bias(std::move(bias));

    for (size_t l = 0; l < n_layers; ++l) {
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

    // also the buffers of the graphs follow the size
    lctx->sched_reserve_later();

    LLAMA_LOG_DEBUG("%s: %u -> %u cells, %u in the smallest layer\n", __func__, n_before, n_cells, n_cells - n_low);

    return true;
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

    if (!room.is_elastic || table.get_has_shift()) {
        return;
    }

    uint32_t n = table.size();

    // a batch is waiting for the cells that a tight merge frees
    if (!room.is_tight) {
        n = std::min({ n, n_cells_max(), std::max(round_up(lctx->get_cparams().n_ubatch), round_up(table.used_max_p1() + 1)) });
    }

    resize(n, first_cells());
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

    // cells that were freed and that some layer does not store are stored again
    return resize(std::max(table.size(), std::min(n_max, round_up(n))), first_cells());
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
