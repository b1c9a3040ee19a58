// Sequences that are cleared, cut, copied and moved.

#include "kvmerge-engine.h"

#include "llama-kv-cache.h"

#include <algorithm>

void kvmerge_engine::on_clear() {
    for (size_t s = 0; s < sequences.size(); ++s) {
        forget(s);
    }

    std::fill(tokens.begin(),    tokens.end(),    kvmerge_cell {});
    std::fill(is_merged.begin(), is_merged.end(), 0);

    for (auto * bufs : { &bufs_q, &bufs_bias }) {
        for (auto & [ctx, buf] : *bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
    if (has_bias) {
        has_bias    = false;
        is_per_head = false;
        version++;
    }

    media.is_open = false;
    media.weights.clear();
    is_refusing   = false;
    pending       = {};
    n_wanted      = 0;
    is_restored   = false;

    shrink();
}

// all that the sequence holds
static bool is_whole(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return p0 <= cells.seq_pos_min(seq_id) && p1 > cells.seq_pos_max(seq_id);
}

bool kvmerge_engine::may_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & cells = cache.get_cells(0);

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    for (int32_t s = first; s < last; ++s) {
        const llama_pos end = sequences[s].pos_merged;

        if (cells.seq_pos_min(s) < 0 || end == 0 || is_whole(cells, s, p0, p1)) {
            continue;
        }

        if (p0 <= sequences[s].pos_whole && p1 > cells.seq_pos_max(s)) {
            continue; // nothing of what is left was merged
        }

        if (p0 < end) {
            return false;
        }

        // what is read next has to follow on a cell, and the last of the merged tokens may have none of its own
        const auto & seq_pos = cells.seq_pos_get(s);
        const auto   before  = seq_pos.lower_bound({ p0 - 1, 0 });

        if (p0 == end && before != seq_pos.end() && before->first != p0 - 1) {
            return false;
        }
    }

    return true;
}

bool kvmerge_engine::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!may_remove(seq_id, p0, p1)) {
        return false;
    }

    const auto & cells = cache.get_cells(0);

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    for (int32_t s = first; s < last; ++s) {
        if (cells.seq_pos_min(s) < 0) {
            continue;
        }

        if (is_whole(cells, s, p0, p1)) {
            forget(s);
        } else if (p1 > cells.seq_pos_max(s)) {
            // the tail goes
            int32_t n_seen = sequences[s].n_seen;
            int64_t removed[kvmerge_observer::n_modalities] = {};

            const auto & seq_pos = cells.seq_pos_get(s);
            const auto   tail    = seq_pos.lower_bound({ p0, 0 });

            for (auto it = tail; it != seq_pos.end(); ++it) {
                const auto & token = tokens[it->second];

                n_seen = std::min(n_seen, token.order);
                removed[token.modality]++;
            }

            const bool is_cut = p0 < sequences[s].pos_merged;

            if (is_cut) {
                // its cells stand for more tokens than those that they are called after
                n_seen = std::distance(seq_pos.begin(), tail);

                for (int m = 0; m < kvmerge_observer::n_modalities; ++m) {
                    removed[m] = observer.count(s, m);
                }
                for (auto it = seq_pos.begin(); it != tail; ++it) {
                    removed[tokens[it->second].modality]--;
                }

                sequences[s].pos_merged = 0;
                sequences[s].pos_whole  = 0;
            }

            if (n_seen < sequences[s].n_seen) {
                const auto & left = tokens[std::prev(tail)->second]; // the last one

                sequences[s].n_seen = n_seen;

                // as if what goes had never been read; else whatever comes now is not part of what was cut
                sequences[s].segment  = is_cut ? left.segment  : sequences[s].segment + 1;
                sequences[s].modality = is_cut ? left.modality : sequences[s].modality;

                observer.truncate(s, n_seen, removed);
            }
        }
    }

    return true;
}

void kvmerge_engine::forget(llama_seq_id seq_id) {
    sequences[seq_id] = {};
    observer.clear(seq_id);
}

void kvmerge_engine::on_seq_keep(llama_seq_id seq_id) {
    for (size_t s = 0; s < sequences.size(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            forget(s);
        }
    }
}

void kvmerge_engine::on_seq_move(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const std::function<llama_pos(llama_pos)> & move) {
    auto & end = sequences[seq_id].pos_merged;

    if (p0 >= end) {
        return;
    }

    sequences[seq_id].pos_whole = 0; // what moves may come to lie below it

    // where the last merged position that moves comes to lie; those below p0 stay
    const llama_pos moved = std::max(p0, move(std::min(p1, end) - 1) + 1);

    end = p1 >= end ? moved : std::max(end, moved);
}

void kvmerge_engine::on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    auto & dst = sequences[seq_id_dst];

    dst = sequences[seq_id_src];
    observer.copy(seq_id_src, seq_id_dst);

    const auto & cells = cache.get_cells(0);

    if (cells.seq_pos_max(seq_id_dst) < cells.seq_pos_max(seq_id_src)) {
        // only a beginning was copied
        dst.n_seen = 0;
        for (const auto & [pos, idx] : cells.seq_pos_get(seq_id_dst)) {
            dst.n_seen = std::max(dst.n_seen, tokens[idx].order + 1);
        }
    }
}
