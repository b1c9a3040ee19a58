#include "kvmerge-params.h"

#include "kvmerge-error.h"

kvmerge_status kvmerge_check_params(const kvmerge_params & params) {
    if (params.size != sizeof(kvmerge_params)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT,
                "params.size is %u, this library's kvmerge_params has %zu bytes: header and library are of different versions",
                params.size, sizeof(kvmerge_params));
    }

    const struct {
        const char * name;
        double value, min, max;
    } ranges[] = {
        { "score",       (double) params.score,       KVMERGE_SCORE_PROXY,      KVMERGE_SCORE_ALL        },
        { "allocate",    (double) params.allocate,    KVMERGE_ALLOCATE_UNIFORM, KVMERGE_ALLOCATE_EARLY   },
        { "select",      (double) params.select,      KVMERGE_SELECT_TOP,       KVMERGE_SELECT_MEDIA     },
        { "match",       (double) params.match,       KVMERGE_MATCH_NONE,       KVMERGE_MATCH_SEGMENT    },
        { "fold",        (double) params.fold,        KVMERGE_FOLD_MEAN,        KVMERGE_FOLD_GAUSSIAN    },
        { "bias",        (double) params.bias,        KVMERGE_BIAS_NONE,        KVMERGE_BIAS_FIT         },
        { "n_window",    (double) params.n_window,    1,                        256                      },
        { "n_keep",      (double) params.n_keep,      0,                        256                      },
        { "n_sink",      (double) params.n_sink,      0,                        256                      },
        { "n_flow_rows", (double) params.n_flow_rows, 1,                        65536                    },
        { "n_pool",      (double) params.n_pool,      1,                        63                       },
        { "n_floor",     (double) params.n_floor,     0,                        1024                     },
        { "n_member",    (double) params.n_member,    0,                        65536                    },
        { "theta",       params.theta,                0,                        1                        },
        { "tau",         params.tau,                  0,                        1                        },
        { "recent",      params.recent,               0,                        1                        },
        { "cover",       params.cover,                0,                        1                        },
        { "similarity",  params.similarity,           -1,                       1                        },
        { "pivots",      params.pivots,               0,                        1                        },
        { "text",        params.text,                 0,                        1                        },
        { "text_pivots", params.text_pivots,          0,                        1                        },
    };

    for (const auto & range : ranges) {
        if (!(range.value >= range.min && range.value <= range.max)) { // also catches NaN
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "%s is %g, accepted is %g to %g", range.name, range.value, range.min, range.max);
        }
    }

    return KVMERGE_OK;
}
