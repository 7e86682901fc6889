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
    DL_INJECT_KEEPER,      /* clone() of a process that keeps the memory */
    DL_INJECT_DETACH,
    DL_INJECT_UNSUPPORTED, /* not on this architecture */
};

struct dl_injection {
    int pid, tid;          /* the process, and the thread of it that is stopped */
    int patience_ms;       /* how long the thread may take to stop */
    int in_process;        /* trace from this thread, not from a helper that survives us */
    int keep;              /* also make a keeper; the target is our child, and this thread traces */
    int stop_at;           /* tests: the helper stops itself before this ptrace call; 0: never */
    /* the answer */
    int uffd;              /* ours, or -1 */
    int keeper;            /* the process that keeps the memory, or 0 */
    int error;             /* -errno, or 0 */
    enum dl_inject_step step;
    uint64_t stopped_ns;   /* for how long the thread stood still */
    int calls;             /* ptrace calls made */
};

/* 0 or -errno, which is also in `injection`. Blocks; called without the GIL. */
int dl_inject(struct dl_injection *injection);

/* Give back what an injection has got: the descriptor, and the keeper. */
void dl_let_go(struct dl_injection *injection);

/* ---- the steps, for who stops the thread in another way: all return 0 or -errno ---- */

struct user_regs_struct;

/* ptrace(2) of the injection's thread; -1 and errno. */
long dl_tracer(struct dl_injection *in, long request, void *address, void *data);
/* The address of a system call instruction in the target's code. */
int dl_find_gadget(int pid, uint64_t *gadget);
/* CLOCK_MONOTONIC, in nanoseconds: what deadlines are counted in. */
uint64_t dl_now_ns(void);
/* Wait for the thread's next stop; -ETIMEDOUT when it does not come, -ESRCH when the thread is gone. */
int dl_next_stop(struct dl_injection *in, uint64_t deadline, int *status);
/* Go on until the stop that PTRACE_INTERRUPT asks for. */
int dl_until_interrupted(struct dl_injection *in, uint64_t deadline);
/* Let the stopped thread make one system call; -EPROTO when it did something else. */
int dl_make_call(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget, uint64_t deadline,
                 long number, long first, long second, long *answer);
int dl_take_userfaultfd(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget,
                        uint64_t deadline, int pidfd);
int dl_take_keeper(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget, uint64_t deadline);

/* Stop a thread, and let it go: no step of an injection (_stops.c). */
int dl_hold(int tid, int patience_ms);
int dl_let_run(int tid);

#endif /* DIRTYLOG_INJECT_H */
