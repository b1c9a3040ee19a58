#pragma once

#include "kvmerge.h"

// Remember the reason for an error (printf style) for kvmerge_error_message(), and return its status.
#if defined(__MINGW32__) && !defined(__clang__)
__attribute__((format(gnu_printf, 2, 3)))
#elif defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
kvmerge_status kvmerge_error(kvmerge_status status, const char * format, ...);

void         kvmerge_error_clear();
const char * kvmerge_error_text();
