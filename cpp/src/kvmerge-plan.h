#pragma once

// What a merge does to one (layer, KV head): plain arrays that the steps fill in turn.
//
//   observe -> score -> allocate -> select -> match -> fold -> compact
//
// n is the number of cells of the sequence before the merge, B the number after it.

#include "kvmerge.h"

#include <cstdint>
#include <vector>

// What one cell holds, as one layer and KV head see it.
struct kvmerge_cell {
    int32_t order    = -1; // index of the token in its sequence, counted from 0
    int32_t segment  = 0;  // picture, clip or run of text that it belongs to
    float   mass     = 1;  // number of tokens that it stands for
    float   bias     = 0;  // what is added to its attention logit
    uint8_t modality = KVMERGE_TEXT;
};

struct kvmerge_plan {
    std::vector<kvmerge_cell> cells;  // [n] what was there, in the order of the cells
    std::vector<float>        score;  // [n] importance
    std::vector<uint8_t>      fate;   // [n] enum kvmerge_fate
    std::vector<int32_t>      kept;   // [B] indices of the pivots, ascending
    std::vector<int32_t>      target; // [n] index of the pivot that the cell goes into, -1: dropped
};

// Cross-modal flow of one layer (FlowMM eq. 6-7), as shares of all attention.
struct kvmerge_flow {
    float rho           = 0;
    float text_to_media = 0;
    float media_to_text = 0;
};
