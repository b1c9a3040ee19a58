#include "kvmerge-params.h"

#include "kvmerge-error.h"

struct kvmerge_params kvmerge_params_default(void) {
    kvmerge_params params = {};

    params.size = sizeof(kvmerge_params);

#define KVMERGE_OPTION(type, field, preset, ...) params.field = (type) (preset);
#include "kvmerge-options.def"

    return params;
}

// choices that would do nothing beside each other are refused instead
static kvmerge_status check_together(const kvmerge_params & params) {
    const bool has_groups = params.select == KVMERGE_SELECT_MOSAIC || params.select == KVMERGE_SELECT_RUNS || params.select == KVMERGE_SELECT_MEDIA;
    const bool is_inside  = params.match == KVMERGE_MATCH_SEGMENT || params.match == KVMERGE_MATCH_NONE;

    if (has_groups && (!is_inside || params.tau != 1)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "match is %d and tau %g: select %d forms its own groups, inside a segment, accepted are match %d or %d and tau 1",
                params.match, params.tau, params.select, KVMERGE_MATCH_SEGMENT, KVMERGE_MATCH_NONE);
    }
    if (params.score == KVMERGE_SCORE_POSITION && params.value_norm) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "value_norm is true: a score by position is multiplied with nothing, accepted is false");
    }
    if (params.n_pool % 2 == 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_pool is %d, accepted is an odd number: the token itself and as many on each side", params.n_pool);
    }

    return KVMERGE_OK;
}

kvmerge_status kvmerge_check_params(const kvmerge_params & params) {
    if (params.size != sizeof(kvmerge_params)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT,
                "params.size is %u, this library's kvmerge_params has %zu bytes: header and library are of different versions",
                params.size, sizeof(kvmerge_params));
    }

    const struct {
        const char * name;
        double value, least, most;
    } ranges[] = {
#define KVMERGE_OPTION(type, field, preset, least, most, ...) { #field, (double) params.field, least, most },
#include "kvmerge-options.def"
    };

    for (const auto & range : ranges) {
        if (!(range.value >= range.least && range.value <= range.most)) { // also catches NaN
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "%s is %g, accepted is %g to %g", range.name, range.value, range.least, range.most);
        }
    }

    return check_together(params);
}
