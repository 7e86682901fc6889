/* A delta of memory that somebody writes meanwhile is one that the other end takes: a byte may differ when it is found,
 * and not when it is read again. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "_bits/deltas.h"

enum { PAGE = 64, ROUNDS = 12000000 };

static unsigned char page[PAGE], before[PAGE];
static int over;

static void *writes(void *unused)
{
    (void)unused;
    while (!__atomic_load_n(&over, __ATOMIC_RELAXED)) {
        __atomic_store_n(&page[0], 1, __ATOMIC_RELAXED);
        __atomic_store_n(&page[0], 0, __ATOMIC_RELAXED);
    }
    return NULL;
}

int main(void)
{
    unsigned char delta[PAGE + 64];
    const struct dl_pair next = {page, before};
    pthread_t thread;
    int failed = 0;
    if (pthread_create(&thread, NULL, writes, NULL))
        return 2;
    for (int round = 0; round < ROUNDS && !failed; round++) {
        size_t at = 0;
        before[0] = 0;
        size_t used = dl_make_delta(page, before, PAGE, delta, PAGE, &next);
        if (used && (!dl_check_delta(delta, used, &at, before, PAGE) || at != used)) {
            printf("round %d: a delta of %zu bytes is refused\n", round, used);
            failed = 1;
        }
    }
    __atomic_store_n(&over, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    return failed;
}
