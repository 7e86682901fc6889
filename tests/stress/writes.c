/* A program that writes known values: several threads into one mapping, and others that come, grow, move and go.
 *
 * A line on standard input is one round; one on standard output says that it is over, and that all threads wait. Which
 * pages of the mapping were written is marked in the file descriptor 3, one byte each. After "exec", it becomes itself
 * again in the middle of a round.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 4096, THREADS = 4, LARGEST = 256, HELD = 8 };

static unsigned char *memory, *marks;
static int each;
static pthread_barrier_t begin, end;

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *writer(void *number)
{
    uint64_t state = 88172645463325252u + (uintptr_t)number, value = 0;

    for (;;) {
        pthread_barrier_wait(&begin);
        for (int i = 0; i < each; i++) {
            /* A part of the pages, and another one each round: the rest is clean. */
            uint64_t page = (next(&state) % (PAGES / 8) + value / each * 97) % PAGES;

            /* Each thread has its own words: what it wrote last is what is there. */
            ((volatile uint64_t *)(memory + page * PAGE))[(uintptr_t)number * 64 + state % 64] = ++value;
            marks[page] = 1;
        }
        pthread_barrier_wait(&end);
    }
    return NULL;
}

static void *map(size_t pages)
{
    void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (at == MAP_FAILED)
        abort();
    return at;
}

/* Mappings that come, grow, move and go while the threads write. */
static void churn(uint64_t *state)
{
    static unsigned char *held[HELD];
    static size_t pages[HELD];

    for (int i = 0; i < 4; i++) {
        int k = next(state) % HELD;

        if (!held[k]) {
            pages[k] = 1 + next(state) % (LARGEST / 2);
            held[k] = map(pages[k]);
        } else if (next(state) % 3) {
            size_t more = 1 + next(state) % LARGEST;

            held[k] = mremap(held[k], pages[k] * PAGE, more * PAGE, MREMAP_MAYMOVE);
            if (held[k] == MAP_FAILED)
                abort();
            pages[k] = more;
        } else {
            munmap(held[k], pages[k] * PAGE);
            held[k] = NULL;
            continue;
        }
        for (size_t page = next(state) % 7; page < pages[k]; page += 7)
            held[k][page * PAGE + next(state) % PAGE] += 1;
    }
}

int main(int argc, char **argv)
{
    uint64_t state = 362436069u;
    char line[64];

    each = argc > 1 ? atoi(argv[1]) : 1;
    memory = map(PAGES);
    memset(memory, 1, (size_t)PAGES * PAGE);
    marks = mmap(NULL, PAGES, PROT_READ | PROT_WRITE, MAP_SHARED, 3, 0);
    if (marks == MAP_FAILED)
        abort();
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (uintptr_t i = 0; i < THREADS; i++) {
        pthread_t thread;

        pthread_create(&thread, NULL, writer, (void *)i);
    }
    printf("%llu\n", (unsigned long long)(uintptr_t)memory);
    fflush(stdout);
    for (int round = 0; fgets(line, sizeof(line), stdin); round++) {
        pid_t child = 0;

        pthread_barrier_wait(&begin);
        churn(&state);
        if (line[0] == 'e') {
            execv("/proc/self/exe", argv);
            abort();
        }
        if (round % 8 == 0 && (child = fork()) == 0) {
            memset(memory, 2, (size_t)PAGES * PAGE); /* its own copies */
            if (round % 16 == 0)
                execl("/bin/true", "true", NULL);
            _exit(0);
        }
        pthread_barrier_wait(&end);
        if (child)
            waitpid(child, NULL, 0);
        puts("over");
        fflush(stdout);
    }
    return 0;
}
