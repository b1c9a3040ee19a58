#pragma once

// What the functions cut out of upstream's sources (supports_op.py) find included there.

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <regex>
#include <string>
#include <type_traits>

// None of these is called for what the engine builds: what they decide is only asked for other operations, or comes after
// what decides about ours.
#define NOT_ASKED(...) { GGML_ABORT("what the engine builds was not expected to ask for this"); }
