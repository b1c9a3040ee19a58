// Cells that become more or fewer.
//
// llama.cpp sizes its table of cells and its tensors once. Here both are replaced by others of another size, between two
// graphs: the context reserves its graphs anew after any update of the memory.
//
// Layers that hold fewer cells of a merged sequence than the widest one hold them at its end. Where that sequence is the
// first in the cache, such a layer does not store the cells in front: its tensors are shorter, and attention begins later.
// No token may come into the cells below n_low, the first one that all layers store.

#include "kvmerge-engine.h"
#include "kvmerge-fault.h"
#include "kvmerge-host.h"
#include "kvmerge-move.h"
#include "kvmerge-room.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <utility>

// A layer stores a multiple of so many cells: on a device as many as the kernels are made for, in the host's memory the
// tile of its flash attention.
static uint32_t layer_step(const kvmerge_layer & layer) {
    return kvmerge_is_host(layer.k) ? 64 : KVMERGE_CELL_STEP;
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

struct kvmerge_engine::resizing {
    uint32_t n_before;
    uint32_t n_after;

    std::vector<uint32_t> first_before; // [layer]

    biases         bias;
    llama_kv_cells table;

    // K and V of all layers in turn
    std::vector<kvmerge_sized_tensor> tensors;
    std::vector<kvmerge_sized_tensor> back; // to what there was
    std::vector<uint8_t>              staging;

    // From the first time on every tensor has a buffer of its own: in pages that grow, or replaced one by one, so that never
    // more than one is there twice.
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs_first;
    std::vector<kvmerge_pages>                                        pages_first;
};

void kvmerge_engine::prepare_resize(uint32_t n_cells, const std::vector<uint32_t> & first, resizing & next) {
    const auto & table = cache.get_cells(0);

    if (!make_bias(n_cells, first, next.bias)) {
        throw std::bad_alloc();
    }

    if (n_cells != table.size()) {
        GGML_ASSERT(!table.get_has_shift());

        next.table.resize(n_cells);
        next.table.set(0, table.cp(0, table.used_max_p1()));
    }

    kvmerge_may_fail();

    tokens   .reserve(n_cells);
    is_merged.reserve(n_cells);

    const size_t n_tensors = 2*layers.size();

    if (!has_own_bufs) {
        next.bufs_first .resize(n_tensors);
        next.pages_first.resize(n_tensors);
    }

    auto & pages_next = has_own_bufs ? pages : next.pages_first;

    for (size_t i = 0; i < n_tensors; ++i) {
        const auto * t = cache_tensor(i);

        next.staging.reserve(has_own_bufs && pages[i].data() ? 0 : kvmerge_n_bytes_staged(t, is_trans(i), n_cells - first[i/2]));

        if (!has_own_bufs && kvmerge_is_host(t) && ggml_backend_buffer_get_type(t->buffer) == ggml_backend_cpu_buffer_type()) {
            pages_next[i] = kvmerge_pages(ggml_row_size(t->type, t->ne[0])*lctx->get_cparams().n_ctx_seq);
        }

        next.tensors.emplace_back(t, n_cells       - first            [i/2], pages_next[i]);
        next.back   .emplace_back(t, next.n_before - next.first_before[i/2], pages_next[i]);
    }
}

bool kvmerge_engine::replace_tensors(resizing & next, const std::vector<uint32_t> & first) {
    const uint32_t n_used = cache.get_cells(0).used_max_p1();

    auto   layers_before = cache.layers;
    auto & bufs          = has_own_bufs ? cache.ctxs_bufs : next.bufs_first;
    auto & pages_next    = has_own_bufs ? pages           : next.pages_first;

    const auto replace = [&](size_t i, kvmerge_sized_tensor & tensor, const std::vector<uint32_t> & before, const std::vector<uint32_t> & after) {
        const size_t   l = i/2;
        const uint32_t c = std::max(before[l], after[l]); // the first cell that is in both

        const kvmerge_cell_move move = { c - before[l], c - after[l], n_used > c ? n_used - c : 0 };

        return kvmerge_replace_tensor(cache_tensor(i), tensor, is_trans(i), move, pages_next[i], bufs[i], next.staging);
    };

    for (size_t i = 0; i < next.tensors.size(); ++i) {
        if (replace(i, next.tensors[i], next.first_before, first)) {
            continue;
        }

        LLAMA_LOG_ERROR("%s: no memory for %u cells in layer %u\n", __func__, next.n_after - first[i/2], cache.layers[i/2].il);

        if (has_own_bufs) {
            for (size_t j = 0; j < i; ++j) {
                const bool ok = replace(j, next.back[j], first, next.first_before);
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
        cache.ctxs_bufs = std::move(next.bufs_first);
        pages           = std::move(next.pages_first);
        has_own_bufs    = true;
    }

    attach_tensors();

    return true;
}

bool kvmerge_engine::resize(uint32_t n_cells, const std::vector<uint32_t> & first) {
    auto & table = cache.v_cells[0];

    const uint32_t n_used = table.used_max_p1();

    resizing next = {};

    next.n_before = table.size();
    next.n_after  = n_cells;
    for (const auto & layer : layers) {
        next.first_before.push_back(layer.first);
    }

    if (n_cells == next.n_before && first == next.first_before) {
        return true;
    }

    // In place, cells move up or down. Where it would be both, they move up first.
    bool is_up   = n_cells > next.n_before;
    bool is_down = n_cells < next.n_before;
    for (size_t l = 0; l < layers.size(); ++l) {
        is_up   = is_up   || first[l] < next.first_before[l];
        is_down = is_down || first[l] > next.first_before[l];
    }
    if (is_up && is_down) {
        auto lower = first;
        for (size_t l = 0; l < layers.size(); ++l) {
            lower[l] = std::min(first[l], next.first_before[l]);
        }
        return resize(std::max(n_cells, next.n_before), lower) && resize(n_cells, first);
    }

    GGML_ASSERT(n_used <= n_cells);

    lctx->synchronize();

    // What may fail comes first: nothing has changed when it does.
    try {
        prepare_resize(n_cells, first, next);
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: no memory to go from %u cells to %u\n", __func__, next.n_before, n_cells);
        return false;
    }

    if (!replace_tensors(next, first)) {
        return false;
    }

    use_bias(std::move(next.bias));

    for (size_t l = 0; l < layers.size(); ++l) {
        layers[l].first = first[l];
    }

    if (n_cells != next.n_before) {
        table = std::move(next.table);
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

    LLAMA_LOG_DEBUG("%s: %u -> %u cells, %u in the smallest layer\n", __func__, next.n_before, n_cells, n_cells - n_low);

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

        // these are all that there is of a layer
        [[maybe_unused]] auto & [il, k, v, k_stream, v_stream] = kv;

        // with one stream the views of llama.cpp are the tensors
        kv.k_stream = { kv.k };
        kv.v_stream = { kv.v };

        layers[l].k = kv.k;
        layers[l].v = kv.v;
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
