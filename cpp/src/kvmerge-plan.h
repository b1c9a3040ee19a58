#pragma once

// What a merge does to one (layer, KV head): plain arrays that the steps fill in turn.
//
//   observe -> score -> allocate -> select -> match -> fold -> compact
//
// n is the number of cells of the sequence before the merge, B the number after it.

#include "kvmerge.h"

#include <cmath>
#include <cstdint>
#include <vector>

// What one cell holds, as one layer and KV head see it.
struct kvmerge_cell {
    int32_t order = -1; // index of the token in its sequence, counted from 0
    float   mass  = 1;  // number of tokens that it stands for, 0: the layer holds nothing here
    float   bias  = 0;  // what is added to its attention logit

    // in one word: there is one of these for every merged cell, layer and KV head
    uint32_t segment  : 28; // picture, clip or run of text that it belongs to
    uint32_t modality : 3;
    uint32_t is_whole : 1;  // of a picture that this merge leaves as it is

    kvmerge_cell() : segment(0), modality(KVMERGE_TEXT), is_whole(0) {}
};

// the layer holds nothing in it, and nothing attends to it
inline bool kvmerge_is_empty(const kvmerge_cell & cell) {
    return cell.mass == 0 && cell.bias == -INFINITY;
}

// queries whose logits lie side by side
static constexpr int32_t KVMERGE_TILE = 16;

struct kvmerge_plan {
    std::vector<kvmerge_cell> cells;  // [n] what was there, in the order of the cells

    // score
    std::vector<float> score;         // [n] importance
    std::vector<float> value_norm;    // [n] norms of the values, empty unless asked for
    std::vector<float> logits;        // attention logits of n_queries, where something needs them: of the proxies, then of
                                      // sampled text; see logit()
    int32_t            n_queries = 0;

    // logits lie as [n_queries/KVMERGE_TILE, rounded up][n][KVMERGE_TILE]
    float * tile (int32_t t)                  { return logits.data() + (int64_t) t*cells.size()*KVMERGE_TILE; }
    float & logit(int32_t q, int64_t i)       { return tile(q/KVMERGE_TILE)[i*KVMERGE_TILE + q % KVMERGE_TILE]; }

    // room for the logits of n more queries
    void add_queries(int32_t n) {
        n_queries += n;
        logits.resize((int64_t) (n_queries + KVMERGE_TILE - 1)/KVMERGE_TILE*cells.size()*KVMERGE_TILE);
    }

    // gives the memory of the logits away, when nothing needs them any more
    std::vector<float> take_logits() {
        n_queries = 0;

        return std::move(logits);
    }

    // select and match: one mapping, from which all else follows
    std::vector<int32_t> target;       // [n] index of the pivot that the cell goes into: its own when kept, -1: dropped
    std::vector<uint8_t> is_protected; // [n] 1: kept, and receives nothing
    std::vector<float>   similarity;   // [n] cosine of its key to the pivot's, empty unless asked for

    void drop_all() {
        target      .assign(cells.size(), -1);
        is_protected.assign(cells.size(), 0);
    }

    void keep   (int32_t i)                { target[i] = i; }
    void protect(int32_t i)                { target[i] = i; is_protected[i] = 1; }
    void fold   (int32_t i, int32_t pivot) { target[i] = pivot; }
    void drop   (int32_t i)                { target[i] = -1; }

    bool is_kept  (int32_t i) const { return target[i] == i; }
    bool is_open  (int32_t i) const { return target[i] == i && !is_protected[i]; }
    bool is_folded(int32_t i) const { return target[i] >= 0 && target[i] != i; }
    bool is_left  (int32_t i) const { return target[i] < 0 && cells[i].mass > 0; } // nothing was decided about it

    int32_t n_kept() const {
        int32_t res = 0;
        for (size_t i = 0; i < target.size(); ++i) {
            res += is_kept(i);
        }
        return res;
    }

    // [B] indices of the pivots, ascending
    std::vector<int32_t> kept() const {
        std::vector<int32_t> res;
        for (size_t i = 0; i < target.size(); ++i) {
            if (is_kept(i)) {
                res.push_back(i);
            }
        }
        return res;
    }

    kvmerge_fate fate(int32_t i) const {
        return is_folded(i) ? KVMERGE_FOLDED : !is_kept(i) ? KVMERGE_DROPPED : is_protected[i] ? KVMERGE_PROTECTED : KVMERGE_KEPT;
    }

    // fold
    std::vector<float> weight;        // [n] weight in the mean of its group, adding up to 1 over the group
    std::vector<float> bias;          // [B] of the pivots
};

// Cross-modal flow of one layer (FlowMM eq. 6-7), as shares of all attention.
struct kvmerge_flow {
    float rho           = 0; // -1: not measured
    float text_to_media = 0;
    float media_to_text = 0;
};
