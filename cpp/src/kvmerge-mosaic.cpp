#include "kvmerge-mosaic.h"

#include "kvmerge-keys.h"
#include "kvmerge-parallel.h"
#include "kvmerge-select.h"
#include "kvmerge-vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

// longer segments are cut: the distances of a block are as many as its groups times its tokens
static constexpr size_t MAX_BLOCK = 256;

// tokens whose distances are taken at once
static constexpr int32_t N_COLUMNS = 32;

// scratch for the keys of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 4*1024*1024;

namespace {

// tokens of one segment that share n_groups cells
struct mosaic_block {
    std::vector<int32_t> member; // indices into the plan
    int32_t              n_groups = 0;
    int32_t              n_floor  = 0;
};

struct mosaic_job {
    kvmerge_plan            * plan;
    std::vector<mosaic_block> blocks;
    int64_t                   first; // row of its first member among the keys of all jobs
};

} // namespace

// n_cells over the blocks in proportion to the tokens that their members stand for, each at least its floor and at most its
// members: a picture that was merged before gets what it got then, and not less with every picture that comes after it
static void share_cells(const kvmerge_plan & plan, std::vector<mosaic_block> & blocks, int32_t n_cells) {
    int32_t n_left = n_cells;
    double  n_all  = 0; // tokens

    std::vector<double> n_tokens;
    for (auto & block : blocks) {
        block.n_groups = std::min<int32_t>({ block.n_floor, (int32_t) block.member.size(), n_left });
        n_left -= block.n_groups;

        n_tokens.push_back(0);
        for (int32_t i : block.member) {
            n_tokens.back() += plan.cells[i].mass;
        }
        n_all += n_tokens.back();
    }

    // largest remainders of what is above the floor
    std::vector<double> want(blocks.size());
    for (size_t b = 0; b < blocks.size(); ++b) {
        want[b] = n_all > 0 ? n_cells*n_tokens[b]/n_all - blocks[b].n_groups : 0;
    }

    while (n_left > 0) {
        int32_t best = -1;
        for (size_t b = 0; b < blocks.size(); ++b) {
            if ((size_t) blocks[b].n_groups < blocks[b].member.size() && (best < 0 || want[b] > want[best])) {
                best = b;
            }
        }
        if (best < 0) {
            break;
        }

        blocks[best].n_groups++;
        want[best] -= 1;
        n_left--;
    }
}

// Text or media tokens that are not forced, cut into blocks by segment. All text is one: the same words come again and
// again between pictures, and what is alike may share a cell wherever it stands. Pictures stay apart.
static std::vector<mosaic_block> make_blocks(const kvmerge_plan & plan, bool text, int32_t n_floor) {
    std::map<int32_t, mosaic_block> segments;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        const auto & cell = plan.cells[i];

        if (plan.is_left(i) && (cell.modality == KVMERGE_TEXT) == text) {
            segments[text ? 0 : cell.segment].member.push_back(i);
        }
    }

    std::vector<mosaic_block> res;

    for (auto & [segment, whole] : segments) {
        const size_t n_blocks = (whole.member.size() + MAX_BLOCK - 1)/MAX_BLOCK;

        for (size_t b = 0; b < n_blocks; ++b) {
            mosaic_block block;
            block.member.assign(
                    whole.member.begin() + b*whole.member.size()/n_blocks, whole.member.begin() + (b + 1)*whole.member.size()/n_blocks);
            block.n_floor = b == 0 ? n_floor : 0;
            res.push_back(std::move(block));
        }
    }

    return res;
}

// the n highest scores among the members of the blocks stay as they are
static void keep_pivots(kvmerge_plan & plan, std::vector<mosaic_block> & blocks, int32_t n) {
    std::vector<int32_t> all;
    for (const auto & block : blocks) {
        all.insert(all.end(), block.member.begin(), block.member.end());
    }
    kvmerge_select_best(plan, all, n);

    for (int32_t i = 0; i < std::min<int32_t>(n, all.size()); ++i) {
        plan.protect(all[i]);
    }

    for (auto & block : blocks) {
        auto & member = block.member;
        member.erase(std::remove_if(member.begin(), member.end(), [&](int32_t i) { return plan.is_kept(i); }), member.end());
    }
}

// squared distances of n columns from a key
template <typename vec_f, typename /*vec_i*/>
KVMERGE_INLINE void columns_from(const float * columns, const float * key, int64_t n, int64_t d, float * distance) {
    constexpr int N_VECS = N_COLUMNS*sizeof(float)/sizeof(vec_f);

    for (int64_t i = 0; i < n; i += N_COLUMNS) {
        vec_f sum[N_VECS] = {};

        for (int64_t e = 0; e < d; ++e) {
            vec_f x[N_VECS];
            memcpy(x, columns + i*d + e*N_COLUMNS, sizeof(x));

            for (int c = 0; c < N_VECS; ++c) {
                x[c]   -= key[e];
                sum[c] += x[c]*x[c];
            }
        }

        memcpy(distance + i, sum, sizeof(sum));
    }
}

