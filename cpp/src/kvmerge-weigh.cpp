#include "kvmerge-weigh.h"

#include "kvmerge-groups.h"
#include "kvmerge-vectors.h"

#include <algorithm>
#include <cmath>
#include <map>

// a bias beyond e^8 would let one cell drown all others on a query that was not measured
static constexpr float MAX_BIAS = 8.0f;

void kvmerge_unfold(kvmerge_plan & plan) {
    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.fate[i] == KVMERGE_FOLDED) {
            plan.fate  [i] = KVMERGE_DROPPED;
            plan.target[i] = -1;
        }
    }
}

void kvmerge_limit(kvmerge_plan & plan, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    if (!plan.similarity.empty()) {
        float threshold = params.similarity;

        if (params.fold == KVMERGE_FOLD_EXP) {
            // D2O: a moving average over the merges; the mean of this one is its first value
            double  sum   = 0;
            int32_t count = 0;
            for (int32_t i = 0; i < n; ++i) {
                if (plan.fate[i] == KVMERGE_FOLDED) {
                    sum += plan.similarity[i];
                    count++;
                }
            }
            threshold = std::max(threshold, count > 0 ? (float) (sum/count) : -1.0f);
        }

        for (int32_t i = 0; i < n; ++i) {
            if (plan.fate[i] == KVMERGE_FOLDED && plan.similarity[i] < threshold) {
                plan.fate  [i] = KVMERGE_DROPPED;
                plan.target[i] = -1;
            }
        }
    }

    if (params.n_member > 0) {
        std::map<int32_t, std::vector<int32_t>> members;
        for (int32_t i = 0; i < n; ++i) {
            if (plan.fate[i] == KVMERGE_FOLDED) {
                members[plan.target[i]].push_back(i);
            }
        }

        for (auto & [pivot, list] : members) {
            // the most similar stay, or the first where similarity was not measured
            if (!plan.similarity.empty()) {
                std::stable_sort(list.begin(), list.end(), [&](int32_t a, int32_t b) { return plan.similarity[a] > plan.similarity[b]; });
            }
            for (size_t i = params.n_member; i < list.size(); ++i) {
                plan.fate  [list[i]] = KVMERGE_DROPPED;
                plan.target[list[i]] = -1;
            }
        }
    }
}

void kvmerge_residual_cells(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    if (params.residual == KVMERGE_RESIDUAL_NONE) {
        return;
    }

    const int32_t n = plan.cells.size();

    const auto key = [&](int32_t i) { return params.residual == KVMERGE_RESIDUAL_SEGMENT ? plan.cells[i].segment : 0; };

    const auto leftovers = [&]() {
        std::map<int32_t, std::vector<int32_t>> res;
        for (int32_t i = 0; i < n; ++i) {
            if (plan.fate[i] == KVMERGE_DROPPED && plan.cells[i].mass > 0) {
                res[key(i)].push_back(i);
            }
        }
        return res;
    };

    // room: pivots with nothing folded into them, the least important first
    std::vector<int32_t> n_members(n);
    for (int32_t i = 0; i < n; ++i) {
        if (plan.target[i] >= 0) {
            n_members[plan.target[i]]++;
        }
    }

    std::vector<int32_t> candidates;
    for (int32_t i : plan.kept) {
        if (plan.fate[i] == KVMERGE_KEPT && n_members[i] == 1) {
            candidates.push_back(i);
        }
    }
    std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) { return plan.score[a] < plan.score[b]; });

    int32_t n_kept = plan.kept.size();

    auto groups = leftovers();

    for (int32_t i : candidates) {
        if (n_kept + (int32_t) groups.size() <= n_cells) {
            break;
        }
        plan.fate  [i] = KVMERGE_DROPPED;
        plan.target[i] = -1;
        groups[key(i)].push_back(i);
        n_kept--;
    }

    for (auto & [segment, list] : leftovers()) {
        if (n_kept >= n_cells) {
            break;
        }

        const int32_t pivot = list.back();

        for (int32_t i : list) {
            plan.target[i] = pivot;
            plan.fate  [i] = i == pivot ? KVMERGE_KEPT : KVMERGE_FOLDED;
        }
        n_kept++;
    }

    plan.kept.clear();
    for (int32_t i = 0; i < n; ++i) {
        if (plan.target[i] == i) {
            plan.kept.push_back(i);
        }
    }
}

void kvmerge_weigh(kvmerge_plan & plan, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    std::vector<double> sum  (n);
    std::vector<double> count(n);

    for (int32_t i = 0; i < n; ++i) {
        if (plan.target[i] >= 0) {
            count[plan.target[i]] += 1;
        }
    }

    plan.weight.assign(n, 0.0f);

    for (int32_t i = 0; i < n; ++i) {
        const int32_t p = plan.target[i];
        if (p < 0) {
            continue;
        }

        double w = 1;

        switch (params.fold) {
            case KVMERGE_FOLD_MEAN:
                break;
            case KVMERGE_FOLD_PIVOT:
                // the mean of the pivot and of the midpoints: every member counts half, the pivot 1 + (members)/2
                w = p == i ? 1 + 0.5*(count[p] - 1) : 0.5;
                break;
            case KVMERGE_FOLD_WEIGHTED:
                w = p == i ? 1 : std::max(0.0f, plan.similarity[i]);
                break;
            case KVMERGE_FOLD_EXP:
                w = p == i ? 1 : std::exp(plan.similarity[i] - 1.0);
                break;
            case KVMERGE_FOLD_GAUSSIAN:
                // of unit keys: their squared distance is 2 - 2 cos; sigma^2 = 1/2
                w = p == i ? 1 : std::exp(-2.0*(1.0 - plan.similarity[i]));
                break;
            case KVMERGE_FOLD_SCORE:
                // the score is the attention of the whole cell: its mass is in it
                w = std::max(1e-12f, plan.score[i])/plan.cells[i].mass;
                break;
        }

        plan.weight[i] = w*plan.cells[i].mass;
        sum[p] += plan.weight[i];
    }

    for (int32_t i = 0; i < n; ++i) {
        const int32_t p = plan.target[i];
        if (p >= 0) {
            plan.weight[i] = count[p] == 1 ? 1.0f : (float) (plan.weight[i]/sum[p]);
        }
    }
}

