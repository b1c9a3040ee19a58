#pragma once

// compact: the first cells of a sequence take the pivots, the others are freed.
//
// All of it is made before the cache changes, and put in its place at once: that takes no memory, so it does not fail.

#include "kvmerge-engine.h"

#include "llama-kv-cells.h"

class kvmerge_engine::compaction {
public:
    explicit compaction(kvmerge_engine & engine) : engine(engine) {}

    // cells[0, n_after) of the sequence are to hold the pivots of the plans, [layer][head]
    void prepare(llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans);

    void commit() noexcept;

private:
    void prepare_cells(const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans);
    void prepare_table(llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans);

    kvmerge_engine & engine;

    llama_seq_id          seq_id = -1;
    std::vector<uint32_t> first; // the cells that are merged then

    // what takes the place of what the engine and the cache have
    llama_kv_cells            table;
    std::vector<kvmerge_cell> tokens;
    std::vector<uint8_t>      is_merged;
    llama_pos                 pos_merged = 0;
    llama_pos                 pos_whole  = 0;
    bool                      has_bias   = false;

    std::vector<std::vector<std::vector<kvmerge_cell>>> held; // [layer][head][n_after]
    std::vector<std::vector<float>>                     sums; // [layer] empty: none are added up

    bias_values bias; // room for those of a layer
};
