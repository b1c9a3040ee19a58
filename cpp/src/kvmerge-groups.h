#pragma once

// groups: the cells that each pivot of a plan stands for.

#include "kvmerge-plan.h"

// Group c is index[first[c]], ..., index[first[c + 1] - 1]: pivot[c] and all that goes into it, in the order of the cells.
struct kvmerge_groups {
    std::vector<int32_t> pivot; // [B] ascending
    std::vector<int32_t> first; // [B + 1]
    std::vector<int32_t> index;
};

kvmerge_groups kvmerge_make_groups(const kvmerge_plan & plan);
