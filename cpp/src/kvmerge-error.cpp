#include "kvmerge-error.h"

#include <cstdarg>
#include <cstdio>

static thread_local char g_message[1024] = "";

kvmerge_status kvmerge_error(kvmerge_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(g_message, sizeof(g_message), format, args);
    va_end(args);

    return status;
}

void kvmerge_error_clear() {
    g_message[0] = '\0';
}

const char * kvmerge_error_text() {
    return g_message;
}
