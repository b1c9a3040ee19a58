#pragma once

// The engine: the state of merging for one KV cache. Its functions are in the file of their concept; what says so below names
// it.
//
// kvmerge_cache holds it and calls on_...() where its own state changes; llama_context asks it for what its graphs take.

#include "kvmerge-graph.h"
#include "kvmerge-observe.h"
#include "kvmerge-pages.h"
#include "kvmerge-plan.h"
#include "kvmerge-planner.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

class  kvmerge_cache;
class  llama_io_read_i;
class  llama_io_write_i;
struct llama_context;
struct llama_memory_i;
struct llama_ubatch;

// For a context's memory, whatever it consists of. Without an engine: 0 and true.

// nodes that the engine adds to a graph at most
uint32_t kvmerge_n_nodes(llama_memory_i * memory, uint32_t n_tokens);

// whether positions [p0, p1) of a sequence can be removed; asked before any part of the memory has changed
bool kvmerge_may_remove(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// one layer of the cache, as the steps see it
struct kvmerge_layer {
    int32_t il; // layer of the model

    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;

    // The first cells of the cache are not stored where the layer holds nothing in them: n_rows is kv_size - first.
    // While a merge runs all layers store all cells.
    uint32_t first;

    ggml_tensor * k; // [n_embd_head_k*n_head_kv, n_rows]
    ggml_tensor * v; // [n_embd_head_v*n_head_kv, n_rows]; memory holds it transposed when v_trans

    ggml_tensor * q;    // F32     [n_embd_head_k*n_head, n_slots] observed queries
    ggml_tensor * bias; // F16/F32 [n_rows, n_head_kv]             the type of the attention mask
    ggml_tensor * sum;  // F32     [n_rows, n_head_kv]             attention from all queries; KVMERGE_SCORE_ALL only

    bool mask_per_head; // the backend's attention takes a mask per head

    // of the model's graph, noted when it is built
    float         kq_scale = 0.0f;
    ggml_tensor * sinks    = nullptr; // F32 [n_head]
};

struct kvmerge_engine : std::enable_shared_from_this<kvmerge_engine> {
    static kvmerge_status attach(llama_context * lctx, const kvmerge_params & params, kvmerge_engine ** out);

    // stop observing; the engine stays with the cache, because merged cells still need their bias
    void detach();

    kvmerge_status set_params(const kvmerge_params & params);

    kvmerge_status media_begin(int32_t modality);
    kvmerge_status media_weights(const float * weights, int32_t n);
    kvmerge_status media_end();

    // to the first of these numbers of cells, ascending, whose error is within the tolerance
    kvmerge_status merge(llama_seq_id seq_id, const std::vector<int32_t> & n_cells, float tolerance);

    kvmerge_status set_room(int32_t n_cells_max, float share, int32_t n_whole);

    void set_idle(llama_seq_id seq_id, bool idle);

    bool take_cleared(llama_seq_id seq_id); // whether a merge has cleared it since this was last asked

    kvmerge_status lay_out(bool merged);

    void keep_plans(bool keep);

    bool saves_all_queries = false; // with a state, however large that makes it

    // for the policy, or to be seen: it takes longer than the other scores
    bool measures_flow() const;

    //
    // called by kvmerge_cache
    //

    // kvmerge-sequences.cpp
    void on_clear();
    bool on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1); // false: see may_remove(); nothing has changed
    void on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);
    void on_seq_keep(llama_seq_id seq_id);
    void on_seq_move(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const std::function<llama_pos(llama_pos)> & move);

    // kvmerge-tokens.cpp
    void on_ubatch(const std::vector<uint32_t> & cells, const llama_ubatch & ubatch);

    // kvmerge-room.cpp
    void on_init_update(bool optimize); // optimize: for the batch that found no slot, else before the next one
    void on_no_slot(const std::vector<llama_ubatch> & ubatches); // the next update makes room for them

    // kvmerge-request.cpp
    bool on_update(llama_context * lctx);

    // kvmerge-stored.cpp, kvmerge-state.cpp: a state of n_cells cells is about to be read; throws like llama_kv_cache when they do not fit
    void on_restore(llama_seq_id seq_id, uint32_t n_cells);

    // The stream without K and V of the cells that a layer does not store. What is written with the one has to be read
    // with the other.
    std::unique_ptr<llama_io_write_i> stored_only(llama_io_write_i & io, const std::vector<uint32_t> & cells) const;
    std::unique_ptr<llama_io_read_i>  stored_only(llama_io_read_i  & io, uint32_t n_cells);

    // cells of a sequence, or of all (-1), in the order in which llama_kv_cache writes them
    std::vector<uint32_t> saved_cells(llama_seq_id seq_id) const;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const;

    // cells: where the saved cells were placed, in the order in which they were written; throws like llama_kv_cache
    void state_read(llama_io_read_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & cells);

    // all layers store all cells; false: there is no memory for them
    bool store_all() { return resize(is_merged.size(), std::vector<uint32_t>(layers.size())); }

    // no more cells than are needed
    void shrink() noexcept;

    // bytes of K, V, bias and sums as they are allocated
    int64_t bytes() const;

    // false: positions [p0, p1) cut into merged cells
    bool may_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the scheduler of the context has no buffers, because the last graph that it was to plan found no memory
    bool has_lost_graphs() const;

    bool is_pending() const { return !pending.goal.n_cells.empty() || n_wanted > 0 || is_restored; }

    //
    // for the steps
    //

    // tokens that a sequence has read
    int32_t n_seen(llama_seq_id seq_id) const { return sequences[seq_id].n_seen; }

    // cells of a sequence, in the order of their tokens
    std::vector<uint32_t> sequence_cells(llama_seq_id seq_id) const;

    // those of them in which a layer holds something
    int32_t n_cells(llama_seq_id seq_id, size_t layer) const;

    // nodes that the engine adds to the model's graph at most
    uint32_t n_nodes(uint32_t n_tokens) const;

    // the layer whose K a graph's view shows, nullptr if there is none
    kvmerge_layer * find_layer(const ggml_tensor * k);

    // what a cell holds for a layer and KV head
    const kvmerge_cell & cell(uint32_t idx, size_t layer, int32_t head) const;

    size_t n_head_kv_max() const;

    // K and V bytes of one cell of a layer
    static size_t bytes_per_cell(const kvmerge_layer & layer);

    static constexpr int32_t MAX_RECENT = 64;

    kvmerge_cache & cache;
    llama_context  * lctx;

    kvmerge_params   params;
    kvmerge_planner  planner; // of the caller, if it plans
    kvmerge_observer observer;

    std::vector<kvmerge_layer> layers;

    float logit_softcap = 0.0f; // 0: none
    bool  v_trans;              // V lies transposed (no flash attention)
    bool  is_attached = true;   // queries are observed
    bool  has_bias    = false;  // some cell has a bias: the graphs add it
    bool  is_per_head = false;  // it may differ from head to head, as cells were merged
    int   version     = 0;      // goes up whenever graphs built before no longer fit

    // A merge that was to make room has failed and its sequence is gone: the batch that goes on from it must not find the room
    // that this left.
    bool is_refusing = false;

    uint32_t n_low = 0; // the first cell that all layers store: tokens come into it and those behind

    // figures of the last merge
    kvmerge_stats                          stats = {};
    std::array<kvmerge_stats, MAX_RECENT>  recent;       // of the last merges: that of number i lies at i % MAX_RECENT
    int32_t                                n_recent = 0; // merges since a state was restored
    std::vector<kvmerge_flow>              flows; // [layer]
    std::vector<std::vector<kvmerge_plan>> plans; // [layer][head]

