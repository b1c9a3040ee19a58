#include "kvmerge-cache.h"

#include "kvmerge-attn.h"
#include "kvmerge-engine.h"
#include "kvmerge-room.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

kvmerge_cache::kvmerge_cache(
        const llama_model & model,
        const llama_hparams & hparams,
                ggml_type   type_k,
                ggml_type   type_v,
                     bool   v_trans,
                     bool   offload,
                     bool   unified,
                 uint32_t   kv_size,
                 uint32_t   n_seq_max,
                 uint32_t   n_pad,
                 uint32_t   n_swa,
           llama_swa_type   swa_type,
           llama_memory_t   mem_other,
    const layer_filter_cb & filter,
    const  layer_reuse_cb & reuse,
    const  layer_share_cb & share) :
    llama_kv_cache(model, hparams, type_k, type_v, v_trans, offload, unified,
            mem_other ? kv_size : kvmerge_first_size(kv_size, swa_type != LLAMA_SWA_TYPE_NONE),
            n_seq_max, n_pad, n_swa, swa_type, mem_other, filter, reuse, share) {
}

uint32_t kvmerge_cache::n_low() const {
    return engine ? engine->n_low : 0;
}

//
// what the engine is told of
//

static llama_pos begin_of(llama_pos p0) { return std::max(p0, 0); }
static llama_pos end_of  (llama_pos p1) { return p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1; }

void kvmerge_cache::clear(bool data) {
    llama_kv_cache::clear(data);

    if (engine) {
        engine->on_clear();
    }
}

bool kvmerge_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // a merged cell stands for several positions: it goes as a whole or not at all
    if (engine && !engine->on_seq_rm(seq_id, begin_of(p0), end_of(p1))) {
        return false;
    }

    return llama_kv_cache::seq_rm(seq_id, p0, p1);
}

void kvmerge_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if (engine && seq_id_src != seq_id_dst) {
        engine->on_seq_cp(seq_id_src, seq_id_dst);
    }
}

void kvmerge_cache::seq_keep(llama_seq_id seq_id) {
    if (engine) {
        engine->on_seq_keep(seq_id);
    }

    llama_kv_cache::seq_keep(seq_id);
}

void kvmerge_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (engine && shift != 0 && begin_of(p0) != end_of(p1)) {
        engine->on_seq_move(seq_id, begin_of(p0), end_of(p1), [shift](llama_pos pos) { return pos + shift; });
    }

    llama_kv_cache::seq_add(seq_id, p0, p1, shift);
}

void kvmerge_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (engine && d != 1 && begin_of(p0) != end_of(p1)) {
        engine->on_seq_move(seq_id, begin_of(p0), end_of(p1), [d](llama_pos pos) { return pos/d; });
    }

    llama_kv_cache::seq_div(seq_id, p0, p1, d);
}

llama_memory_context_ptr kvmerge_cache::init_update(llama_context * lctx, bool optimize) {
    if (!engine) {
        return llama_kv_cache::init_update(lctx, optimize);
    }

    engine->on_init_update(optimize);

    const bool has_work = get_has_shift() || engine->is_pending();

    // "do_shift" is all that such a context can be told; update() asks again
    auto res = std::make_unique<llama_kv_cache_context>(this, lctx, has_work, std::move(sc_info));

    GGML_ASSERT(res->get_status() == (has_work ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE));

    return res;
}

llama_kv_cache::slot_info_vec_t kvmerge_cache::prepare(const std::vector<llama_ubatch> & ubatches) {
    auto res = llama_kv_cache::prepare(ubatches);

    // llama.cpp goes on where there was no memory for its graphs, and would compute in none: the update that makes room
    // reserves them anew
    if (engine && engine->has_lost_graphs()) {
        res.clear();
    }

    if (engine && res.empty()) {
        engine->on_no_slot(ubatches);
    }

    return res;
}

bool kvmerge_cache::update(llama_context * lctx, bool do_shift, const stream_copy_info & sc_info) {
    if (!engine) {
        return llama_kv_cache::update(lctx, do_shift, sc_info);
    }

    const bool is_changed = engine->on_update(lctx);

    if (!get_has_shift()) {
        return llama_kv_cache::update(lctx, false, sc_info) || is_changed;
    }

    // a shift turns the keys of all cells, so all layers have to store them
    if (!engine->store_all()) {
        LLAMA_LOG_ERROR("%s: no memory for the cells of all layers: the positions are shifted later\n", __func__);
        return is_changed;
    }

    const bool is_shifted = llama_kv_cache::update(lctx, true, sc_info);

    engine->shrink();

    return is_shifted || is_changed;
}

void kvmerge_cache::on_ubatch(const slot_info & sinfo, const llama_ubatch & ubatch) {
    if (engine) {
        engine->on_ubatch(sinfo.idxs[0], ubatch);
    }
}

//
// layers that do not store the first cells
//

llama_kv_cache::slot_info kvmerge_cache::find_slot(const llama_ubatch & ubatch, bool cont) const {
    auto res = llama_kv_cache::find_slot(ubatch, cont);

    // a cell that was freed, and that some layer does not store: making room is storing it
    const bool is_stored = !engine || res.empty() ||
        std::all_of(res.idxs[0].begin(), res.idxs[0].end(), [&](uint32_t idx) { return idx >= n_low(); });

    return is_stored && !(engine && engine->is_refusing) ? res : slot_info {};
}

