#include "kvmerge-groups.h"

kvmerge_groups kvmerge_make_groups(const kvmerge_plan & plan) {
    kvmerge_groups res;

    res.pivot = plan.kept();
    res.first.resize(res.pivot.size() + 1);

    std::vector<int32_t> group_of(plan.cells.size());
    for (size_t c = 0; c < res.pivot.size(); ++c) {
        group_of[res.pivot[c]] = c;
    }

    for (int32_t target : plan.target) {
        if (target >= 0) {
            res.first[group_of[target] + 1]++;
        }
    }
    for (size_t c = 0; c < res.pivot.size(); ++c) {
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
