/* Threads of the process that share the work of native calls. */
#pragma once
#include "native.h"

#define MAX_THREADS 64 /* of one call */

/* Call work(context, index) for each index below `count`, on `threads` threads at most, one of
 * which is the caller's; returns when all calls have returned. Indices are taken in their order by
 * whichever thread is free, so a call must depend neither on its thread nor on other calls. A
 * caller that asks for several must not hold the interpreter, and `work` must not call it. Several
 * threads may call at once. Where no thread can be had, the caller does all the work. */
void pool_run(void (*work)(void *context, Py_ssize_t index), void *context, Py_ssize_t count,
              Py_ssize_t threads);