// For the queries of a tile, group by group of several members:
//   rest [n_groups][KVMERGE_TILE]  largest logit of the group less that of its new key
//   sum  [n_groups][KVMERGE_TILE]  sum of e^(logit less the largest)
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void compare_tile(const kvmerge_plan & plan, const kvmerge_groups & groups, bool move_keys, const float * tile, float * rest, float * sum) {
    constexpr int N_LANES = sizeof(vec_f)/sizeof(float);

    for (size_t c = 0; c < plan.kept.size(); ++c) {
        const int32_t j0 = groups.first[c];
        const int32_t j1 = groups.first[c + 1];

        if (j1 - j0 == 1) {
            continue;
        }

        for (int l = 0; l < KVMERGE_TILE; l += N_LANES) {
            const auto logit = [&](int32_t i, vec_f & x) { memcpy(&x, tile + (int64_t) i*KVMERGE_TILE + l, sizeof(x)); };

            vec_f x;
            vec_f own = {};
            vec_f max = vec_f {} - INFINITY;

            for (int32_t j = j0; j < j1; ++j) {
                const int32_t i = groups.index[j];

                // the logit of a moved key is the weighted mean of the logits, because it is linear in the key
                logit(i, x);
                own += plan.weight[i]*x;
                x   += plan.cells[i].bias;
                kvmerge_max(max, x);
            }

            vec_f all = {};

            for (int32_t j = j0; j < j1; ++j) {
                const int32_t i = groups.index[j];

                logit(i, x);
                x += plan.cells[i].bias - max;
                kvmerge_exp(x);
                all += x;
            }

            if (!move_keys) {
                logit(plan.kept[c], own);
            }

            max -= own;
            memcpy(rest + c*KVMERGE_TILE + l, &max, sizeof(max));
            memcpy(sum  + c*KVMERGE_TILE + l, &all, sizeof(all));
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(compare_groups, compare_tile,
        (const kvmerge_plan & plan, const kvmerge_groups & groups, bool move_keys, const float * tile, float * rest, float * sum),
        (plan, groups, move_keys, tile, rest, sum))

// log(sum of exp(logits of a group)) - logit of its new key, as the mean over the proxies
static void fit_bias(kvmerge_plan & plan, const kvmerge_groups & groups, bool move_keys, int32_t first, int32_t step) {
    const size_t n_groups = plan.kept.size();

    std::vector<float> rest(n_groups*KVMERGE_TILE);
    std::vector<float> sum (n_groups*KVMERGE_TILE);

    std::vector<double>  total(n_groups);
    std::vector<int32_t> count(n_groups);

    for (int32_t q0 = 0; q0 < plan.n_queries; q0 += KVMERGE_TILE) {
        compare_groups(plan, groups, move_keys, plan.tile(q0/KVMERGE_TILE), rest.data(), sum.data());

        for (size_t c = 0; c < n_groups; ++c) {
            if (groups.first[c + 1] - groups.first[c] == 1) {
                continue;
            }

            // one logarithm for all: each sum is between 1 and the number of members
            double product = 1;

            for (int32_t q = q0; q < std::min(q0 + KVMERGE_TILE, plan.n_queries); ++q) {
                const float cur = rest[c*KVMERGE_TILE + q - q0];

                if (q >= first && (q - first) % step == 0 && std::isfinite(cur)) {
                    total[c] += cur;
                    product  *= sum[c*KVMERGE_TILE + q - q0];
                    count[c]++;
                }
            }

            total[c] += std::log(product);
        }
    }

    for (size_t c = 0; c < n_groups; ++c) {
        if (count[c] > 0) {
            plan.bias[c] = std::min<double>(MAX_BIAS, std::max<double>(-MAX_BIAS, total[c]/count[c]));
        }
    }
}

void kvmerge_fit_bias(kvmerge_plan & plan, const kvmerge_params & params, int32_t first, int32_t step) {
    plan.bias.assign(plan.kept.size(), 0.0f);

    if (params.bias == KVMERGE_BIAS_NONE) {
        return;
    }

    const auto groups = kvmerge_make_groups(plan);

    for (size_t c = 0; c < plan.kept.size(); ++c) {
        const int32_t p = plan.kept[c];

        if (groups.first[c + 1] - groups.first[c] == 1) {
            plan.bias[c] = plan.cells[p].bias;
            continue;
        }

        double mass  = 0;
        double score = 0;
        for (int32_t j = groups.first[c]; j < groups.first[c + 1]; ++j) {
            mass  += plan.cells[groups.index[j]].mass;
            score += plan.score[groups.index[j]];
        }

        if (params.bias == KVMERGE_BIAS_MASS) {
            // what the pivot gave stays its own: its bias is part of its score
            const double ratio = plan.score[p] > 0 ? score/plan.score[p] : mass;

            plan.bias[c] = plan.cells[p].bias + std::min(3.0, std::max(0.0, std::log(ratio)));
        } else {
            plan.bias[c] = std::log(mass); // also where nothing can be fitted
        }
    }

    if (params.bias == KVMERGE_BIAS_FIT) {
        fit_bias(plan, groups, params.move_keys, first, step);
    }
}
