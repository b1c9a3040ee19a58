#pragma once

// The flags of merging, as numbers.

#include "kvmerge.h"

#include <cstdint>
#include <string>

struct common_params;

struct kvmerge_flags {
    std::string policy;

    kvmerge_params params = kvmerge_params_default();

    // what a merge keeps: a share, or a number of cells when that is 0
    double  share   = 0;
    int32_t n_cells = 0;

    // most cells, or their bytes; both 0: no limit
    int64_t n_cells_max = 0;
    int64_t n_bytes_max = 0;

    int32_t n_whole = 0; // last pictures that are left as they are

    std::string budget; // as it was given

    bool is_on() const { return !policy.empty(); }

    // Cells that a sequence is merged down to. All counts are of tokens, and those of media are without the pictures that are
    // left as they are.
    int32_t n_kept(int32_t n_text, int32_t n_media, int32_t n_segments, int32_t n_media_whole) const;
};

// throws std::invalid_argument that names the flag and what it accepts
kvmerge_flags kvmerge_read_flags(const common_params & params);
