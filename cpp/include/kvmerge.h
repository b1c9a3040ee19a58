// kvmerge.h - a KV cache that merges instead of growing
//
// This header is the whole public C API. The functions live in libllama, next to llama.h.
//
// Vocabulary
//   token     one input of the model: a text token or one embedding row of a picture or clip
//   cell      one slot of the KV cache; before a merge a cell holds one token, after it a cell may stand for many
//   sequence  llama.cpp's llama_seq_id
//   segment   one picture, one audio clip, or the text between two of them
//   pivot     a token that survives a merge and may receive others
//   budget    the number of cells that are KEPT
//
// Life of an engine
//   kvmerge_attach()  switches observing on for a llama_context: must come before the prompt is read
//   llama_decode()    as always; mark media with kvmerge_media_begin() / kvmerge_media_end()
//   kvmerge_merge()   folds a sequence down to a number of cells
//   kvmerge_detach()  switches observing off; what was merged stays merged
//
// Errors: functions return KVMERGE_OK or a negative kvmerge_status. The reason, in words, is kvmerge_error_message().
//   Nothing is thrown. After an error the cache is as it was before the call, unless the status is
//   KVMERGE_ERROR_CLEARED: the failure came while the cache changed, and the sequence is empty now. When a merge that makes
//   room in llama_decode() fails, llama_decode() returns 1; kvmerge_n_tokens() is 0 where it cleared the sequence.
//
// Threads: an engine belongs to its llama_context and follows its rule: one thread at a time.
//   kvmerge_error_message() is per thread.
//
// Ownership: the engine is owned by the context's memory and is freed with it. Arrays are filled into memory
//   of the caller; no pointer into the engine is ever handed out.

#ifndef KVMERGE_H
#define KVMERGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(__MINGW32__)
#    define KVMERGE_API __declspec(dllexport)
#else
#    define KVMERGE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

#define KVMERGE_API_VERSION 13

enum kvmerge_status {
    KVMERGE_OK                = 0,
    KVMERGE_ERROR_ARGUMENT    = -1, // a value is out of its range; the message names it and the range
    KVMERGE_ERROR_UNSUPPORTED = -2, // this model, cache or sequence layout cannot be merged; the message says why
    KVMERGE_ERROR_STATE       = -3, // the call does not fit the present state (nothing observed, unknown sequence, ...)
    KVMERGE_ERROR_MEMORY      = -4, // an allocation failed
    KVMERGE_ERROR_COMPUTE     = -5, // a backend failed
    KVMERGE_ERROR_CLEARED     = -6, // a merge failed while the cache changed: the engine has cleared the sequence
};

enum kvmerge_modality {
    KVMERGE_TEXT  = 0,
    KVMERGE_IMAGE = 1,
    KVMERGE_AUDIO = 2,
};

// what happened to a token in the last merge
enum kvmerge_fate {
    KVMERGE_DROPPED   = 0, // evicted, folded nowhere
    KVMERGE_FOLDED    = 1, // folded into a pivot
    KVMERGE_KEPT      = 2, // kept, and may have received folds
    KVMERGE_PROTECTED = 3, // kept, and never receives a fold (sensitive, or one of the last n_keep)
};

// The choices of a policy; the last name of each is one more than the last choice.

// score: how important a token is, per layer and KV head
enum kvmerge_score {
    KVMERGE_SCORE_PROXY    = 0, // attention from the proxy window's queries (FlowMM eq. 8)
    KVMERGE_SCORE_POSITION = 1, // the later, the better (StreamingLLM)
    KVMERGE_SCORE_ALL      = 2, // attention from every query of the prompt (H2O)
    KVMERGE_SCORE_END
};

// allocate: how many cells each layer gets; the mean over the layers is what was asked for
enum kvmerge_allocate {
    KVMERGE_ALLOCATE_UNIFORM = 0, // the same
    KVMERGE_ALLOCATE_PYRAMID = 1, // falling linearly with depth (PyramidKV)
    KVMERGE_ALLOCATE_COVER   = 2, // as many as cover a share `cover` of each modality's attention (MadaKV)
    KVMERGE_ALLOCATE_ENTROPY = 3, // by the entropy of the attention between modalities (MEDA)
    KVMERGE_ALLOCATE_EARLY   = 4, // twice the mean in the first quarter of the layers (mosaic)
    KVMERGE_ALLOCATE_END
};

