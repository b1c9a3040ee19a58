#pragma once

// The ranges of the numbers that a policy consists of.

#include "kvmerge.h"

// KVMERGE_ERROR_ARGUMENT, with a message that names the first one that is out of its range
kvmerge_status kvmerge_check_params(const kvmerge_params & params);
