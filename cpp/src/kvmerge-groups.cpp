#include "kvmerge-groups.h"

kvmerge_groups kvmerge_make_groups(const kvmerge_plan & plan) {
    std::vector<int32_t> group_of(plan.cells.size());
    for (size_t c = 0; c < plan.kept.size(); ++c) {
        group_of[plan.kept[c]] = c;
    }

    kvmerge_groups res;

    res.first.resize(plan.kept.size() + 1);
    for (int32_t target : plan.target) {
        if (target >= 0) {
            res.first[group_of[target] + 1]++;
        }
    }
    for (size_t c = 0; c < plan.kept.size(); ++c) {
        res.first[c + 1] += res.first[c];
    }

    std::vector<int32_t> next = res.first;

    res.index.resize(res.first.back());
    for (size_t i = 0; i < plan.target.size(); ++i) {
        if (plan.target[i] >= 0) {
            res.index[next[group_of[plan.target[i]]]++] = i;
        }
    }

    return res;
}
