#include "kvmerge-flags.h"

#include "common.h"
#include "kvmerge-presets.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

static constexpr int64_t MIN_CELLS = 512; // room for a batch and for what is kept of the rest

// a number with nothing after it
static bool parse_number(const std::string & text, double & out) {
    size_t end = 0;
    try {
        out = std::stod(text, &end);
    } catch (const std::exception &) {
        return false;
    }

    return end == text.size() && std::isfinite(out);
}

static bool set_param(kvmerge_params & params, const std::string & name, double value) {
#define KVMERGE_OPTION(type, field, ...)                        \
    if (name == #field) {                                       \
        params.field = static_cast<type>(value);                \
        return true;                                            \
    }
#include "kvmerge-options.def"

    return false;
}

static void read_params(const std::string & text, kvmerge_params & params) {
    for (const auto & item : string_split<std::string>(text, ',')) {
        const size_t equal = item.find('=');

        double value = 0;
        if (equal == std::string::npos || !parse_number(item.substr(equal + 1), value) || !set_param(params, item.substr(0, equal), value)) {
            throw std::invalid_argument(string_format(
                    "--kv-merge-params: '%s' is not a field of struct kvmerge_params with a number, such as n_window=16", item.c_str()));
        }
    }
}

static void read_budget(const std::string & text, kvmerge_flags & flags) {
    const bool is_share = text.find('.') != std::string::npos || text.find('e') != std::string::npos;

    double value = 0;
    if (parse_number(text, value)) {
        if (is_share && value > 0 && value <= 1) {
            flags.share = value;
            return;
        }
        if (!is_share && value >= 1 && value <= INT32_MAX) {
            flags.n_cells = (int32_t) value;
            return;
        }
    }

    throw std::invalid_argument(string_format(
            "--kv-budget %s: it is what is kept, either a share in (0, 1] with a point, such as 0.2 or 1.0, or a whole number of cells", text.c_str()));
}

static void read_cap(const std::string & text, kvmerge_flags & flags) {
    static const struct {
        const char * name;
        double       factor;
    } units[] = { { "KiB", 1024.0 }, { "MiB", 1024.0*1024.0 }, { "GiB", 1024.0*1024.0*1024.0 }, { "KB", 1e3 }, { "MB", 1e6 }, { "GB", 1e9 } };

    if (text.empty()) {
        return;
    }

    double value = 0;
    if (parse_number(text, value) && value >= MIN_CELLS && value <= INT32_MAX && value == std::floor(value)) {
        flags.n_cells_max = (int64_t) value;
        return;
    }

    for (const auto & unit : units) {
        const std::string name = unit.name;

        if (text.size() > name.size() && text.compare(text.size() - name.size(), name.size(), name) == 0 &&
                parse_number(text.substr(0, text.size() - name.size()), value) && value > 0 && value*unit.factor < 9e18) {
            flags.n_bytes_max = (int64_t) (value*unit.factor);
            return;
        }
    }

    throw std::invalid_argument(string_format(
            "--kv-max-cells %s: it is a whole number of cells of at least %d, or bytes such as 512MiB or 1.5GB", text.c_str(), (int) MIN_CELLS));
}

// the settings of a policy by its name
static std::string preset(const std::string & name) {
    std::string names;

    for (const auto & cur : KVMERGE_PRESETS) {
        if (name == cur.name) {
            return cur.settings;
        }
        names += names.empty() ? cur.name : std::string(", ") + cur.name;
    }

    throw std::invalid_argument(string_format("--kv-merge %s: it is none, or one of %s", name.c_str(), names.c_str()));
}

kvmerge_flags kvmerge_read_flags(const common_params & params) {
    kvmerge_flags flags;

    if (params.kv_merge.empty() || params.kv_merge == "none") {
        if (!params.kv_max_cells.empty() || params.keep_last_images != 0) {
            throw std::invalid_argument(string_format("%s needs --kv-merge: say how to merge",
                    params.kv_max_cells.empty() ? "--keep-last-images" : "--kv-max-cells"));
        }

        return flags;
    }

    flags.policy = params.kv_merge;
    flags.budget = params.kv_budget;

    read_params(params.kv_merge_params.empty() ? preset(params.kv_merge) : params.kv_merge_params, flags.params);
    read_budget(params.kv_budget,       flags);
    read_cap   (params.kv_max_cells,    flags);

    if (params.keep_last_images < 0) {
        throw std::invalid_argument(string_format("--keep-last-images %d: accepted is 0 and more", params.keep_last_images));
    }
    flags.n_whole = params.keep_last_images;

    if (flags.share == 1.0 && params.kv_max_cells.empty()) {
        flags.policy.clear(); // there is nothing to merge, ever
    }

    return flags;
}

int32_t kvmerge_flags::n_kept(int32_t n_text, int32_t n_media, int32_t n_segments, int32_t n_media_whole) const {
    // as a decimal, not as a binary fraction: 0.2 of 10 tokens is 2 cells, not 3
    const auto part_of = [&](int32_t n, int32_t n_min) {
        return std::min(n, share > 0 ? std::max((int32_t) std::ceil(share*n - 1e-6), n_min) : n_cells);
    };

    // what stays as it is comes on top of a share; a number of cells is what was asked for
    if (share == 0) {
        n_media       += n_media_whole;
        n_media_whole  = 0;
    }

    if (params.select == KVMERGE_SELECT_MEDIA) {
        return n_media_whole + n_text + part_of(n_media, n_segments*params.n_floor);
    }

    return n_media_whole + part_of(n_text + n_media, params.n_sink + (params.n_keep > 0 ? params.n_keep : params.n_window));
}
