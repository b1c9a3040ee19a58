#pragma once

// A llama_kv_cache whose cells an engine may merge. Without an engine every function is that of llama_kv_cache.
//
// Included at the end of llama-kv-cache.h: what makes a cache that can be merged makes one of these.

#include "llama-kv-cache.h"

#include <memory>

struct kvmerge_engine;

class kvmerge_cache : public llama_kv_cache {
public:
    // As llama_kv_cache; it begins with as many cells as kvmerge_begin_small() has asked for.
    kvmerge_cache(
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
        const  layer_share_cb & share);

    kvmerge_engine * get_merge() const override { return engine.get(); }

    //
    // what the engine is told of
    //

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override;

    bool update(llama_context * lctx, bool do_shift, const stream_copy_info & sc_info) override;

    void on_ubatch(const slot_info & sinfo, const llama_ubatch & ubatch) override;

    //
    // layers that do not store the first cells
    //

    slot_info find_slot(const llama_ubatch & ubatch, bool cont) const override;

    ggml_tensor * get_k(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const override;
    ggml_tensor * get_v(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const override;

    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const override;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const override;

    void set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_v_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;

    //
    // saved states
    //

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;

protected:
    void on_restore(llama_seq_id seq_id, uint32_t n_cells) override;

    void state_write_data(llama_io_write_i & io, const cell_ranges_t & cr) const override;
    bool state_read_data (llama_io_read_i  & io, uint32_t strm, uint32_t cell_count, const slot_info & sinfo) override;

private:
    friend struct kvmerge_engine;

    const kv_layer & layer(int32_t il) const { return layers[map_layer_ids.at(il)]; }

    // the first cell that all layers store
    uint32_t n_low() const;

    std::shared_ptr<kvmerge_engine> engine; // nullptr: nothing is merged

    llama_seq_id seq_restored = -1; // the sequence that the state being read goes into, -1: all
};
