#pragma once

#include "kvmerge-engine.h"

// Values of the given cells for one KV head, however V lies in memory: F32 [n_embd_head_v, n]
ggml_tensor * kvmerge_build_values(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
              int32_t                 head);
