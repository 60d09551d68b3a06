/* Calls of the pool from several threads at once: each index once, and its result seen by the
 * caller. Exits with 1 where that is not so; a race is the sanitizer's to find. */
#include "pool.h"

#include <pthread.h>
#include <stdio.h>

enum { CALLERS = 4, CALLS = 2000, COUNT = 7 };

static void add(void *context, Py_ssize_t index) { ((long *)context)[index] += index + 1; }

static void *call(void *failed) {
    for (int i = 0; i < CALLS; i++) {
        long sums[COUNT] = {0};
        pool_run(add, sums, COUNT, 1 + i % 5);
        for (Py_ssize_t index = 0; index < COUNT; index++)
            if (sums[index] != index + 1) *(int *)failed = 1;
    }
    return NULL;
}

int main(void) {
    pthread_t callers[CALLERS];
    int failed[CALLERS] = {0}, any = 0;
    for (int i = 0; i < CALLERS; i++)
        if (pthread_create(&callers[i], NULL, call, &failed[i])) return 2;
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(callers[i], NULL);
        any |= failed[i];
    }
    puts("all calls have returned");
    return any;
}