// select: which tokens survive
enum kvmerge_select {
    KVMERGE_SELECT_TOP      = 0, // the highest scores
    KVMERGE_SELECT_TEXT     = 1, // text before everything else, then the highest scores (LOOK-M)
    KVMERGE_SELECT_MODALITY = 2, // the budget is split by the attention each modality gets (MadaKV)
    KVMERGE_SELECT_MOSAIC   = 3, // part by score, part as groups that cover every picture (mosaic)
    KVMERGE_SELECT_RUNS     = 4, // runs of similar neighbours become one token (KVMerger)
    KVMERGE_SELECT_MEDIA    = 5, // all text, and groups that cover every picture (auto)
    KVMERGE_SELECT_END
};

// match: into which pivots an evicted token may fold
enum kvmerge_match {
    KVMERGE_MATCH_NONE     = 0, // none: evicted tokens are dropped
    KVMERGE_MATCH_ANY      = 1, // any unprotected pivot
    KVMERGE_MATCH_MODALITY = 2, // an unprotected pivot of the same modality
    KVMERGE_MATCH_FLOW     = 3, // ANY in layers with flow >= theta, else MODALITY (FlowMM)
    KVMERGE_MATCH_SEGMENT  = 4, // an unprotected pivot of the same segment: one picture never folds into another
    KVMERGE_MATCH_END
};

// fold: the weights in the mean of a group
enum kvmerge_fold {
    KVMERGE_FOLD_MEAN     = 0, // equal (times the mass, when cells were merged before)
    KVMERGE_FOLD_PIVOT    = 1, // each member counts half, the pivot the rest (LOOK-M)
    KVMERGE_FOLD_WEIGHTED = 2, // members by their similarity to the pivot (LOOK-M)
    KVMERGE_FOLD_EXP      = 3, // members by exp(similarity - 1) (D2O)
    KVMERGE_FOLD_GAUSSIAN = 4, // members by a Gaussian of their distance to the pivot (KVMerger)
    KVMERGE_FOLD_END
};

// bias: what is added to a pivot's attention logit so that it weighs what it stands for
enum kvmerge_bias {
    KVMERGE_BIAS_NONE  = 0,
    KVMERGE_BIAS_COUNT = 1, // log of the number of tokens that the pivot stands for
    KVMERGE_BIAS_FIT   = 2, // mean of log(sum of exp(logits of the group)) - logit of the new key over the proxies and as many
                            // sampled queries of text
    KVMERGE_BIAS_END
};

// A policy: one choice per step of observe -> score -> allocate -> select -> match -> fold -> compact, and its numbers. The
// fields, with ranges, defaults and what each of them is, are the rows of kvmerge-options.def. Choices that would do nothing
// beside each other are refused: MOSAIC, RUNS and MEDIA form their own groups, and take match SEGMENT or NONE and tau 1; a
// score by POSITION takes no value_norm.
// Fill it with kvmerge_params_default() first; `size` lets the library refuse a struct of another version.
struct kvmerge_params {
    uint32_t size; // sizeof(struct kvmerge_params)

#define KVMERGE_OPTION(type, field, ...) type field;
#include "kvmerge-options.def"
};

// figures of the last merge of an engine
struct kvmerge_stats {
    int32_t n_merges;        // merges of this engine so far
    int32_t n_tokens;        // tokens that the cells of the sequence stand for
    int32_t n_cells_before;  // cells of the sequence before the last merge
    int32_t n_cells_after;   // cells after it (of the layer that has most)
    int32_t n_layers;        // layers whose cache is merged
    int32_t n_heads;         // KV heads of a layer (the largest, where layers differ)
    int32_t n_text_before;   // cells of text before the last merge and after it, as the mean over layers and heads
    int32_t n_text_after;
    int64_t bytes_per_cell;  // K and V bytes of one cell over all layers
    int64_t bytes_after;     // K and V bytes of the cells that the layers really hold after the last merge
    float   error;           // how far the last merge moves what attention returns: the length of the difference to what it
                             // returned before, as a share, for queries of text that nothing was fitted to and as the mean
                             // over eight layers, or all of fewer; -1: it was not measured, as too few queries were observed
    int64_t t_score_us;      // time of the last merge: reading scores and flow,
    int64_t t_match_us;      //   selecting and matching,
    int64_t t_fold_us;       //   folding and compacting,
    int64_t t_total_us;      //   and all of it
};

struct kvmerge_engine;

// Version of this API, KVMERGE_API_VERSION at build time.
KVMERGE_API int32_t kvmerge_api_version(void);

// Reason for the last error of this thread, in words; an empty string when there was none.
KVMERGE_API const char * kvmerge_error_message(void);

