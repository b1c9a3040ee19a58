// The engine's part of a saved state: what the cells stand for, and the observed queries.
//
// It lies around the cells of llama_kv_cache in the same stream, and only when an engine is attached: without one the
// format is llama.cpp's own. In front stands of how many of the cells each layer holds nothing (kvmerge-stored.cpp).

#include "kvmerge-engine.h"
#include "kvmerge-fault.h"
#include "kvmerge-score.h"
#include "kvmerge-stream.h"

#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

//
// cells
//

static void write_cell(llama_io_write_i & io, const kvmerge_cell & cell) {
    kvmerge_write(io, cell.order);
    kvmerge_write(io, int32_t(cell.segment));
    kvmerge_write(io, cell.mass);
    kvmerge_write(io, cell.bias);
    kvmerge_write(io, uint8_t(cell.modality));
}

static kvmerge_cell read_cell(llama_io_read_i & io) {
    kvmerge_cell cell;

    cell.order = kvmerge_read<int32_t>(io);

    const auto segment = kvmerge_read<int32_t>(io);

    cell.mass = kvmerge_read<float>(io);
    cell.bias = kvmerge_read<float>(io);

    const auto modality = kvmerge_read<uint8_t>(io);

    const bool is_empty = cell.order == -1 && kvmerge_is_empty(cell);
    const bool is_used  = kvmerge_is_count(cell.order) && cell.mass >= 0 && cell.mass <= KVMERGE_MAX_COUNT && std::isfinite(cell.bias);

    if (!(is_empty || is_used) || !kvmerge_is_count(segment) || segment >= 1 << 28 || modality >= kvmerge_observer::n_modalities) {
        kvmerge_refuse("a cell is damaged");
    }

    cell.segment  = segment;
    cell.modality = modality;

    return cell;
}

// One after the other, of a layer and head. Most cells are the next token of the one before, and layers that store fewer
// cells than others have a row of empty ones: what each cell takes counts, since there is one for every layer and head.
enum : uint8_t { CELL_WRITTEN, CELL_NEXT, CELL_SAME };

static kvmerge_cell next_cell(kvmerge_cell cell) {
    cell.order++;
    cell.mass = 1;
    cell.bias = 0;

    return cell;
}

static bool is_same(const kvmerge_cell & a, const kvmerge_cell & b) {
    return a.order == b.order && a.mass == b.mass && a.bias == b.bias && a.segment == b.segment && a.modality == b.modality;
}

static void write_cell_after(llama_io_write_i & io, const kvmerge_cell & cell, const kvmerge_cell & last) {
    const uint8_t how = is_same(cell, next_cell(last)) ? CELL_NEXT : is_same(cell, last) ? CELL_SAME : CELL_WRITTEN;

    kvmerge_write(io, how);
    if (how == CELL_WRITTEN) {
        write_cell(io, cell);
    }
}

static kvmerge_cell read_cell_after(llama_io_read_i & io, const kvmerge_cell & last) {
    switch (kvmerge_read<uint8_t>(io)) {
        case CELL_WRITTEN: return read_cell(io);
        case CELL_SAME:    return last;
        case CELL_NEXT:
            if (kvmerge_is_count(last.order + 1ll)) {
                return next_cell(last);
            }
    }

    kvmerge_refuse("a cell is damaged");
}


void kvmerge_engine::on_restore(llama_seq_id seq_id, uint32_t n_cells) {
    is_refusing = false;

    const auto & table = cache.get_cells(0);

    // what is there now and stays
    uint32_t n_other = 0;
    for (uint32_t i = 0; i < table.size(); ++i) {
        n_other += !table.is_empty(i) && !(seq_id >= 0 && table.seq_has(i, seq_id) && table.seq_count(i) == 1);
    }

    make_cells((uint64_t) n_other + n_cells);

    if (n_cells > table.size() - n_other) {
        kvmerge_refuse("there is no room for its " + std::to_string(n_cells) + " cells next to " + std::to_string(n_other));
    }
}

//
// what the cells stand for, and the observed queries
//

