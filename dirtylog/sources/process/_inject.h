/* Gets a userfaultfd of another process's memory, by one system call that the process makes without knowing. */
#ifndef DIRTYLOG_INJECT_H
#define DIRTYLOG_INJECT_H

#include <stdint.h>

/* Where an attempt ended, for the error's text. */
enum dl_inject_step {
    DL_INJECT_DONE,
    DL_INJECT_HELPER,      /* clone() of the helper */
    DL_INJECT_GADGET,      /* no system call instruction was found in the target's code */
    DL_INJECT_SEIZE,       /* PTRACE_SEIZE */
    DL_INJECT_STOP,        /* the target did not stop in time */
    DL_INJECT_WORD_SIZE,   /* the target runs 32-bit code */
    DL_INJECT_REGISTERS,   /* reading or writing registers or the signal mask */
    DL_INJECT_CALL,        /* the injected system call did not come back as one */
    DL_INJECT_USERFAULTFD, /* userfaultfd in the target was refused */
    DL_INJECT_PIDFD,       /* pidfd_open or pidfd_getfd */
    DL_INJECT_DETACH,
    DL_INJECT_UNSUPPORTED, /* not on this architecture */
};

struct dl_injection {
    int pid, tid;          /* the process, and the thread of it that is stopped */
    int patience_ms;       /* how long the thread may take to stop */
    int in_process;        /* trace from this thread, not from a helper that survives us */
    int stop_at;           /* tests: the helper stops itself before this ptrace call; 0: never */
    /* the answer */
    int uffd;              /* ours, or -1 */
    int error;             /* -errno, or 0 */
    enum dl_inject_step step;
    uint64_t stopped_ns;   /* for how long the thread stood still */
    int calls;             /* ptrace calls made */
};

/* 0 or -errno, which is also in `injection`. Blocks; called without the GIL. */
int dl_inject(struct dl_injection *injection);

#endif /* DIRTYLOG_INJECT_H */