// Pass on only those messages of llama.cpp's log that have this level (enum ggml_log_level) or a higher one, to whatever
// llama_log_set() was last called with. Messages below it then cost nothing, and no callback runs in the middle of
// llama_decode(). For the whole process; not while another thread logs.
KVMERGE_API void kvmerge_log_from(int32_t level);

// Passes a message on as kvmerge_log_from() says: a ggml_log_callback for libraries with a log of their own (libmtmd).
KVMERGE_API void kvmerge_log(int32_t level, const char * text, void * data);

// Memory that was freed goes back to the system, as far as its allocator can do that: after much was read, for example.
KVMERGE_API void kvmerge_trim(void);

// The default policy: FlowMM with bias = COUNT.
KVMERGE_API struct kvmerge_params kvmerge_params_default(void);

// For tests: let the n-th allocation of buffers or graph computation of an engine from now on fail, as if there were no memory
// or the backend had failed; 0: none. kvmerge_fail_count() says how many there were since. For the whole process.
KVMERGE_API void    kvmerge_fail_at   (int32_t n);
KVMERGE_API int32_t kvmerge_fail_count(void);

// Attach an engine to a context. Observing starts with the next llama_decode().
//   ctx     its memory must be a KV cache with K and V (also inside iSWA and hybrid memories, whose
//           full-attention part is merged)
//   out     receives the engine
// Errors: ARGUMENT, UNSUPPORTED (MLA, recurrent-only, ALiBi, head sizes that do not divide by the quantization
//   block), STATE (an engine is attached already), MEMORY.
KVMERGE_API int32_t kvmerge_attach(
        struct llama_context         *  ctx,
        const struct kvmerge_params  *  params,
        struct kvmerge_engine        ** out);

// Detach the engine: nothing more is observed or merged. Merged cells keep their bias and stay valid. NULL is allowed.
KVMERGE_API void kvmerge_detach(struct kvmerge_engine * engine);

// Change the policy. n_window and n_flow_rows size buffers and cannot change after attaching (ARGUMENT); a score over all
// queries has to be chosen when attaching.
KVMERGE_API int32_t kvmerge_set_params(struct kvmerge_engine * engine, const struct kvmerge_params * params);

// Tokens decoded between begin and end belong to one new segment of this modality (IMAGE or AUDIO).
// Without these calls, embedding input counts as IMAGE, and a run of it as one segment.
KVMERGE_API int32_t kvmerge_media_begin(struct kvmerge_engine * engine, int32_t modality);
KVMERGE_API int32_t kvmerge_media_end  (struct kvmerge_engine * engine);

// How many tokens each of the next n of the medium stands for, in the order in which they are decoded, where several were made
// one before they came here. Such a token weighs in attention as so many do, from the first layer on. Tokens without a weight
// stand for one. To be called between begin and end.
//   weights  [n], each [1, 65536]
KVMERGE_API int32_t kvmerge_media_weights(struct kvmerge_engine * engine, const float * weights, int32_t n);

// The next context that this thread makes begins with a cache of n_cells cells instead of n_ctx; 0: as llama.cpp does it.
// With an engine attached, such a cache grows by what a batch needs, up to n_ctx or n_cells_max, and shrinks after a merge.
// Without one, or before, it stays small: call this with 0 once the context is made.
//   n_cells  rounded up to a multiple of 256; at least n_ubatch, or the first batch is reported as too large
KVMERGE_API int32_t kvmerge_begin_small(int32_t n_cells);

// How many cells the cache may have, all sequences together, and what happens when they do not suffice: llama_decode()
// then merges before it reads the batch.
//   n_cells_max  0: no limit but n_ctx; else 256 and more, rounded down to a multiple of 256; room for a batch included
//   share        of a sequence's tokens that such a merge leaves, while that makes enough room; 0: as many as fit [0, 1]
//   n_whole      pictures or clips, the last ones, that every merge leaves as they are where the budget has room for them
KVMERGE_API int32_t kvmerge_set_room(struct kvmerge_engine * engine, int32_t n_cells_max, float share, int32_t n_whole);

// Say that nobody waits for a sequence, or that somebody does again: such a merge takes from those that are idle first, then
// from the largest. At the beginning none is idle. Errors: ARGUMENT.
KVMERGE_API int32_t kvmerge_set_idle(struct kvmerge_engine * engine, int32_t seq_id, bool is_idle);

// Whether a merge has cleared this sequence (KVMERGE_ERROR_CLEARED) since this was last asked: one that makes room may meet a
// sequence that the batch has nothing of.
KVMERGE_API bool kvmerge_was_cleared(struct kvmerge_engine * engine, int32_t seq_id);