ggml_tensor * kvmerge_cache::get_k(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const {
    return llama_kv_cache::get_k(ctx, il, n_kv - (get_size() - layer(il).k->ne[1]), sinfo);
}

ggml_tensor * kvmerge_cache::get_v(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const {
    ggml_tensor * v = layer(il).v;

    const int64_t n_rows = v->ne[1];

    ggml_tensor * res = llama_kv_cache::get_v(ctx, il, n_kv - (get_size() - n_rows), sinfo);

    if (!v_trans || n_rows == get_size()) {
        return res;
    }

    // memory holds one row a channel, over the cells that are stored
    return ggml_view_4d(ctx, v, res->ne[0], res->ne[1], res->ne[2], res->ne[3],
            ggml_row_size(v->type, n_rows*res->ne[2]), ggml_row_size(v->type, n_rows), ggml_row_size(v->type, n_rows*v->ne[0]), 0);
}

// What llama_kv_cache stores goes into the cells from n_low on: the indices count from there, and are the same for all layers.
// It shapes the rows of the new tokens, and the store that it makes is not used.

ggml_tensor * kvmerge_cache::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const {
    ggml_tensor * res = llama_kv_cache::cpy_k(ctx, k_cur, k_idxs, il, sinfo);

    if (n_low() == 0) {
        return res;
    }

    GGML_ASSERT(res->op == GGML_OP_SET_ROWS && res->src[1] == k_idxs);

    return ggml_set_rows(ctx, kvmerge_last(ctx, layer(il).k, 1, get_size() - n_low()), res->src[0], k_idxs);
}

ggml_tensor * kvmerge_cache::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const {
    ggml_tensor * res = llama_kv_cache::cpy_v(ctx, v_cur, v_idxs, il, sinfo);

    if (n_low() == 0) {
        return res;
    }

    GGML_ASSERT(res->op == GGML_OP_SET_ROWS && res->src[1] == v_idxs);

    ggml_tensor * v    = layer(il).v;
    ggml_tensor * rows = res->src[0];

    const int64_t n_tokens = v_cur->ne[2];

    if (v_trans) {
        // memory is [n_rows, n_embd], of another length in every layer: the same indices for each channel
        v      = ggml_reshape_3d(ctx, v, 1, v->ne[1], v->ne[0]);                                                       // [1, n_rows, n_embd]
        rows   = ggml_reshape_2d(ctx, rows, v->ne[2], n_tokens);                                                       // [n_embd, n_tokens]
        rows   = ggml_view_3d(ctx, rows, 1, n_tokens, rows->ne[0], rows->nb[1], rows->nb[0], 0);                       // [1, n_tokens, n_embd]
        v_idxs = ggml_view_1d(ctx, v_idxs, n_tokens, 0);
    }

    return ggml_set_rows(ctx, kvmerge_last(ctx, v, 1, get_size() - n_low()), rows, v_idxs);
}

void kvmerge_cache::set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_k_idxs(dst, ubatch, sinfo);

    int64_t * data = static_cast<int64_t *>(dst->data);

    for (uint32_t i = 0; i < ubatch->n_tokens && n_low() > 0; ++i) {
        data[i] -= n_low();
    }
}

void kvmerge_cache::set_input_v_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    if (n_low() > 0) {
        set_input_k_idxs(dst, ubatch, sinfo); // one a token, see cpy_v()
    } else {
        llama_kv_cache::set_input_v_idxs(dst, ubatch, sinfo);
    }
}

//
// saved states
//

void kvmerge_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    llama_kv_cache::state_write(io, seq_id, flags);

    if (engine && !engine->saved_cells(seq_id).empty()) {
        engine->state_write(io, seq_id);
    }
}

void kvmerge_cache::state_write_data(llama_io_write_i & io, const cell_ranges_t & cr) const {
    if (!engine) {
        llama_kv_cache::state_write_data(io, cr);
        return;
    }

    std::vector<uint32_t> cells;
    for (const auto & [first, last] : cr.data) {
        for (uint32_t i = first; i < last; ++i) {
            cells.push_back(i);
        }
    }

    llama_kv_cache::state_write_data(*engine->stored_only(io, cells), cr);
}

void kvmerge_cache::on_restore(llama_seq_id seq_id, uint32_t n_cells) {
    seq_restored = seq_id;

    if (engine) {
        engine->on_restore(seq_id, n_cells);
    }
}

bool kvmerge_cache::state_read_data(llama_io_read_i & io, uint32_t strm, uint32_t cell_count, const slot_info & sinfo) {
    if (!engine) {
        return llama_kv_cache::state_read_data(io, strm, cell_count, sinfo);
    }

    try {
        if (!llama_kv_cache::state_read_data(*engine->stored_only(io, cell_count), strm, cell_count, sinfo)) {
            return false;
        }

        engine->state_read(io, seq_restored, sinfo.idxs[0]);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return false;
    }

    return true;
}
