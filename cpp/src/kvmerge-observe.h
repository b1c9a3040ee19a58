#pragma once

// observe: which query rows are remembered, and where.
//
// Attention weights never exist in the model's graph (flash attention stays on). Instead, a few rows of Q per layer
// are copied into a small buffer while the prompt is read:
//   window   the last queries of the sequence, in a ring: they score the cells (FlowMM's proxies)
//   samples  a reservoir per modality: they estimate the flow between modalities
// The choice of rows is made here once per ubatch and holds for all layers.

#include "kvmerge-plan.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

struct kvmerge_row {
    int32_t order    = -1; // index of the query's token in its sequence, -1: the slot is empty
    uint8_t modality = KVMERGE_TEXT;
};

// slots of one sequence: [0, n_ring) ring, then n_samples per modality
class kvmerge_observer {
public:
    static constexpr int n_modalities = 3;

    kvmerge_observer(int32_t n_window, int32_t n_samples, int32_t n_seq_max);

    // slots of all sequences, and one more that takes what is not wanted
    int32_t n_slots() const { return n_seq_max*n_slots_seq() + 1; }

    // rows that a ubatch of n_tokens copies; fixed, so that graphs can be reused
    int32_t n_copies(int32_t n_tokens) const;

    // choose the rows of a ubatch: token i of it is token order[i] of sequence seq[i]
    void choose(const std::vector<int32_t> & seq, const std::vector<int32_t> & order, const std::vector<uint8_t> & modality);

    // the choice as [n_copies] source tokens and destination slots
    const std::vector<int32_t> & sources()      const { return src; }
    const std::vector<int64_t> & destinations() const { return dst; }

    // slots with the last n_window queries of a sequence of n_seen tokens, oldest first
    std::vector<int32_t> window(int32_t seq, int32_t n_seen) const;

    // slots with the flow samples, in the order of their tokens
    std::vector<int32_t> samples(int32_t seq, int32_t n_seen) const;

    // tokens of a modality seen so far
    int64_t count(int32_t seq, int modality) const { return counts[seq*n_modalities + modality]; }

    const kvmerge_row & row(int32_t slot) const { return rows[slot]; }

    // for saved states
    int32_t n_slots_seq() const { return n_ring() + n_modalities*n_samples; }
    int32_t first_slot(int32_t seq) const { return seq*n_slots_seq(); }
    void    restore(int32_t seq, const int64_t * counts);
    void    set_row(int32_t slot, const kvmerge_row & row) { rows[slot] = row; }

    void clear(int32_t seq);
    void copy (int32_t seq_src, int32_t seq_dst); // forgets what seq_dst had observed; counts are copied, rows are not

    // tokens from n_seen on were removed; removed[m]: how many of each modality
    void truncate(int32_t seq, int32_t n_seen, const int64_t * removed);

private:
    int32_t n_ring() const { return 2*n_window; } // some tail may be removed and the window still be full

    const int32_t n_window;
    const int32_t n_samples;
    const int32_t n_seq_max;

    std::vector<kvmerge_row> rows;   // [n_slots]
    std::vector<int64_t>     counts; // [n_seq_max*n_modalities]

    std::vector<int32_t> src;
    std::vector<int64_t> dst;
};
