#pragma once

// Defaults and ranges of what a policy consists of: kvmerge-options.def. kvmerge_params_default() is defined here.

#include "kvmerge.h"

// KVMERGE_ERROR_ARGUMENT, with a message that names the first one that is out of its range
kvmerge_status kvmerge_check_params(const kvmerge_params & params);
