// A check of the table of cells in a saved state, and the engine's part of it: what the cells stand for, and the observed
// queries.
//
// It lies around the cells of llama_kv_cache in the same stream, and only when an engine is attached: without one the
// format is llama.cpp's own. In front stands of how many of the cells each layer holds nothing; their K and V are left out.

#include "kvmerge-state.h"

#include "kvmerge-engine.h"
#include "kvmerge-fault.h"
#include "kvmerge-score.h"

#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

static constexpr uint32_t STATE_MAGIC   = 0x4d56474b; // "KGVM"
static constexpr uint32_t STATE_VERSION = 8;

// of tokens, positions and segments: beyond any context, and they can still be counted on
static constexpr int32_t MAX_COUNT = 1 << 30;

template <typename T>
static void write(llama_io_write_i & io, const T & value) {
    static_assert(std::is_trivially_copyable_v<T>);
    io.write(&value, sizeof(value));
}

template <typename T>
static T read(llama_io_read_i & io) {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    io.read(&value, sizeof(value));
    return value;
}

[[noreturn]] static void refuse(const std::string & reason) {
    throw std::runtime_error("the saved state cannot be used: " + reason);
}

//
// K and V of the cells that a layer stores
//

// llama_kv_cache writes and reads K and V of a layer in runs of cells; where V lies transposed, once for every channel. Of
// each pass over the cells the first ones are left out.
class stored_runs {
public:
    stored_runs(const kvmerge_engine & engine, std::vector<uint32_t> n_out) : engine(engine), n_out(std::move(n_out)) {}

    // offset and size of a run become those of the part that is stored
    void clip(const ggml_tensor * tensor, size_t & offset, size_t & size) {
        for (size_t l = 0; l < engine.layers.size(); ++l) {
            const auto & layer = engine.layers[l];

            const bool is_v = tensor->data == layer.v->data;

            if (!is_v && tensor->data != layer.k->data) {
                continue;
            }

            const bool   trans   = is_v && engine.v_trans;
            const size_t unit    = trans ? ggml_type_size(tensor->type) : ggml_row_size(tensor->type, tensor->ne[0]);
            const size_t kv_size = layer.k->ne[1] + layer.first;
            const size_t channel = trans ? offset/unit/kv_size : 0;

            if (tensor->data != pass.data || channel != pass.channel) {
                pass = { tensor->data, channel, n_out[l] };
            }

            const size_t n = std::min(pass.n_left, size/unit);

            pass.n_left -= n;
            offset      += n*unit - (channel + 1)*layer.first*unit;
            size        -= n*unit;

            return;
        }
    }

private:
    const kvmerge_engine & engine;

    std::vector<uint32_t> n_out; // [layer]

    struct {
        const void * data    = nullptr;
        size_t       channel = 0;
        size_t       n_left  = 0; // to be left out
    } pass;
};

class stored_write : public llama_io_write_i {
public:
    stored_write(llama_io_write_i & io, stored_runs runs) : io(io), runs(std::move(runs)) {}

    void write(const void * src, size_t size) override { io.write(src, size); }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        runs.clip(tensor, offset, size);

        if (size > 0) {
            io.write_tensor(tensor, offset, size);
        }
    }

    size_t n_bytes() override { return io.n_bytes(); }

private:
    llama_io_write_i & io;
    stored_runs        runs;
};

class stored_read : public llama_io_read_i {
public:
    stored_read(llama_io_read_i & io, stored_runs runs) : io(io), runs(std::move(runs)) {}

    void read(void * dst, size_t size) override { io.read(dst, size); }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        runs.clip(tensor, offset, size);

        if (size > 0) {
            io.read_tensor(tensor, offset, size);
        }
    }

    size_t n_bytes() override { return io.n_bytes(); }

private:
    llama_io_read_i & io;
    stored_runs       runs;
};

std::vector<uint32_t> kvmerge_engine::saved_cells(llama_seq_id seq_id) const {
    const auto & table = cache.get_cells(0);

    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < table.size(); ++i) {
        if (!table.is_empty(i) && (seq_id == -1 || table.seq_has(i, seq_id))) {
            res.push_back(i);
        }
    }

    return res;
}

