#include "kvmerge-table.h"

#include "kvmerge-stream.h"

#include "llama-kv-cells.h"

#include <algorithm>
#include <string>
#include <vector>

namespace {

// what was read ahead
class read_again : public llama_io_read_i {
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
        const T value = kvmerge_read<T>(io);

        data.insert(data.end(), (const uint8_t *) &value, (const uint8_t *) (&value + 1));

        return value;
    }

private:
    std::vector<uint8_t> data;
    size_t               pos = 0;
};

} // namespace

std::unique_ptr<llama_io_read_i> kvmerge_check_table(
        llama_io_read_i & io, llama_seq_id seq_id, uint32_t n_cells, uint32_t n_seq_max, bool has_ext) {
    auto res = std::make_unique<read_again>();

    for (uint32_t i = 0; i < n_cells; ++i) {
        const auto pos   = res->read_ahead<llama_pos>(io);
        const auto n_seq = res->read_ahead<uint32_t> (io);

        if (!kvmerge_is_count(pos) || n_seq < 1 || n_seq > (seq_id >= 0 ? 1 : n_seq_max)) {
            kvmerge_refuse("a cell has position " + std::to_string(pos) + " in " + std::to_string(n_seq) + " sequences");
        }
        if (has_ext) {
            res->read_ahead<llama_kv_cell_ext>(io);
        }

        llama_seq_id last = -1;
        for (uint32_t j = 0; j < n_seq; ++j) {
            const auto cur = res->read_ahead<llama_seq_id>(io);

            if (seq_id < 0 && (cur <= last || (uint32_t) cur >= n_seq_max)) { // they are written in ascending order
                kvmerge_refuse("a cell is of sequence " + std::to_string(cur));
            }
            last = cur;
        }
    }

    return res;
}
