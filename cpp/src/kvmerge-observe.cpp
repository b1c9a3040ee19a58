#include "kvmerge-observe.h"

#include <algorithm>
#include <map>

// a fixed hash instead of a generator with state: the same prompt is sampled in the same way however it is batched
static uint64_t hash_mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30))*0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27))*0x94d049bb133111ebull;

    return x ^ (x >> 31);
}

kvmerge_observer::kvmerge_observer(int32_t n_window, int32_t n_samples, int32_t n_seq_max) :
    n_window(n_window), n_samples(n_samples), n_seq_max(n_seq_max),
    rows(n_slots()), counts(n_seq_max*n_modalities) {
}

int32_t kvmerge_observer::n_copies(int32_t n_tokens) const {
    // a token is copied at most twice: into the ring and as a sample
    return std::min(2*n_tokens, n_slots() - 1);
}

void kvmerge_observer::choose(const std::vector<int32_t> & seq, const std::vector<int32_t> & order, const std::vector<uint8_t> & modality) {
    std::map<int32_t, int32_t> taken; // slot -> token; the last one wins

    for (size_t i = 0; i < seq.size(); ++i) {
        const int32_t base = seq[i]*n_slots_seq();

        const int32_t ring = base + order[i] % n_ring();

        rows[ring]  = { order[i], modality[i] };
        taken[ring] = i;

        // reservoir sampling (algorithm R)
        const int64_t count = counts[seq[i]*n_modalities + modality[i]]++;
        const int64_t j     = count < n_samples ? count : (int64_t) (hash_mix(count*n_modalities + modality[i]) % (count + 1));

        if (j < n_samples) {
            const int32_t slot = base + n_ring() + modality[i]*n_samples + j;

            rows[slot]  = { order[i], modality[i] };
            taken[slot] = i;
        }
    }

    src.assign(n_copies(seq.size()), 0);
    dst.assign(n_copies(seq.size()), n_slots() - 1);

    size_t k = 0;
    for (const auto & [slot, token] : taken) {
        src[k] = token;
        dst[k] = slot;
        ++k;
    }
}

std::vector<int32_t> kvmerge_observer::window(int32_t seq, int32_t n_seen) const {
    std::vector<int32_t> res;

    for (int32_t order = std::max(0, n_seen - n_window); order < n_seen; ++order) {
        const int32_t slot = seq*n_slots_seq() + order % n_ring();

        if (rows[slot].order == order) {
            res.push_back(slot);
        }
    }

    return res;
}

std::vector<int32_t> kvmerge_observer::samples(int32_t seq, int32_t n_seen) const {
    std::vector<int32_t> res;

    for (int32_t i = n_ring(); i < n_slots_seq(); ++i) {
        const int32_t slot = seq*n_slots_seq() + i;

        if (rows[slot].order >= 0 && rows[slot].order < n_seen) {
            res.push_back(slot);
        }
    }

    std::sort(res.begin(), res.end(), [&](int32_t a, int32_t b) { return rows[a].order < rows[b].order; });

    return res;
}

void kvmerge_observer::clear(int32_t seq) {
    std::fill_n(rows.begin()   + seq*n_slots_seq(), n_slots_seq(), kvmerge_row {});
    std::fill_n(counts.begin() + seq*n_modalities,  n_modalities,  0);
}

void kvmerge_observer::copy(int32_t seq_src, int32_t seq_dst) {
    clear(seq_dst);

    std::copy_n(counts.begin() + seq_src*n_modalities, n_modalities, counts.begin() + seq_dst*n_modalities);
}

void kvmerge_observer::restore(int32_t seq, const int64_t * counts_new) {
    clear(seq);

    std::copy_n(counts_new, n_modalities, counts.begin() + seq*n_modalities);
}

void kvmerge_observer::truncate(int32_t seq, int32_t n_seen, const int64_t * removed) {
    for (int32_t i = 0; i < n_slots_seq(); ++i) {
        auto & row = rows[seq*n_slots_seq() + i];

        if (row.order >= n_seen) {
            row = {};
        }
    }

    for (int m = 0; m < n_modalities; ++m) {
        counts[seq*n_modalities + m] = std::max<int64_t>(0, counts[seq*n_modalities + m] - removed[m]);
    }
}
