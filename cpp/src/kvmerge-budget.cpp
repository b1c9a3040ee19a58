// How many cells a merge leaves: to text, to pictures that stay whole, to each layer.

#include "kvmerge-allocate.h"
#include "kvmerge-engine.h"
#include "kvmerge-select.h"

#include <algorithm>
#include <cmath>

kvmerge_engine::modality_counts kvmerge_engine::count_modalities(const std::vector<uint32_t> & cells) const {
    modality_counts res;

    int64_t last = -1;
    for (uint32_t idx : cells) {
        const auto & cur = cell(idx, 0, 0);

        if (cur.mass > 0 && cur.modality == KVMERGE_TEXT) {
            res.n_text++;
        } else if (cur.mass > 0) {
            res.n_media++;
            res.n_segments += cur.segment != last;
            last = cur.segment;
        }
    }

    return res;
}

int32_t kvmerge_engine::n_text_kept(int32_t n_cells, const std::vector<uint32_t> & cells, llama_seq_id seq_id) const {
    if (params.select != KVMERGE_SELECT_MEDIA) {
        return 0;
    }

    const auto n = count_modalities(cells);

    int32_t n_media = 0; // cells that text leaves to pictures and sounds

    if (room.is_tight) {
        // Cells are short: the media give way first, down to their floor and an eighth of their part, lest a long text leaves
        // nothing of them.
        n_media = (int64_t) n_cells*n.n_media/std::max(1, n.n_text + n.n_media)/8;
        if (room.share > 0) {
            n_media = std::min<int32_t>(n_media, std::ceil(room.share*(sequences[seq_id].n_seen - n.n_text)));
        }
        n_media = std::min(std::max(n_media, params.n_floor*n.n_segments), n.n_media);
    }

    return std::min(n.n_text, std::max(n_cells - n_media, std::min(n_cells, 1)));
}

void kvmerge_engine::mark_whole(int32_t n_cells, int32_t n_text, std::vector<kvmerge_plan> & plans) const {
    // while a prompt is being read, the newest picture has not been asked about yet
    const int32_t n_whole = std::max<int32_t>(room.n_whole, room.is_tight);

    const int32_t n_free = n_cells - n_text;

    int32_t n_left  = n_free - (n_text > 0 ? 0 : params.n_sink + kvmerge_n_keep(params));
    int32_t segment = -1; // the last one that was marked

    // where nothing else is asked for, one half goes to what is older
    n_left = room.n_whole > 0 ? n_left : std::min(n_left, n_free/2);

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
                next = std::max<int32_t>(next, cell.segment);
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

std::vector<int32_t> kvmerge_engine::layer_budgets(
        const std::vector<std::vector<kvmerge_plan>> & plans, const std::vector<kvmerge_flow> & flows,
        const std::vector<uint32_t> & cells, int32_t n_cells, int32_t n_text, int32_t n_most) const {
    if (params.select != KVMERGE_SELECT_MEDIA) {
        return kvmerge_allocate(plans, flows, cells.size(), n_cells, params.n_sink + kvmerge_n_keep(params), n_most, params);
    }

    // what stays as it is takes its cells in every layer; the layers differ in what is left
    std::vector<kvmerge_plan> first(1);
    for (uint32_t idx : cells) {
        first[0].cells.push_back(cell(idx, 0, 0));
    }
    mark_whole(n_cells, n_text, first);

    const int32_t n_fixed = n_text + std::count_if(first[0].cells.begin(), first[0].cells.end(), [](const auto & cur) { return cur.is_whole; });

    auto res = kvmerge_allocate(plans, flows, cells.size() - n_fixed, n_cells - n_fixed,
            params.n_floor*count_modalities(cells).n_segments, n_most - n_fixed, params);

    for (auto & n : res) {
        n += n_fixed;
    }

    return res;
}