KVMERGE_FOR_EACH_WIDTH(distances, columns_from,
        (const float * columns, const float * key, int64_t n, int64_t d, float * distance), (columns, key, n, d, distance))

namespace {

// Groups of a block: farthest-point seeds, starting from the highest score; every member belongs to its nearest seed. What
// stands for many tokens counts as so many: squared distances are times its mass, so that what was merged before is not
// averaged again and again before anything new is.
class mosaic_groups {
public:
    //   keys  [n][d] of the n members
    mosaic_groups(const kvmerge_plan & plan, const mosaic_block & block, const float * keys, int64_t d) :
            member(block.member), keys(keys), d(d), mass(block.member.size()), columns(padded(block.member.size())*d),
            nearest(block.member.size(), std::numeric_limits<float>::infinity()), distance(padded(block.member.size())),
            seed_of(block.member.size()) {
        for (size_t i = 0; i < member.size(); ++i) { // [n_padded/N_COLUMNS][d][N_COLUMNS]
            for (int64_t e = 0; e < d; ++e) {
                columns.data()[(i/N_COLUMNS*d + e)*N_COLUMNS + i % N_COLUMNS] = keys[i*d + e];
            }
            if (plan.score[member[i]] > plan.score[member[seed]]) {
                seed = i;
            }
            mass[i] = plan.cells[member[i]].mass;
        }
    }

    // one more seed: the member that is farthest from its own one
    void grow() {
        distances(columns.data(), keys + seed*d, member.size(), d, distance.data());
        distance[seed] = -1.0f;

        for (size_t i = 0; i < member.size(); ++i) {
            if (distance[i] < nearest[i]) {
                nearest[i] = distance[i];
                seed_of[i] = seed;
            }
        }

        seed = 0;
        for (size_t i = 1; i < member.size(); ++i) {
            if (nearest[i]*mass[i] > nearest[seed]*mass[seed]) {
                seed = i;
            }
        }
    }

    // squared distance times mass of the member that is farthest from its seed: infinite without seeds, negative when all
    // members are seeds
    float radius() const {
        return nearest[seed]*mass[seed];
    }

    void fold(kvmerge_plan & plan) const {
        for (size_t i = 0; i < member.size(); ++i) {
            plan.fold(member[i], member[seed_of[i]]);
        }
    }

private:
    static int64_t padded(int64_t n) {
        return (n + N_COLUMNS - 1)/N_COLUMNS*N_COLUMNS;
    }

    const std::vector<int32_t> & member;
    const float                * keys;
    const int64_t                d;

    std::vector<float>     mass;
    kvmerge_aligned_floats columns;
    std::vector<float>     nearest;
    std::vector<float>     distance;
    std::vector<int32_t>   seed_of;

    size_t seed = 0; // the next one
};

} // namespace

// As many groups as the blocks have been given. Those of several blocks are shared out as the content wants it: the next
// one goes where a member is farthest from its seed, so that what is averaged is about equally alike everywhere.
//   keys  of the members of all blocks, one block after the other
static void make_groups(kvmerge_plan & plan, const std::vector<mosaic_block> & blocks, const float * keys, int64_t d) {
    std::vector<mosaic_groups> groups;

    int32_t n_left = 0;

    for (const auto & block : blocks) {
        groups.emplace_back(plan, block, keys, d);
        keys   += block.member.size()*d;
        n_left += block.n_groups;

        // the floor first, which may be none where a block is the rest of a picture
        for (int32_t g = 0; g < std::min(blocks.size() > 1 ? block.n_floor : block.n_groups, block.n_groups); ++g) {
            groups.back().grow();
            n_left--;
        }
    }

    const auto by_radius = [](const mosaic_groups & a, const mosaic_groups & b) { return a.radius() < b.radius(); };

    for (; n_left > 0; --n_left) {
        std::max_element(groups.begin(), groups.end(), by_radius)->grow();
    }

    for (const auto & group : groups) {
        group.fold(plan);
    }
}

// Cells for text: all of it while it fits in its share, else at least twice its proportional share. Pictures keep their
// floor and an eighth of their proportional share, so that a long text does not take everything.
static int32_t text_cells(const kvmerge_plan & plan, int32_t n_free, int32_t n_media_floor, float share) {
    int32_t n_text = 0;
    int32_t n_all  = 0;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.is_left(i)) {
            n_all  += 1;
            n_text += plan.cells[i].modality == KVMERGE_TEXT;
        }
    }

    if (n_text == n_all) {
        return std::min(n_free, n_text);
    }

    const int32_t fair  = 2*(int64_t) n_free*n_text/n_all;
    const int32_t want  = std::min(n_text, std::max(fair, (int32_t) (share*n_free)));
    const int32_t media = std::max<int32_t>(n_media_floor, (int64_t) n_free*(n_all - n_text)/n_all/8);

    return std::max(0, std::min(want, n_free - media));
}