// What is saved of the observed queries: as they are where all have room, else some, in 8 bits where the size of a row allows.
struct kvmerge_engine::saved_queries {
    bool                 is_exact;
    std::vector<int32_t> slots;

    static ggml_type type(const kvmerge_layer & layer, bool is_exact) {
        const bool is_whole = layer.q->ne[0] % ggml_blck_size(GGML_TYPE_Q8_0) == 0;

        return is_exact ? GGML_TYPE_F32 : is_whole ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    }

    static size_t row_size(const kvmerge_layer & layer, bool is_exact) {
        return ggml_row_size(type(layer, is_exact), layer.q->ne[0]);
    }

    // to and from rows of type(), which are moved as they are where that is F32
    static void pack(const kvmerge_layer & layer, bool is_exact, const std::vector<float> & row, uint8_t * dst) {
        if (is_exact) {
            memcpy(dst, row.data(), row.size()*sizeof(float));
        } else {
            ggml_get_type_traits(type(layer, is_exact))->from_float_ref(row.data(), dst, row.size());
        }
    }

    static void unpack(const kvmerge_layer & layer, bool is_exact, const std::vector<uint8_t> & src, float * row) {
        if (is_exact) {
            memcpy(row, src.data(), src.size());
        } else {
            ggml_get_type_traits(type(layer, is_exact))->to_float(src.data(), row, layer.q->ne[0]);
        }
    }
};

// Only the rows that a merge would use, and of those, unless all are asked for, no more than keep a state as small as the full
// cache would be: as take half of what merging has saved, or before the first merge a small part of the cells.
static constexpr int64_t UNMERGED_PART = 64;

kvmerge_engine::saved_queries kvmerge_engine::choose_queries(llama_seq_id seq_id) const {
    const auto & seq = sequences[seq_id];

    const auto window  = observer.window (seq_id, seq.n_seen);
    const auto samples = measures_flow() || kvmerge_needs_logits(params) ? observer.samples(seq_id, seq.n_seen) : std::vector<int32_t> {};

    const auto cells = saved_cells(seq_id);

    int64_t exact = 0; // bytes of a row
    int64_t small = 0;
    int64_t held  = 0;
    for (const auto & layer : layers) {
        exact += saved_queries::row_size(layer, true);
        small += saved_queries::row_size(layer, false);
        held  += (cells.size() - count_unheld(layer, cells))*bytes_per_cell(layer);
    }

    const int64_t full = seq.n_seen*stats.bytes_per_cell;
    const int64_t room = full > held ? (full - held)/2 : held/UNMERGED_PART;
    const int64_t n    = window.size() + samples.size();

    saved_queries res = { saves_all_queries || n*exact <= room, {} };

    const int64_t n_max     = res.is_exact ? n : std::max<int64_t>(full > held, room/small);
    const int64_t n_samples = std::min<int64_t>(samples.size(), std::max<int64_t>(n_max/2, n_max - (int64_t) window.size()));
    const int64_t n_window  = std::min<int64_t>(window.size(), n_max - n_samples);

    res.slots.assign(window.end() - n_window, window.end());
    for (int64_t i = 0; i < n_samples; ++i) {
        res.slots.push_back(samples[i*samples.size()/n_samples]);
    }

    return res;
}

// Those of the last merge, in the order of the file. What is added to kvmerge_stats is not saved until it is added here, with
// another version.
template <typename Stats, typename F>
static void for_each_figure(Stats & stats, F && f) {
    f(stats.n_merges);
    f(stats.n_tokens);
    f(stats.n_cells_before);
    f(stats.n_cells_after);
    f(stats.n_text_before);
    f(stats.n_text_after);
    f(stats.bytes_after);
    f(stats.t_score_us);
    f(stats.t_match_us);
    f(stats.t_fold_us);
    f(stats.t_total_us);
}