// Cells that the cache has now, used or not, all sequences together; and the bytes of K, V, bias and sums that they take.
KVMERGE_API int32_t kvmerge_size (const struct kvmerge_engine * engine);
KVMERGE_API int64_t kvmerge_bytes(const struct kvmerge_engine * engine);

// Lay out the graphs of a context whose model was loaded without memory (llama_model_params::no_alloc; else STATE), as they
// are once something was merged, or before. llama.cpp logs the sizes of the compute buffers that this would take.
KVMERGE_API int32_t kvmerge_lay_out(struct kvmerge_engine * engine, bool merged);

// Merge a sequence down to n_cells cells a layer (where layers differ, in the mean), now. Does nothing (OK) when it holds
// no more than that.
//   n_cells  [1, cells of the sequence]
KVMERGE_API int32_t kvmerge_merge(struct kvmerge_engine * engine, int32_t seq_id, int32_t n_cells);

// The same to the first of several numbers of cells whose error (see struct kvmerge_stats) is at most `tolerance`. Where it
// is larger for all of them, or cannot be measured, nothing is merged (OK). Each number that is tried costs about as much as a
// merge.
//   n_cells    [n] ascending
//   n          1 and more
//   tolerance  0 and more
KVMERGE_API int32_t kvmerge_merge_within(struct kvmerge_engine * engine, int32_t seq_id, const int32_t * n_cells, int32_t n, float tolerance);

// What a merge asks the caller for, where the caller plans. Rows of [n] follow each other by layer and KV head (see
// kvmerge_get_layer()); K, V and queries are read with kvmerge_read_cells() and kvmerge_read_queries().
struct kvmerge_question {
    int32_t         seq_id;
    int32_t         n_cells;  // cells to keep: of the widest head of a layer, as the mean over the layers
    int32_t         n_most;   // cells that no head may exceed
    int32_t         n;        // cells that there are, in the order of their tokens
    int32_t         n_heads;  // KV heads of all layers together
    const int32_t * order;    // [n_heads][n] index of the token in the sequence, counted from 0
    const int32_t * segment;  // [n_heads][n] picture, clip or run of text
    const uint8_t * modality; // [n_heads][n] enum kvmerge_modality
    const uint8_t * whole;    // [n_heads][n] 1: of a picture that is to stay as it is
    const float   * mass;     // [n_heads][n] tokens that the cell stands for; 0: it is empty
    int32_t       * target;   // [n_heads][n] to be filled: the cell's own index: kept; that of a kept one: folded into
                              //   it; -1: dropped. Comes with everything kept.
};

// Returns 0, or anything else when there is no plan.
typedef int32_t (*kvmerge_planner_fn)(void * data, const struct kvmerge_question * question);

// Let the caller decide, in every merge from now on, which cells are kept and what goes into them, in place of the
// policy's allocate, select and match. What follows stays the policy's: similarity, n_member, fold, bias and move_keys.
// NULL: the policy decides. `plan` is called in the middle of a merge: it may read from the engine and change nothing.
// The last n_keep cells are always kept and take up nothing. A plan that does not keep to this, or keeps too many cells, is
// refused (ARGUMENT), and the cache is as before.
KVMERGE_API void kvmerge_set_planner(struct kvmerge_engine * engine, kvmerge_planner_fn plan, void * data);

// Cells that a sequence holds now (where layers differ, of the one that holds most), and the tokens they stand for.
// Negative: a kvmerge_status.
KVMERGE_API int32_t kvmerge_n_cells (const struct kvmerge_engine * engine, int32_t seq_id);
KVMERGE_API int32_t kvmerge_n_tokens(const struct kvmerge_engine * engine, int32_t seq_id);

// The same for one layer (index among the merged layers): cells of the sequence in which it holds something; and the bytes
// that its K, V, bias and sums take. Where a cache grows and shrinks, a layer that holds less takes less.
KVMERGE_API int32_t kvmerge_layer_cells(const struct kvmerge_engine * engine, int32_t seq_id, int32_t layer);
KVMERGE_API int64_t kvmerge_layer_bytes(const struct kvmerge_engine * engine, int32_t layer);

KVMERGE_API int32_t kvmerge_get_stats(const struct kvmerge_engine * engine, struct kvmerge_stats * stats);

// The same for an earlier merge: one llama_decode() may have to merge more than once.
//   n_back  merges before the last one, [0, 63]; a merge from before a state was restored is not known any more (STATE)
KVMERGE_API int32_t kvmerge_get_merge(const struct kvmerge_engine * engine, int32_t n_back, struct kvmerge_stats * stats);