// Text and whole pictures that stay as they are; no word is averaged with another. Where text has to shrink, half of what
// stays are the last tokens, for what is being said, and the rest its first tokens and those that get most attention.
// Returns the number of cells.
static int32_t keep_text(kvmerge_plan & plan, int32_t n_cells, int32_t n_text, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    plan.drop_all();

    int32_t n_whole = 0;

    std::vector<int32_t> text;
    for (int32_t i = 0; i < n; ++i) {
        const auto & cell = plan.cells[i];

        if (cell.mass > 0 && cell.modality == KVMERGE_TEXT) {
            text.push_back(i);
        } else if (cell.mass > 0 && cell.is_whole && n_whole < n_cells - n_text) {
            plan.protect(i);
            n_whole++;
        }
    }

    n_text = std::min<int32_t>(n_text, text.size());

    if (n_text < (int32_t) text.size()) {
        const int32_t n_sink = std::min(params.n_sink, n_text/2);
        const int32_t n_last = std::min(n_text - n_sink, std::max(kvmerge_n_keep(params), (int32_t) (params.recent*n_text)));

        std::vector<int32_t> best(text.begin() + n_sink, text.end() - n_last);
        kvmerge_select_best(plan, best, n_text - n_sink - n_last);
        best.resize(n_text - n_sink - n_last);

        best.insert(best.end(), text.begin(),        text.begin() + n_sink);
        best.insert(best.end(), text.end() - n_last, text.end());

        text = std::move(best);
    }
    for (int32_t i : text) {
        plan.protect(i);
    }

    return n_whole + n_text;
}

static int32_t count_members(const std::vector<mosaic_block> & blocks) {
    int32_t n = 0;
    for (const auto & block : blocks) {
        n += block.member.size();
    }
    return n;
}

// What of a head goes into groups, after its pivots: lists of blocks, each with the groups that it shares out. All pictures
// are one list where text is left alone; else every block is one.
static std::vector<std::vector<mosaic_block>> divide(kvmerge_plan & plan, int32_t n_free, const kvmerge_params & params) {
    const bool text_alone = params.select == KVMERGE_SELECT_MEDIA;

    for (int32_t i : plan.kept()) {
        plan.protect(i); // sinks and recent tokens stay as they are
    }

    auto text  = make_blocks(plan, true,  0);
    auto media = make_blocks(plan, false, params.n_floor);

    int32_t n_media_floor = 0;
    for (const auto & block : media) {
        n_media_floor += block.n_floor;
    }

    const int32_t n_text  = text_alone ? 0 : text_cells(plan, n_free, n_media_floor, params.text);
    const int32_t n_media = n_free - n_text;

    // the floor goes to groups before any pivot
    const int32_t n_media_groups = std::max<int32_t>(std::min(n_media, n_media_floor), std::lround(n_media*(1.0f - params.pivots)));
    const int32_t n_text_pivots  = n_text >= count_members(text) ? n_text : (int32_t) std::lround(n_text*params.text_pivots);

    keep_pivots(plan, media, n_media - n_media_groups);
    keep_pivots(plan, text,  n_text_pivots);

    share_cells(plan, media, n_media_groups);
    share_cells(plan, text,  n_text - n_text_pivots);

    std::vector<std::vector<mosaic_block>> res;

    for (auto * blocks : { &text, &media }) {
        blocks->erase(std::remove_if(blocks->begin(), blocks->end(), [](const mosaic_block & block) {
            return block.n_groups == 0 || block.member.empty();
        }), blocks->end());

        if (blocks == &media && text_alone && !media.empty()) {
            res.push_back(std::move(media));
            break;
        }
        for (auto & block : *blocks) {
            res.push_back({ std::move(block) });
        }
    }

    return res;
}

bool kvmerge_mosaic_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t                 n_cells,
              int32_t                 n_text_kept) {
    const auto & params = engine.params;

    const bool text_alone = params.select == KVMERGE_SELECT_MEDIA;

    std::vector<mosaic_job> jobs;
    std::vector<int32_t>    rows; // of the cache, for the members of all jobs

    // groups for what was collected
    const auto group = [&]() {
        if (jobs.empty()) {
            return true;
        }

        const int64_t d = layer.n_embd_head_k;

        const bool ok = kvmerge_parallel(graph, kvmerge_build_key_rows(graph, layer, rows), jobs.size(), [&](int i, const float * keys) {
            make_groups(*jobs[i].plan, jobs[i].blocks, keys + jobs[i].first*d, d);
        });

        jobs.clear();
        rows.clear();

        return ok;
    };

    // blocks of one head, whose groups are shared out among them
    const auto add = [&](int32_t h, std::vector<mosaic_block> blocks) {
        if ((int64_t) (rows.size() + count_members(blocks))*layer.n_embd_head_k > MAX_ELEMENTS && !group()) {
            return false;
        }

        const int64_t first = rows.size();
        for (const auto & block : blocks) {
            for (int32_t m : block.member) {
                rows.push_back(kvmerge_key_row(layer, cells[m], h));
            }
        }
        jobs.push_back({ &plans[h], std::move(blocks), first });

        return true;
    };

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        const int32_t n_free = n_cells - (text_alone ? keep_text(plan, n_cells, n_text_kept, params) : kvmerge_select_forced(plan, n_cells, params));

        for (auto & blocks : divide(plan, n_free, params)) {
            if (!add(h, std::move(blocks))) {
                return false;
            }
        }
    }

    return group();
}