void kvmerge_engine::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    const auto cells = saved_cells(seq_id);

    kvmerge_may_fail();

    kvmerge_write(io, params.n_window);
    kvmerge_write(io, params.n_flow_rows);
    kvmerge_write(io, (uint8_t) (layers[0].sum != nullptr));
    for (const auto & layer : layers) {
        kvmerge_write(io, layer.n_head);
        kvmerge_write(io, layer.n_head_kv);
        kvmerge_write(io, layer.n_embd_head_k);
    }

    // the figures of the last merge
    for_each_figure(stats, [&](auto & value) { kvmerge_write(io, value); });
    kvmerge_write(io, stats.n_layers);
    kvmerge_write(io, stats.n_heads);
    kvmerge_write(io, stats.bytes_per_cell);
    for (const auto & flow : flows) {
        kvmerge_write(io, flow.rho);
        kvmerge_write(io, flow.text_to_media);
        kvmerge_write(io, flow.media_to_text);
    }

    kvmerge_write(io, (uint32_t) cells.size());
    for (uint32_t idx : cells) {
        write_cell(io, tokens[idx]);
        kvmerge_write(io, is_merged[idx]);
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
            kvmerge_cell last;

            for (uint32_t idx : cells) {
                if (is_merged[idx]) {
                    write_cell_after(io, merged[l][h][idx], last);
                    last = merged[l][h][idx];
                }
            }
        }
    }

    for (const auto & layer : layers) {
        const uint32_t n_out = count_unheld(layer, cells);

        for (int32_t h = 0; layer.sum && h < layer.n_head_kv; ++h) {
            for (size_t i = n_out; i < cells.size(); ++i) {
                io.write_tensor(layer.sum, h*layer.sum->nb[1] + (cells[i] - layer.first)*sizeof(float), sizeof(float));
            }
        }
    }

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    kvmerge_write(io, last - first);
    for (int32_t s = first; s < last; ++s) {
        const auto & cur = sequences[s];

        kvmerge_write(io, cur.n_seen);
        kvmerge_write(io, cur.segment);
        kvmerge_write(io, cur.modality);
        kvmerge_write(io, cur.pos_merged);

        for (int m = 0; m < kvmerge_observer::n_modalities; ++m) {
            kvmerge_write(io, observer.count(s, m));
        }

        const auto queries = choose_queries(s);

        kvmerge_write(io, (uint8_t) queries.is_exact);
        kvmerge_write(io, (uint32_t) queries.slots.size());
        for (int32_t slot : queries.slots) {
            kvmerge_write(io, slot - observer.first_slot(s));
            kvmerge_write(io, observer.row(slot).order);
            kvmerge_write(io, observer.row(slot).modality);
        }
        for (const auto & layer : layers) {
            std::vector<float>   row(layer.q->ne[0]);
            std::vector<uint8_t> packed(saved_queries::row_size(layer, queries.is_exact));

            for (int32_t slot : queries.slots) {
                ggml_backend_tensor_get(layer.q, row.data(), slot*layer.q->nb[1], layer.q->nb[1]);
                saved_queries::pack(layer, queries.is_exact, row, packed.data());
                io.write(packed.data(), packed.size());
            }
        }
    }
}

// what a saved state says, until all of it is read
struct kvmerge_engine::saved_state {
    struct saved_cell {
        kvmerge_cell token;
        std::vector<std::vector<kvmerge_cell>> merged; // [layer][head], empty: it is not merged
    };

    struct saved_sequence {
        sequence seq;
        int64_t  counts[kvmerge_observer::n_modalities];
        std::vector<std::pair<int32_t, kvmerge_row>> rows; // slot, row
        std::vector<std::vector<float>>              q;    // [layer][rows*n_embd_head_k*n_head]
    };

    kvmerge_stats               stats = {};
    std::vector<kvmerge_flow>   flows;
    std::vector<saved_cell>     cells;
    std::vector<saved_sequence> sequences;
};

void kvmerge_engine::read_shape(llama_io_read_i & io) const {
    if (kvmerge_read<int32_t>(io) != params.n_window || kvmerge_read<int32_t>(io) != params.n_flow_rows || kvmerge_read<uint8_t>(io) != (layers[0].sum != nullptr)) {
        kvmerge_refuse("it was saved with another policy (window, flow rows or score over all queries)");
    }
    for (const auto & layer : layers) {
        if (kvmerge_read<int32_t>(io) != layer.n_head || kvmerge_read<int32_t>(io) != layer.n_head_kv || kvmerge_read<int32_t>(io) != layer.n_embd_head_k) {
            kvmerge_refuse("it is of another model (heads of layer " + std::to_string(layer.il) + ")");
        }
    }
}

