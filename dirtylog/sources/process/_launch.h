/* Starts a program as our child, watched from a moment of its start on. */
#ifndef DIRTYLOG_LAUNCH_H
#define DIRTYLOG_LAUNCH_H

#include "sources/process/_inject.h"

struct dl_launch {
    char **words;           /* the program and its arguments, ended by NULL */
    char **begins;          /* NULL, or parts of paths, ended by NULL: the watch begins when the program has read one;
                               after "!", when it was opened without O_CLOEXEC, as Python opens a script to run it */
    struct dl_injection in; /* pid, uffd, keeper, error and step are the answer */
    int refused;            /* errno of execvp, or 0 */
    int ended;              /* it ended before the watch began; `status` is that of waitpid */
    int status;
};

/* 0 with the program stopped and `in` filled in, or with `ended`; else -errno and no program is left. The calling
 * thread traces it until dl_launch_go. */
int dl_launch(struct dl_launch *launch);

/* Let the program run, untraced. */
int dl_launch_go(int pid);

/* Whether two processes share their memory: 1, 0, or -errno. */
int dl_same_memory(int pid, int other);

/* Pass signals that somebody sends to us on to our child, until it is called with 0. Those that a terminal sends, it
 * sends to the child too. 0 or -errno. */
int dl_pass_signals(int pid);

#endif /* DIRTYLOG_LAUNCH_H */
