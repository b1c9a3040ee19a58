#pragma once

// Failures on demand, for tests: every allocation of buffers and every graph computation of the engine passes here.

// true: this one fails, as a test asked for by kvmerge_fail_at()
bool kvmerge_fails();

// the same for allocations that throw: std::bad_alloc
void kvmerge_may_fail();
