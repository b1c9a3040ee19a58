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
        if (plan.is_folded(i)) {
            plan.drop(i);
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
                if (plan.is_folded(i)) {
                    sum += plan.similarity[i];
                    count++;
                }
            }
            threshold = std::max(threshold, count > 0 ? (float) (sum/count) : -1.0f);
        }

        for (int32_t i = 0; i < n; ++i) {
            if (plan.is_folded(i) && plan.similarity[i] < threshold) {
                plan.drop(i);
            }
        }
    }

    if (params.n_member > 0) {
        std::map<int32_t, std::vector<int32_t>> members;
        for (int32_t i = 0; i < n; ++i) {
            if (plan.is_folded(i)) {
                members[plan.target[i]].push_back(i);
            }
        }

        for (auto & [pivot, list] : members) {
            // the most similar stay, or the first where similarity was not measured
            if (!plan.similarity.empty()) {
                std::stable_sort(list.begin(), list.end(), [&](int32_t a, int32_t b) { return plan.similarity[a] > plan.similarity[b]; });
            }
            for (size_t i = params.n_member; i < list.size(); ++i) {
                plan.drop(list[i]);
            }
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

    for (size_t c = 0; c < groups.pivot.size(); ++c) {
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
                logit(groups.pivot[c], own);
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
static void fit_bias(kvmerge_plan & plan, const kvmerge_groups & groups, bool move_keys) {
    const size_t n_groups = groups.pivot.size();

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

                if (std::isfinite(cur)) {
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

void kvmerge_fit_bias(kvmerge_plan & plan, const kvmerge_params & params) {
    const auto groups = kvmerge_make_groups(plan);

    plan.bias.assign(groups.pivot.size(), 0.0f);

    if (params.bias == KVMERGE_BIAS_NONE) {
        return;
    }

    for (size_t c = 0; c < groups.pivot.size(); ++c) {
        if (groups.first[c + 1] - groups.first[c] == 1) {
            plan.bias[c] = plan.cells[groups.pivot[c]].bias;
            continue;
        }

        double mass = 0;
        for (int32_t j = groups.first[c]; j < groups.first[c + 1]; ++j) {
            mass += plan.cells[groups.index[j]].mass;
        }

        plan.bias[c] = std::log(mass); // also where nothing can be fitted
    }

    if (params.bias == KVMERGE_BIAS_FIT) {
        fit_bias(plan, groups, params.move_keys);
    }
}