void kvmerge_engine::read_figures(llama_io_read_i & io, saved_state & saved) const {
    for_each_figure(saved.stats, [&](auto & value) { value = kvmerge_read<std::remove_reference_t<decltype(value)>>(io); });

    saved.stats.error          = -1;
    saved.stats.n_layers       = kvmerge_read<int32_t>(io);
    saved.stats.n_heads        = kvmerge_read<int32_t>(io);
    saved.stats.bytes_per_cell = kvmerge_read<int64_t>(io);

    for_each_figure(saved.stats, [](const auto & value) {
        // counts; bytes and times have more digits
        if (value < 0 || (sizeof(value) == sizeof(int32_t) && !kvmerge_is_count(value))) {
            kvmerge_refuse("the figures of the last merge are damaged");
        }
    });

    saved.flows.resize(layers.size());
    for (auto & flow : saved.flows) {
        flow.rho           = kvmerge_read<float>(io);
        flow.text_to_media = kvmerge_read<float>(io);
        flow.media_to_text = kvmerge_read<float>(io);

        if (!(std::isfinite(flow.rho) && std::isfinite(flow.text_to_media) && std::isfinite(flow.media_to_text))) {
            kvmerge_refuse("the flow between modalities is damaged");
        }
    }

    if (saved.stats.n_layers != stats.n_layers || saved.stats.n_heads != stats.n_heads || saved.stats.bytes_per_cell != stats.bytes_per_cell) {
        kvmerge_refuse("it is of another model or of other cache types");
    }
}

void kvmerge_engine::read_cells(llama_io_read_i & io, const std::vector<uint32_t> & cells, saved_state & saved) const {
    if (const auto found = kvmerge_read<uint32_t>(io); found != cells.size()) {
        kvmerge_refuse("it describes " + std::to_string(found) + " cells of " + std::to_string(cells.size()));
    }

    for (size_t i = 0; i < cells.size(); ++i) {
        saved_state::saved_cell cell { read_cell(io), {} };

        const auto is_merged_saved = kvmerge_read<uint8_t>(io);

        if (cell.token.order < 0 || is_merged_saved > 1) {
            kvmerge_refuse("a cell is damaged");
        }
        if (is_merged_saved) {
            cell.merged.resize(layers.size());
        }

        saved.cells.push_back(std::move(cell));
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
            kvmerge_cell last;

            for (auto & cell : saved.cells) {
                if (!cell.merged.empty()) {
                    last = read_cell_after(io, last);
                    cell.merged[l].push_back(last);
                }
            }
        }
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        const auto & layer = layers[l];

        for (int32_t h = 0; layer.sum && h < layer.n_head_kv; ++h) {
            for (size_t i = n_left_out[l]; i < cells.size(); ++i) {
                io.read_tensor(layer.sum, h*layer.sum->nb[1] + cells[i]*sizeof(float), sizeof(float));
            }
        }
    }
}

