#pragma once

// score, second part: what is done to the importance before it ranks the cells.

#include "kvmerge-plan.h"

// Multiplies the scores with the value norms when params.value_norm is set, then pools each over its n_pool
// neighbours of the same segment (SnapKV pools; pooling across the border of a picture would favour its edges).
void kvmerge_pool(kvmerge_plan & plan, const kvmerge_params & params);
