// K and V of the cells that a layer stores, in a saved state: those that it does not are left out.

#include "kvmerge-engine.h"
#include "kvmerge-fault.h"
#include "kvmerge-stream.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

static constexpr uint32_t STATE_MAGIC   = 0x4d56474b; // "KGVM"
static constexpr uint32_t STATE_VERSION = 9;

// llama_kv_cache writes and reads K and V of a layer in runs of cells; where V lies transposed, once for every channel. Of
// each pass over the cells the first ones are left out. That every pass goes over all cells, in whole ones, is checked: a
// release of llama.cpp in which it does not must not save what cannot be read.
class stored_runs {
public:
    stored_runs(const kvmerge_engine & engine, std::vector<uint32_t> n_out, size_t n_cells) :
        engine(engine), n_out(std::move(n_out)), n_cells(n_cells) {}

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
                check(pass.n_to_come == 0);
                pass = { tensor->data, channel, n_out[l], n_cells };
            }
            check(size % unit == 0 && size/unit <= pass.n_to_come);
            pass.n_to_come -= size/unit;

            const size_t n = std::min(pass.n_left, size/unit);

            pass.n_left -= n;
            offset      += n*unit - (channel + 1)*layer.first*unit;
            size        -= n*unit;

            return;
        }
    }

private:
    static void check(bool is_known) {
        if (!is_known) {
            throw std::runtime_error("llama.cpp goes over the keys and values of a state in an order that is not known here");
        }
    }

    const kvmerge_engine & engine;

    const std::vector<uint32_t> n_out; // [layer]
    const size_t                n_cells;

    struct {
        const void * data      = nullptr;
        size_t       channel   = 0;
        size_t       n_left    = 0; // to be left out
        size_t       n_to_come = 0;
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

std::unique_ptr<llama_io_write_i> kvmerge_engine::stored_only(llama_io_write_i & io, const std::vector<uint32_t> & cells) const {
    kvmerge_may_fail();

    kvmerge_write(io, STATE_MAGIC);
    kvmerge_write(io, STATE_VERSION);
    kvmerge_write(io, (uint32_t) layers.size());

    std::vector<uint32_t> n_out;
    for (const auto & layer : layers) {
        n_out.push_back(count_unheld(layer, cells));
        kvmerge_write(io, n_out.back());
    }

    return std::make_unique<stored_write>(io, stored_runs(*this, std::move(n_out), cells.size()));
}

std::unique_ptr<llama_io_read_i> kvmerge_engine::stored_only(llama_io_read_i & io, uint32_t n_cells) {
    kvmerge_may_fail();

    if (kvmerge_read<uint32_t>(io) != STATE_MAGIC) {
        kvmerge_refuse("it was saved without merging");
    }
    if (const auto found = kvmerge_read<uint32_t>(io); found != STATE_VERSION) {
        kvmerge_refuse("its version is " + std::to_string(found) + ", accepted is " + std::to_string(STATE_VERSION));
    }
    if (kvmerge_read<uint32_t>(io) != layers.size()) {
        kvmerge_refuse("it is of another model (number of layers)");
    }

    n_left_out.resize(layers.size());
    for (auto & n : n_left_out) {
        n = kvmerge_read<uint32_t>(io);
    }

    return std::make_unique<stored_read>(io, stored_runs(*this, n_left_out, n_cells));
}
