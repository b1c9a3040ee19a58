#include "kvmerge-params.h"

#include "kvmerge-error.h"

struct kvmerge_params kvmerge_params_default(void) {
    kvmerge_params params = {};

    params.size = sizeof(kvmerge_params);

#define KVMERGE_OPTION(type, field, preset, ...) params.field = (type) (preset);
#include "kvmerge-options.def"

    return params;
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

    if (params.score == KVMERGE_SCORE_POSITION && params.value_norm) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "value_norm is true: a score by position is multiplied with nothing, accepted is false");
    }

    return KVMERGE_OK;
}