// Saved cells of which a layer holds nothing: the first ones. It stores all but some of them.
uint32_t kvmerge_engine::count_unheld(const kvmerge_layer & layer, const std::vector<uint32_t> & cells) const {
    const auto & heads = merged[&layer - layers.data()];

    const auto it = std::find_if_not(cells.begin(), cells.end(), [&](uint32_t idx) {
        return idx < layer.first || (is_merged[idx] && std::all_of(heads.begin(), heads.end(),
                [&](const auto & head) { return kvmerge_is_empty(head[idx]); }));
    });

    return it - cells.begin();
}

std::unique_ptr<llama_io_write_i> kvmerge_engine::stored_only(llama_io_write_i & io, llama_seq_id seq_id) const {
    kvmerge_may_fail();

    const auto cells = saved_cells(seq_id);

    write(io, STATE_MAGIC);
    write(io, STATE_VERSION);
    write(io, (uint32_t) layers.size());

    std::vector<uint32_t> n_out;
    for (const auto & layer : layers) {
        n_out.push_back(count_unheld(layer, cells));
        write(io, n_out.back());
    }

    return std::make_unique<stored_write>(io, stored_runs(*this, std::move(n_out)));
}

std::unique_ptr<llama_io_read_i> kvmerge_engine::stored_only(llama_io_read_i & io) {
    kvmerge_may_fail();

    if (read<uint32_t>(io) != STATE_MAGIC) {
        refuse("it was saved without merging");
    }
    if (const auto found = read<uint32_t>(io); found != STATE_VERSION) {
        refuse("its version is " + std::to_string(found) + ", accepted is " + std::to_string(STATE_VERSION));
    }
    if (read<uint32_t>(io) != layers.size()) {
        refuse("it is of another model (number of layers)");
    }

    n_left_out.resize(layers.size());
    for (auto & n : n_left_out) {
        n = read<uint32_t>(io);
    }

    return std::make_unique<stored_read>(io, stored_runs(*this, n_left_out));
}

//
// what the cells stand for, and the observed queries
//

static void write_cell(llama_io_write_i & io, const kvmerge_cell & cell) {
    write(io, cell.order);
    write(io, int32_t(cell.segment));
    write(io, cell.mass);
    write(io, cell.bias);
    write(io, uint8_t(cell.modality));
}

static bool is_count(int64_t value) {
    return value >= 0 && value <= MAX_COUNT;
}

