// A filter in front of the log callback, so that what nobody wants to read does not call back.

#include "kvmerge.h"

#include "ggml.h"
#include "llama.h"

static ggml_log_callback next      = nullptr;
static void *            next_data = nullptr;
static int32_t           lowest    = GGML_LOG_LEVEL_NONE;

void kvmerge_log(int32_t level, const char * text, void * data) {
    (void) data;

    static int32_t last = GGML_LOG_LEVEL_NONE;

    // what continues a message goes where its beginning went
    if (level != GGML_LOG_LEVEL_CONT) {
        last = level;
    }
    if (last >= lowest && next) {
        next((ggml_log_level) level, text, next_data);
    }
}

static void filter(ggml_log_level level, const char * text, void * data) {
    kvmerge_log(level, text, data);
}

void kvmerge_log_from(int32_t level) {
    ggml_log_callback callback = nullptr;
    void *            data     = nullptr;

    llama_log_get(&callback, &data);

    if (callback != filter) {
        next      = callback;
        next_data = data;

        llama_log_set(filter, nullptr);
    }

    lowest = level;
}