void kvmerge_engine::read_sequence(llama_io_read_i & io, llama_seq_id s, const std::vector<uint32_t> & cells, saved_state & saved) const {
    saved_state::saved_sequence cur = {};

    cur.seq.n_seen     = kvmerge_read<int32_t>  (io);
    cur.seq.segment    = kvmerge_read<int32_t>  (io);
    cur.seq.modality   = kvmerge_read<uint8_t>  (io);
    cur.seq.pos_merged = kvmerge_read<llama_pos>(io);

    bool is_sound = kvmerge_is_count(cur.seq.n_seen) && kvmerge_is_count(cur.seq.segment + 1ll) && kvmerge_is_count(cur.seq.pos_merged) &&
        cur.seq.modality < kvmerge_observer::n_modalities;

    for (auto & count : cur.counts) {
        count    = kvmerge_read<int64_t>(io);
        is_sound = is_sound && kvmerge_is_count(count);
    }
    for (size_t i = 0; i < cells.size(); ++i) {
        is_sound = is_sound && (saved.cells[i].token.order < cur.seq.n_seen || !cache.get_cells(0).seq_has(cells[i], s));
    }

    if (!is_sound) {
        kvmerge_refuse("a sequence is damaged");
    }

    const auto is_exact = kvmerge_read<uint8_t> (io);
    const auto n_rows   = kvmerge_read<uint32_t>(io);
    if (is_exact > 1 || n_rows > (uint32_t) observer.n_slots_seq()) {
        kvmerge_refuse("the number of observed queries is damaged");
    }

    for (uint32_t i = 0; i < n_rows; ++i) {
        const auto slot     = kvmerge_read<int32_t>(io);
        const auto order    = kvmerge_read<int32_t>(io);
        const auto modality = kvmerge_read<uint8_t>(io);

        if (slot < 0 || slot >= observer.n_slots_seq() || order < 0 || order >= cur.seq.n_seen || modality >= kvmerge_observer::n_modalities) {
            kvmerge_refuse("an observed query is damaged");
        }

        cur.rows.push_back({ observer.first_slot(s) + slot, { order, modality } });
    }
    for (const auto & layer : layers) {
        const int64_t n = layer.q->ne[0];

        std::vector<uint8_t> packed(saved_queries::row_size(layer, is_exact));

        auto & q = cur.q.emplace_back(n*n_rows);
        for (uint32_t i = 0; i < n_rows; ++i) {
            io.read(packed.data(), packed.size());
            saved_queries::unpack(layer, is_exact, packed, q.data() + i*n);
        }
        if (!std::all_of(q.begin(), q.end(), [](float value) { return std::isfinite(value); })) {
            kvmerge_refuse("an observed query is damaged");
        }
    }

    saved.sequences.push_back(std::move(cur));
}

void kvmerge_engine::state_read(llama_io_read_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & cells) {
    kvmerge_may_fail();

    // Everything is read before anything changes.
    saved_state saved;

    read_shape  (io);
    read_figures(io, saved);
    read_cells  (io, cells, saved);

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    if (kvmerge_read<int32_t>(io) != last - first) {
        kvmerge_refuse("it is of another number of sequences");
    }
    for (int32_t s = first; s < last; ++s) {
        read_sequence(io, s, cells, saved);
    }

    // From here on nothing is refused.

    for (size_t i = 0; i < cells.size(); ++i) {
        const uint32_t idx = cells[i];

        tokens[idx]    = saved.cells[i].token;
        is_merged[idx] = !saved.cells[i].merged.empty();

        has_bias    = has_bias    || tokens[idx].bias != 0.0f;
        is_per_head = is_per_head || is_merged[idx];

        for (size_t l = 0; is_merged[idx] && l < layers.size(); ++l) {
            for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
                auto & dst = merged[l][h];

                dst.resize(std::max<size_t>(dst.size(), idx + 1));
                dst[idx] = saved.cells[i].merged[l][h];

                has_bias = has_bias || dst[idx].bias != 0.0f;
            }
        }
    }

    for (int32_t s = first; s < last; ++s) {
        const auto & cur = saved.sequences[s - first];

        sequences[s] = cur.seq;

        observer.restore(s, cur.counts);
        for (size_t i = 0; i < cur.rows.size(); ++i) {
            const auto & [slot, row] = cur.rows[i];

            observer.set_row(slot, row);
            for (size_t l = 0; l < layers.size(); ++l) {
                const auto * q = layers[l].q;
                ggml_backend_tensor_set(layers[l].q, cur.q[l].data() + i*q->ne[0], slot*q->nb[1], q->nb[1]);
            }
        }
    }

    upload_bias();

    stats    = saved.stats;
    n_recent = 0; // those merges were of another past
    flows    = saved.flows;
    plans.clear(); // what became of every token is not saved

    // not now: K and V may still be on their way into the tensors
    const auto stored = first_cells();
    is_restored = std::any_of(stored.begin(), stored.end(), [](uint32_t first_cell) { return first_cell > 0; });

    version++;
}