static kvmerge_cell read_cell(llama_io_read_i & io) {
    kvmerge_cell cell;

    cell.order = read<int32_t>(io);

    const auto segment = read<int32_t>(io);

    cell.mass = read<float>(io);
    cell.bias = read<float>(io);

    const auto modality = read<uint8_t>(io);

    const bool is_empty = cell.order == -1 && kvmerge_is_empty(cell);
    const bool is_used  = is_count(cell.order) && cell.mass >= 0 && cell.mass <= MAX_COUNT && std::isfinite(cell.bias);

    if (!(is_empty || is_used) || !is_count(segment) || segment >= 1 << 28 || modality >= kvmerge_observer::n_modalities) {
        refuse("a cell is damaged");
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

    write(io, how);
    if (how == CELL_WRITTEN) {
        write_cell(io, cell);
    }
}

static kvmerge_cell read_cell_after(llama_io_read_i & io, const kvmerge_cell & last) {
    switch (read<uint8_t>(io)) {
        case CELL_WRITTEN: return read_cell(io);
        case CELL_SAME:    return last;
        case CELL_NEXT:
            if (is_count(last.order + 1ll)) {
                return next_cell(last);
            }
    }

    refuse("a cell is damaged");
}

//
// the table of cells
//

namespace {

// what was read ahead
class kvmerge_read_again : public llama_io_read_i {
public:
    void read(void * dst, size_t size) override {
        GGML_ASSERT(pos + size <= data.size());

        std::copy_n(data.begin() + pos, size, (uint8_t *) dst);
        pos += size;
    }

    void read_tensor(ggml_tensor *, size_t, size_t) override {
        GGML_ABORT("the table of cells has no tensors");
    }

    size_t n_bytes() override { return pos; }

    template <typename T>
    T read_ahead(llama_io_read_i & io) {
        const T value = ::read<T>(io);

        data.insert(data.end(), (const uint8_t *) &value, (const uint8_t *) (&value + 1));

        return value;
    }

private:
    std::vector<uint8_t> data;
    size_t               pos = 0;
};

}

std::unique_ptr<llama_io_read_i> kvmerge_check_table(
        llama_io_read_i & io, llama_seq_id seq_id, uint32_t n_cells, uint32_t n_seq_max, bool has_ext) {
    auto res = std::make_unique<kvmerge_read_again>();

    for (uint32_t i = 0; i < n_cells; ++i) {
        const auto pos   = res->read_ahead<llama_pos>(io);
        const auto n_seq = res->read_ahead<uint32_t> (io);

        if (!is_count(pos) || n_seq < 1 || n_seq > (seq_id >= 0 ? 1 : n_seq_max)) {
            refuse("a cell has position " + std::to_string(pos) + " in " + std::to_string(n_seq) + " sequences");
        }
        if (has_ext) {
            res->read_ahead<llama_kv_cell_ext>(io);
        }

        llama_seq_id last = -1;
        for (uint32_t j = 0; j < n_seq; ++j) {
            const auto cur = res->read_ahead<llama_seq_id>(io);

            if (seq_id < 0 && (cur <= last || (uint32_t) cur >= n_seq_max)) { // they are written in ascending order
                refuse("a cell is of sequence " + std::to_string(cur));
            }
            last = cur;
        }
    }

    return res;
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
        refuse("there is no room for its " + std::to_string(n_cells) + " cells next to " + std::to_string(n_other));
    }
}

//
// the engine's part
//