// Cross-modal flow of the last merge (FlowMM eq. 6-7), one value a layer, each array [n_layers]:
//   rho            share of all attention that crosses modalities
//   text_to_media  the part of it that text queries give to pictures and sound
//   media_to_text  the part of it that pictures and sound give to text; rho is the sum of both (and, with more
//                  than two modalities, of picture-sound); -1: not measured, as neither the policy uses it nor
//                  plans are kept
// Returns n_layers, or a negative status.
KVMERGE_API int32_t kvmerge_get_flow(
        const struct kvmerge_engine * engine,
        float                       * rho,
        float                       * text_to_media,
        float                       * media_to_text,
        int32_t                       capacity);

// Whether states that are saved from now on hold all observed queries, so that a merge after restoring one is that of the
// cache that was saved. Unless told otherwise they hold as many as keep a state about as small as the full cache would be.
KVMERGE_API void kvmerge_save_all_queries(struct kvmerge_engine * engine, bool all);

// Whether what a merge did to each cell is kept for kvmerge_get_plan(), which takes about 33 bytes a cell, layer and KV
// head, and the flow measured even where the policy does not use it. It is unless told otherwise. With false what is kept
// now goes.
KVMERGE_API void kvmerge_keep_plans(struct kvmerge_engine * engine, bool keep);

// What the last merge did to each of the n cells it found, for one layer (index among the merged layers) and KV head.
// Each array holds `capacity` entries and may be NULL; with all of them NULL only n is returned:
//   order     index of the token in the sequence, counted from 0
//   modality  enum kvmerge_modality
//   segment   segment number, counted from 0
//   fate      enum kvmerge_fate
//   target    index (among the n cells) of the pivot it is in: its own when kept, -1 when dropped
//   score     importance
// Returns n, or a negative status.
KVMERGE_API int32_t kvmerge_get_plan(
        const struct kvmerge_engine * engine,
        int32_t                       layer,
        int32_t                       head,
        int32_t                     * order,
        uint8_t                     * modality,
        int32_t                     * segment,
        uint8_t                     * fate,
        int32_t                     * target,
        float                       * score,
        int32_t                       capacity);

//
// debugging: read what is in the cache. Slow, copies to the host.
//

// K, V, bias, mass and order of the cells of a sequence, for one layer, in the order of the cells:
//   k     F32 [n][n_heads][n_embd_head_k]      v     F32 [n][n_heads][n_embd_head_v]
//   bias  F32 [n][n_heads]                     mass  F32 [n][n_heads]
//   order I32 [n][n_heads]
// A layer that holds fewer cells than the widest one has mass 0, order -1 and bias -INFINITY in front, and K and V of no
// meaning.
// Quantized types are converted; where llama.cpp rotates quantized K and V (Hadamard), they come rotated.
// Arrays may be NULL. Returns n, or a negative status; capacity counts cells.
KVMERGE_API int32_t kvmerge_read_cells(
        const struct kvmerge_engine * engine,
        int32_t                       seq_id,
        int32_t                       layer,
        float                       * k,
        float                       * v,
        float                       * bias,
        float                       * mass,
        int32_t                     * order,
        int32_t                       capacity);

// The observed queries of a sequence for one layer: first the proxy window, then the flow samples.
//   q         F32 [rows][n_head][n_embd_head_k], after RoPE (and rotation, as K)
//   order     I32 [rows] index of the token in the sequence
//   modality  U8  [rows]
//   proxy     U8  [rows] 1 for rows of the proxy window, 0 for flow samples
//   scale     F32 factor of the attention logits
// Returns the number of rows, or a negative status; capacity counts rows and is not looked at when all arrays are NULL.
KVMERGE_API int32_t kvmerge_read_queries(
        const struct kvmerge_engine * engine,
        int32_t                       seq_id,
        int32_t                       layer,
        float                       * q,
        int32_t                     * order,
        uint8_t                     * modality,
        uint8_t                     * proxy,
        float                       * scale,
        int32_t                       capacity);

// Shape of one merged layer: model layer index, query heads, KV heads, head sizes. Any pointer may be NULL.
KVMERGE_API int32_t kvmerge_get_layer(
        const struct kvmerge_engine * engine,
        int32_t                       layer,
        int32_t                     * il,
        int32_t                     * n_head,
        int32_t                     * n_head_kv,
        int32_t                     * n_embd_head_k,
        int32_t                     * n_embd_head_v);

#ifdef __cplusplus
}
#endif

#endif // KVMERGE_H
