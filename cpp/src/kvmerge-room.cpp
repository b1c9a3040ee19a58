// How many cells there are. The cache begins small, grows when a batch finds no slot, and shrinks after a merge. Where it
// may not grow any further, a merge makes room.

#include "kvmerge-room.h"

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-move.h"
#include "kvmerge-select.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// tokens that fit after a merge for want of room, before the next one: a merge costs as much as some ten of them
static constexpr int32_t MIN_STRETCH = 64;

static uint32_t round_up  (uint32_t n) { return (n + KVMERGE_CELL_STEP - 1)/KVMERGE_CELL_STEP*KVMERGE_CELL_STEP; }
static uint32_t round_down(uint32_t n) { return n/KVMERGE_CELL_STEP*KVMERGE_CELL_STEP; }

//
// the first size
//

static thread_local uint32_t n_first = 0;

int32_t kvmerge_begin_small(int32_t n_cells) {
    if (n_cells < 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells is %d, accepted is 0 and more", n_cells);
    }

    n_first = round_up(n_cells);

    return KVMERGE_OK;
}

uint32_t kvmerge_first_size(uint32_t n_cells, bool is_swa) {
    // a cache with a sliding window is small already
    return n_first == 0 || is_swa ? n_cells : std::min(n_cells, n_first);
}

void kvmerge_give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

uint32_t kvmerge_engine::n_cells_max() const {
    const uint32_t n_ctx = lctx->get_cparams().n_ctx_seq;

    return room.n_cells_max > 0 ? std::min<uint32_t>(n_ctx, room.n_cells_max) : n_ctx;
}

kvmerge_status kvmerge_engine::set_room(int32_t n_cells, float share, int32_t n_whole) {
    if (n_cells < 0 || (n_cells > 0 && n_cells < (int32_t) KVMERGE_CELL_STEP)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells_max is %d, accepted is 0 (no limit) and %u or more", n_cells, KVMERGE_CELL_STEP);
    }
    if (!(share >= 0 && share <= 1)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "share is %g, accepted is 0 to 1", share);
    }
    if (n_whole < 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_whole is %d, accepted is 0 and more", n_whole);
    }

    room.n_cells_max = round_down(n_cells);
    room.share       = share;
    room.n_whole     = n_whole;

    return KVMERGE_OK;
}

void kvmerge_engine::set_idle(llama_seq_id seq_id, bool idle) {
    is_idle[seq_id] = idle;
}

bool kvmerge_engine::take_cleared(llama_seq_id seq_id) {
    const bool res = was_cleared[seq_id];

    was_cleared[seq_id] = 0;

    return res;
}

void kvmerge_engine::shrink() noexcept {
    auto & table = cache.v_cells[0];

    if (!room.is_elastic || table.get_has_shift()) {
        return;
    }

    uint32_t n = table.size();

    // a batch is waiting for the cells that a tight merge frees
    if (!room.is_tight) {
        n = std::min({ n, n_cells_max(), std::max(round_up(lctx->get_cparams().n_ubatch), round_up(table.used_max_p1() + 1)) });
    }

    try {
        resize(n, first_cells());
    } catch (const std::bad_alloc &) {
        // it stays larger than it needs to be
        LLAMA_LOG_WARN("%s: no memory to become smaller\n", __func__);
    }

    for (size_t i = 0; i < pages.size() && !room.is_tight; ++i) {
        if (pages[i].data()) {
            kvmerge_keep_used(cache_tensor(i), is_trans(i), table.used_max_p1() - layers[i/2].first, pages[i]);
        }
    }
}

void kvmerge_engine::on_init_update(bool optimize) {
    if (!optimize) {
        // another batch than the one that found no slot
        n_wanted    = 0;
        is_refusing = false;
    }
}

void kvmerge_engine::on_no_slot(const std::vector<llama_ubatch> & ubatches) {
    n_wanted = 0;
    for (const auto & ubatch : ubatches) {
        n_wanted += ubatch.n_tokens;
    }
}

bool kvmerge_engine::has_lost_graphs() const {
    ggml_backend_sched_t sched = lctx->get_sched();

    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        if (ggml_backend_sched_get_buffer_size(sched, ggml_backend_sched_get_backend(sched, i)) > 0) {
            return false;
        }
    }

    return true;
}

void kvmerge_engine::make_cells(uint64_t n_cells) {
    const auto & table = cache.get_cells(0);

    uint32_t n = table.size();

    if (room.is_elastic && n_cells > n && n_cells <= n_cells_max() && !table.get_has_shift()) {
        n = std::min(n_cells_max(), round_up(n_cells));
    }

    // it is not known yet which cells the layers hold, and the tensors are filled when the whole state is read
    if (!resize(n, std::vector<uint32_t>(layers.size()))) {
        throw std::bad_alloc();
    }

    // this is no update of the memory, after which the context would do it
    lctx->sched_reserve_later();
}