// Only the rows that a merge would use; of a sequence that was merged only as many as take half of what that has saved, so
// that its state is smaller than the full cache would be. Before the first merge all go along: it is then the same as without
// saving.
std::vector<int32_t> kvmerge_engine::saved_slots(llama_seq_id seq_id) const {
    const auto & seq = sequences[seq_id];

    const auto window  = observer.window (seq_id, seq.n_seen);
    const auto samples = measures_flow() || kvmerge_needs_logits(params) ? observer.samples(seq_id, seq.n_seen) : std::vector<int32_t> {};

    const auto cells = saved_cells(seq_id);

    int64_t row  = 0;
    int64_t held = 0;
    for (const auto & layer : layers) {
        row  += layer.q->nb[1];
        held += (cells.size() - count_unheld(layer, cells))*bytes_per_cell(layer);
    }

    const int64_t full  = seq.n_seen*stats.bytes_per_cell;
    const int64_t n_max = full > held ? std::max<int64_t>(1, (full - held)/2/row) : window.size() + samples.size();

    const int64_t n_samples = std::min<int64_t>(samples.size(), std::max<int64_t>(n_max/4, n_max - (int64_t) window.size()));
    const int64_t n_window  = std::min<int64_t>(window.size(), n_max - n_samples);

    std::vector<int32_t> res(window.end() - n_window, window.end());
    for (int64_t i = 0; i < n_samples; ++i) {
        res.push_back(samples[i*samples.size()/n_samples]);
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

    write(io, params.n_window);
    write(io, params.n_flow_rows);
    write(io, (uint8_t) (layers[0].sum != nullptr));
    for (const auto & layer : layers) {
        write(io, layer.n_head);
        write(io, layer.n_head_kv);
        write(io, layer.n_embd_head_k);
    }

    // the figures of the last merge
    for_each_figure(stats, [&](auto & value) { write(io, value); });
    write(io, stats.n_layers);
    write(io, stats.n_heads);
    write(io, stats.bytes_per_cell);
    for (const auto & flow : flows) {
        write(io, flow.rho);
        write(io, flow.text_to_media);
        write(io, flow.media_to_text);
    }

    write(io, (uint32_t) cells.size());
    for (uint32_t idx : cells) {
        write_cell(io, tokens[idx]);
        write(io, is_merged[idx]);
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

    write(io, last - first);
    for (int32_t s = first; s < last; ++s) {
        const auto & cur = sequences[s];

        write(io, cur.n_seen);
        write(io, cur.segment);
        write(io, cur.modality);
        write(io, cur.pos_merged);

        for (int m = 0; m < kvmerge_observer::n_modalities; ++m) {
            write(io, observer.count(s, m));
        }

        const auto slots = saved_slots(s);

        write(io, (uint32_t) slots.size());
        for (int32_t slot : slots) {
            write(io, slot - observer.first_slot(s));
            write(io, observer.row(slot).order);
            write(io, observer.row(slot).modality);
        }
        for (const auto & layer : layers) {
            for (int32_t slot : slots) {
                io.write_tensor(layer.q, slot*layer.q->nb[1], layer.q->nb[1]);
            }
        }
    }
}

void kvmerge_engine::state_read(llama_io_read_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & cells) {
    kvmerge_may_fail();

    if (read<int32_t>(io) != params.n_window || read<int32_t>(io) != params.n_flow_rows || read<uint8_t>(io) != (layers[0].sum != nullptr)) {
        refuse("it was saved with another policy (window, flow rows or score over all queries)");
    }
    for (const auto & layer : layers) {
        if (read<int32_t>(io) != layer.n_head || read<int32_t>(io) != layer.n_head_kv || read<int32_t>(io) != layer.n_embd_head_k) {
            refuse("it is of another model (heads of layer " + std::to_string(layer.il) + ")");
        }
    }
    // Everything is read before anything changes.

    kvmerge_stats stats_saved = {};
    for_each_figure(stats_saved, [&](auto & value) { value = read<std::remove_reference_t<decltype(value)>>(io); });

    stats_saved.n_layers       = read<int32_t>(io);
    stats_saved.n_heads        = read<int32_t>(io);
    stats_saved.bytes_per_cell = read<int64_t>(io);

    auto flows_saved = flows;
    for (auto & flow : flows_saved) {
        flow.rho           = read<float>(io);
        flow.text_to_media = read<float>(io);
        flow.media_to_text = read<float>(io);

        if (!(std::isfinite(flow.rho) && std::isfinite(flow.text_to_media) && std::isfinite(flow.media_to_text))) {
            refuse("the flow between modalities is damaged");
        }
    }
    for (int32_t count : { stats_saved.n_merges, stats_saved.n_tokens, stats_saved.n_cells_before, stats_saved.n_cells_after,
                         stats_saved.n_text_before, stats_saved.n_text_after }) {
        if (!is_count(count)) {
            refuse("the figures of the last merge are damaged");
        }
    }
    for (int64_t value : { stats_saved.bytes_after, stats_saved.t_score_us, stats_saved.t_match_us, stats_saved.t_fold_us, stats_saved.t_total_us }) {
        if (value < 0) {
            refuse("the figures of the last merge are damaged");
        }
    }
    if (stats_saved.n_layers != stats.n_layers || stats_saved.n_heads != stats.n_heads || stats_saved.bytes_per_cell != stats.bytes_per_cell) {
        refuse("it is of another model or of other cache types");
    }

    if (const auto found = read<uint32_t>(io); found != cells.size()) {
        refuse("it describes " + std::to_string(found) + " cells of " + std::to_string(cells.size()));
    }

    struct saved_cell {
        kvmerge_cell token;
        std::vector<std::vector<kvmerge_cell>> merged; // [layer][head], empty: it is not merged
    };

    std::vector<saved_cell> cells_saved;

    for (size_t i = 0; i < cells.size(); ++i) {
        saved_cell cell { read_cell(io), {} };

        const auto is_merged_saved = read<uint8_t>(io);

        if (cell.token.order < 0 || is_merged_saved > 1) {
            refuse("a cell is damaged");
        }
        if (is_merged_saved) {
            cell.merged.resize(layers.size());
        }

        cells_saved.push_back(std::move(cell));
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
            kvmerge_cell last;

            for (auto & cell : cells_saved) {
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

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    if (read<int32_t>(io) != last - first) {
        refuse("it is of another number of sequences");
    }

    struct saved_sequence {
        sequence seq;
        int64_t  counts[kvmerge_observer::n_modalities];
        std::vector<std::pair<int32_t, kvmerge_row>> rows; // slot, row
    };

    std::vector<saved_sequence> sequences_saved(last - first);

    for (int32_t s = first; s < last; ++s) {
        auto & cur = sequences_saved[s - first];

        cur.seq.n_seen     = read<int32_t>  (io);
        cur.seq.segment    = read<int32_t>  (io);
        cur.seq.modality   = read<uint8_t>  (io);
        cur.seq.pos_merged = read<llama_pos>(io);

        bool is_sound = is_count(cur.seq.n_seen) && is_count(cur.seq.segment + 1ll) && is_count(cur.seq.pos_merged) &&
            cur.seq.modality < kvmerge_observer::n_modalities;

        for (auto & count : cur.counts) {
            count    = read<int64_t>(io);
            is_sound = is_sound && is_count(count);
        }
        for (size_t i = 0; i < cells.size(); ++i) {
            is_sound = is_sound && (cells_saved[i].token.order < cur.seq.n_seen || !cache.get_cells(0).seq_has(cells[i], s));
        }

        if (!is_sound) {
            refuse("a sequence is damaged");
        }

        const auto n_rows = read<uint32_t>(io);
        if (n_rows > (uint32_t) observer.n_slots_seq()) {
            refuse("the number of observed queries is damaged");
        }

        for (uint32_t i = 0; i < n_rows; ++i) {
            const auto slot     = read<int32_t>(io);
            const auto order    = read<int32_t>(io);
            const auto modality = read<uint8_t>(io);

            if (slot < 0 || slot >= observer.n_slots_seq() || order < 0 || order >= cur.seq.n_seen || modality >= kvmerge_observer::n_modalities) {
                refuse("an observed query is damaged");
            }

            cur.rows.push_back({ observer.first_slot(s) + slot, { order, modality } });
        }
        for (const auto & layer : layers) {
            for (const auto & [slot, row] : cur.rows) {
                io.read_tensor(layer.q, slot*layer.q->nb[1], layer.q->nb[1]);
            }
        }
    }

    // From here on nothing is refused.

    for (size_t i = 0; i < cells.size(); ++i) {
        const uint32_t idx = cells[i];

        tokens[idx]    = cells_saved[i].token;
        is_merged[idx] = !cells_saved[i].merged.empty();

        has_bias    = has_bias    || tokens[idx].bias != 0.0f;
        is_per_head = is_per_head || is_merged[idx];

        for (size_t l = 0; is_merged[idx] && l < layers.size(); ++l) {
            for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
                auto & dst = merged[l][h];

                dst.resize(std::max<size_t>(dst.size(), idx + 1));
                dst[idx] = cells_saved[i].merged[l][h];

                has_bias = has_bias || dst[idx].bias != 0.0f;
            }
        }
    }

    for (int32_t s = first; s < last; ++s) {
        const auto & cur = sequences_saved[s - first];

        sequences[s] = cur.seq;

        observer.restore(s, cur.counts);
        for (const auto & [slot, row] : cur.rows) {
            observer.set_row(slot, row);
        }
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        upload_bias(l);
    }

    stats = stats_saved;
    n_recent = 0; // those merges were of another past
    flows = flows_saved;
    plans.clear(); // what became of every token is not saved

    // not now: K and V may still be on their way into the tensors
    const auto stored = first_cells();
    is_restored = std::any_of(stored.begin(), stored.end(), [](uint32_t first_cell) { return first_cell > 0; });

    version++;
}