private:
    class  merge_steps; // kvmerge-merge.cpp
    class  compaction;  // kvmerge-compact.h
    struct resizing;    // kvmerge-resize.cpp
    struct saved_state; // kvmerge-state.cpp

    kvmerge_engine(kvmerge_cache & cache, llama_context * lctx, const kvmerge_params & params, int32_t n_seq_max);

    kvmerge_status init_layers();

    //
    // kvmerge-bias.cpp: what lies beside K and V
    //

    // The bias and the sums of all layers for n_cells cells, of which each layer stores those from first[layer] on, and
    // their buffers: what is in both is taken over from the ones that are used now. use_bias() then takes their place.
    // false: there is no memory for them.
    struct biases {
        std::vector<ggml_tensor *> bias; // [layer]
        std::vector<ggml_tensor *> sum;  // [layer], nullptr unless KVMERGE_SCORE_ALL was chosen

        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
    };

    bool make_bias(uint32_t n_cells, const std::vector<uint32_t> & first, biases & out) const;
    void use_bias (biases && next);

    // the bias of a layer, on its way to the device
    struct bias_values {
        std::vector<float>       floats;
        std::vector<ggml_fp16_t> halves;
    };

    // room for it, so that its upload takes no memory
    void reserve_bias(size_t layer, bias_values & values) const;

    void upload_bias(size_t layer, ggml_tensor * dst, uint32_t first, bias_values & values) const; // dst: of the cells from first on
    void upload_bias(size_t layer, bias_values & values) { upload_bias(layer, layers[layer].bias, layers[layer].first, values); }
    void upload_bias(); // of all layers

    // the attention that the cells got from all queries: into plan.score, and what it is once cells[0, n_after) are the
    // pivots (all values of the tensor)
    void load_sums(size_t layer, const std::vector<uint32_t> & cells, std::vector<kvmerge_plan> & plans) const;
    void clear_sum(uint32_t idx);

    std::vector<float> compact_sums(
            size_t layer, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<kvmerge_plan> & plans) const;

    //
    // kvmerge-merge.cpp
    //

    struct merge_goal {
        std::vector<int32_t> n_cells;               // ascending; the first that the tolerance allows
        float                tolerance = INFINITY;

        // an error of less than 0 was not measured
        bool allows(float error) const { return tolerance == INFINITY || (error >= 0 && error <= tolerance); }
    };

    // A merge, done or not begun, or KVMERGE_ERROR_CLEARED.
    //   n_most  cells that no layer exceeds, where layers differ
    kvmerge_status run(llama_seq_id seq_id, const merge_goal & goal, int32_t n_most);

    enum merge_progress { NOT_BEGUN, CHANGING, DONE }; // of the cache

    kvmerge_status merge_cells(
            llama_seq_id seq_id, const std::vector<uint32_t> & cells, const merge_goal & goal, int32_t n_most, merge_progress & progress);

    // after a merge that failed half-way: the sequence goes, with the cells that it had
    void clear(llama_seq_id seq_id, const std::vector<uint32_t> & cells) noexcept;

    // of the last merge, as the mean over layers and heads
    void count_text(int32_t & n_before, int32_t & n_after) const;

    // the figures that follow from the plans, and a message
    void note_merge(llama_seq_id seq_id);

    // KVMERGE_OK: the sequence can be merged now
    kvmerge_status check_merge(llama_seq_id seq_id, const std::vector<uint32_t> & cells) const;

    //
    // kvmerge-room.cpp, kvmerge-resize.cpp: how many cells there are
    //

    // the most cells that the cache may have
    uint32_t n_cells_max() const;

    // let n_tokens more fit: more cells up to the most there may be, then merging
    bool make_room(uint32_t n_tokens);

    // Merge what is idle, or what is not, until n_fit cells would do. Another status than OK: it broke off.
    kvmerge_status take_room(int32_t n_fit, bool of_idle);

    // so many cells, where the cache may grow that far and there is memory for them
    void make_cells(uint64_t n_cells);

    // for every layer, from which cell on there is something in it
    std::vector<uint32_t> first_cells() const;

    // The cells from now on, and the first one that each layer stores. Those that are used lie below n_cells.
    // false: there is no memory for them, nothing has changed.
    bool resize(uint32_t n_cells, const std::vector<uint32_t> & first);

    // what resize() has to have before anything changes; throws std::bad_alloc
    void prepare_resize(uint32_t n_cells, const std::vector<uint32_t> & first, resizing & next);

    // The tensors of all layers by those that were prepared, or as they were. false: there is no memory for one of them.
    bool replace_tensors(resizing & next, const std::vector<uint32_t> & first);

    // K and V of all layers in turn; trans: memory holds one row a channel, over all cells
    ggml_tensor *& cache_tensor(size_t i);
    bool           is_trans    (size_t i) const;

    // the layers take the tensors of the cache
    void attach_tensors();

    //
    // kvmerge-budget.cpp: how many cells a merge leaves
    //

    // the last pictures are kept whole while they leave room for the rest
    void mark_whole(int32_t n_cells, int32_t n_text, std::vector<kvmerge_plan> & plans) const;

    // cells of text among those of a sequence, and pictures and sounds: as the first head sees them
    struct modality_counts {
        int32_t n_text     = 0;
        int32_t n_media    = 0;
        int32_t n_segments = 0; // of media
    };

    modality_counts count_modalities(const std::vector<uint32_t> & cells) const;

    // cells of text that a merge down to n_cells leaves in every layer; KVMERGE_SELECT_MEDIA only, else 0
    int32_t n_text_kept(int32_t n_cells, const std::vector<uint32_t> & cells, llama_seq_id seq_id) const;

    // how many cells each layer keeps, with a mean of n_cells
    std::vector<int32_t> layer_budgets(
            const std::vector<std::vector<kvmerge_plan>> & plans, const std::vector<kvmerge_flow> & flows,
            const std::vector<uint32_t> & cells, int32_t n_cells, int32_t n_text, int32_t n_most) const;

    //
    // kvmerge-stored.cpp, kvmerge-state.cpp: saved states
    //

    uint32_t              count_unheld(const kvmerge_layer & layer, const std::vector<uint32_t> & cells) const;
    struct saved_queries;
    saved_queries         choose_queries(llama_seq_id seq_id) const; // of those that were observed

    // the parts of state_read(), which throw like it
    void read_shape   (llama_io_read_i & io) const;
    void read_figures (llama_io_read_i & io, saved_state & saved) const;
    void read_cells   (llama_io_read_i & io, const std::vector<uint32_t> & cells, saved_state & saved) const;
    void read_sequence(llama_io_read_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & cells, saved_state & saved) const;

    //
    // kvmerge-sequences.cpp, kvmerge-tokens.cpp: what was read
    //

    // the sequence is gone
    void forget(llama_seq_id seq_id);

    // A cell that is about to hold a token again: forget what it held. Cells are freed in many places and reused in
    // one, so they are wiped here; until then they are masked. true: its bias has to be uploaded.
    bool wipe(uint32_t idx);

    // per cell: what was written there; valid for every layer and head until the cell is merged
    std::vector<kvmerge_cell> tokens; // [kv_size], order < 0: was never used or is wiped

    // merged cells differ from head to head
    std::vector<uint8_t>                                is_merged; // [kv_size]
    std::vector<std::vector<std::vector<kvmerge_cell>>> merged;    // [layer][head][up to kv_size]

    struct sequence {
        int32_t   n_seen     = 0;  // tokens read so far
        int32_t   segment    = -1; // the segment that is being read
        uint8_t   modality   = KVMERGE_TEXT;
        llama_pos pos_merged = 0;  // positions below it are merged: they cannot be removed one by one
        llama_pos pos_whole  = 0;  // but those below this one are not: the sequence can be cut there
    };

    std::vector<sequence> sequences; // [n_seq_max]

    std::vector<uint8_t> is_idle;     // [n_seq_max]
    std::vector<uint8_t> was_cleared; // [n_seq_max] by a merge that broke off, since it was last asked

    struct {
        bool    is_open  = false;
        bool    is_new   = false; // no token of it was seen yet
        uint8_t modality = KVMERGE_IMAGE;

        std::vector<float> weights;  // of its tokens that were not seen yet, the next one last
    } media;

    struct {
        llama_seq_id   seq_id  = -1;
        merge_goal     goal;        // without any number of cells: no merge is waiting
        bool           has_run = false;
        kvmerge_status status  = KVMERGE_OK;
    } pending;

    // how many cells there may be, and what a merge that makes room leaves
    struct {
        int32_t n_cells_max = 0; // 0: as many as the context has tokens
        float   share       = 0; // of the tokens, 0: as many as fit
        int32_t n_whole     = 0; // last pictures that are kept whole

        bool is_elastic = false; // the cache began small: it grows and shrinks
        bool is_tight   = false; // the merge that runs makes room
    } room;

    bool     bias_is_stale = false; // the next ubatch uploads it
    bool     keeps_plans  = true;
    bool     gives_back   = false; // the next ubatch finds memory that was freed
    uint32_t n_wanted     = 0;     // tokens that found no slot
    std::vector<uint32_t> n_left_out; // [layer] first cells that the state being read leaves out

    bool     is_restored  = false; // a state was read, and the cells are not yet as few as they may be
    bool     has_own_bufs = false; // every tensor of the cache has a buffer of its own

    std::vector<kvmerge_pages> pages; // where cache_tensor(i) lies once it has changed its size, if in the host's memory

    // buffers of the observed queries, and of the bias and the sums, on the device of their layer
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs_q;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs_bias;
};