// The highest number of cells that none of the sequences may exceed, so that together they give n_over; n_least if it would
// have to be lower.
static int32_t level(const std::vector<int32_t> & sizes, int64_t n_over, int32_t n_least) {
    int32_t low  = n_least;
    int32_t high = std::max(n_least, *std::max_element(sizes.begin(), sizes.end()));

    while (low < high) {
        const int32_t mid = low + (high - low + 1)/2;

        int64_t n_given = 0;
        for (const int32_t size : sizes) {
            n_given += std::max(0, size - mid);
        }

        if (n_given >= n_over) {
            low = mid;
        } else {
            high = mid - 1;
        }
    }

    return low;
}

kvmerge_status kvmerge_engine::take_room(int32_t n_fit, bool of_idle) {
    std::vector<llama_seq_id> ids;
    std::vector<int32_t>      sizes;

    int32_t n_held = 0; // sequences that hold anything
    int32_t n_busy = 0;

    for (size_t s = 0; s < sequences.size(); ++s) {
        const auto cells = sequence_cells(s);

        n_held += !cells.empty();
        n_busy += !cells.empty() && !is_idle[s];

        if (!cells.empty() && of_idle == (bool) is_idle[s] && check_merge(s, cells) == KVMERGE_OK) {
            ids  .push_back(s);
            sizes.push_back(cells.size());
        }
    }

    if (ids.empty()) {
        return KVMERGE_OK;
    }

    // Less than what fits, lest the next tokens merge again.
    const int32_t n_stretch = std::min(n_fit/2, std::max(n_fit/8, MIN_STRETCH*std::max(1, n_busy)));
    const int64_t n_over    = (int64_t) cache.get_cells(0).get_used() - (n_fit - n_stretch);

    // what is idle keeps enough to be asked about again
    const int32_t n_level = level(sizes, n_over, of_idle ? n_fit/(4*n_held) : 1);

    for (size_t i = 0; i < ids.size(); ++i) {
        if (sizes[i] <= n_level) {
            continue;
        }

        const auto & seen  = sequences[ids[i]];
        const auto   cells = sequence_cells(ids[i]);

        const bool    text_alone = params.select == KVMERGE_SELECT_MEDIA;
        const int32_t n_text     = text_alone ? std::min(count_modalities(cells).n_text, n_level) : 0;

        // where layers differ, the widest has n_level
        int32_t n_target = n_level - (params.allocate == KVMERGE_ALLOCATE_UNIFORM ? 0 : (n_level - n_text)/8);
        if (room.share > 0) {
            n_target = std::min(n_target, n_text + (int32_t) std::ceil(room.share*(seen.n_seen - n_text)));
        }
        n_target = std::max(n_target, std::min(params.n_sink + kvmerge_n_keep(params) + 1, n_level));

        if (n_target < 1 || n_target >= (int32_t) cells.size()) {
            continue;
        }

        const auto status = run(ids[i], { { n_target } }, n_level);
        if (status != KVMERGE_OK) {
            return status;
        }
    }

    return KVMERGE_OK;
}

bool kvmerge_engine::make_room(uint32_t n_tokens) {
    const auto & table = cache.get_cells(0);

    const uint32_t n_max = n_cells_max();

    if (table.get_used() + n_tokens > n_max && room.n_cells_max > 0 && is_attached) {
        // also when a merge throws: a cache that stays tight never shrinks again
        struct tight_scope {
            bool & is_tight;
            ~tight_scope() { is_tight = false; }
        } scope = { room.is_tight };

        room.is_tight = true;

        for (const bool of_idle : { true, false }) {
            if (n_max <= n_tokens || table.get_used() + n_tokens <= n_max) {
                break;
            }

            const auto status = take_room(n_max - n_tokens, of_idle);

            if (status == KVMERGE_ERROR_CLEARED) {
                is_refusing = true;
            }
            if (status != KVMERGE_OK) {
                return false; // what is said of it stands in kvmerge_error_message()
            }
        }
    }

    const uint32_t n = table.get_used() + n_tokens;

    if (n > n_max) {
        LLAMA_LOG_ERROR("%s: %u tokens do not fit next to %u cells: there may be %u\n", __func__, n_tokens, table.get_used(), n_max);
        return false;
    }

    // cells that were freed and that some layer does not store are stored again
    return resize(std::max(table.size(), std::min(n_max, round_up(n))), first_cells());
}
