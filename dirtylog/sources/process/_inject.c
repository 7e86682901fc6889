/* The order, for the thread that is borrowed:
 *
 *   1. PTRACE_SEIZE and PTRACE_INTERRUPT: it stops where it would handle signals. A system call that it was in has
 *      answered ERESTART..., which stands in its registers and is not handled yet.
 *   2. Registers and signal mask are saved; every signal is blocked, so that none is handled on registers that are not
 *      the thread's. What arrives stays pending.
 *   3. userfaultfd(2), on a system call instruction of the vDSO. orig_rax is -1: the kernel then restarts nothing.
 *      Its descriptor is taken by pidfd_getfd, and closed in the target in the same way.
 *   4. The registers are put back, orig_rax too, and the thread is stopped once more where it would handle signals:
 *      only there does the kernel restart the call of step 1.
 *   5. The mask is put back, PTRACE_DETACH. Pending signals are handled on the thread's own registers.
 *
 * Stops at system calls (PTRACE_O_TRACESYSGOOD) are used, not single steps: a step ends in a SIGTRAP that the kernel
 * forces, and forcing changes what the target has chosen for SIGTRAP where that is ignored.
 *
 * A tracer that dies between 3 and 4 leaves a thread with somebody else's registers. So the tracer is a helper: a
 * process of its own that shares our memory and descriptors, with our signals blocked and in a session of its own.
 * Killing us does not kill it; it finishes in about a millisecond and ends. Where Yama lets a parent trace its
 * children only (ptrace_scope 1), the helper is nobody's parent and is refused: then this thread traces.
 */
#define _GNU_SOURCE
#include "_inject.h"

#include <errno.h>

#if defined(__linux__) && defined(__x86_64__)

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sources/_pagemap.h"
#include "sources/process/_ptrace.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define LONG_MODE_CS 0x33
/* What a call that does not wait may take on a machine that is far too busy. */
#define CALL_NS UINT64_C(60000000000)

/* The address of a system call instruction in one executable mapping, or 0. */
static uint64_t search(int pid, uint64_t start, uint64_t end)
{
    static const size_t window = 1 << 16;
    unsigned char *code = malloc(window);
    uint64_t found = 0;

    for (uint64_t at = start; code && at + 1 < end && !found; at += window - 1) {
        size_t length = end - at < window ? end - at : window;
        struct iovec here = {code, length}, there = {(void *)(uintptr_t)at, length};

        if (process_vm_readv(pid, &here, 1, &there, 1, 0) != (ssize_t)length)
            break;
        for (size_t i = 0; i + 1 < length && !found; i++)
            if (code[i] == 0x0f && code[i + 1] == 0x05)
                found = at + i;
    }
    free(code);
    return found;
}

/* The same in the target's vDSO, which every program has unless it asked for none, else in any of its code. */
int dl_find_gadget(int pid, uint64_t *gadget)
{
    char path[64], line[512], permissions[5];
    uint64_t start, end;

    *gadget = 0;
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    for (int anywhere = 0; anywhere < 2 && !*gadget; anywhere++) {
        FILE *maps = fopen(path, "re");
        if (!maps)
            return -errno;
        while (!*gadget && fgets(line, sizeof(line), maps))
            if (sscanf(line, "%lx-%lx %4s", &start, &end, permissions) == 3 && permissions[2] == 'x' &&
                !strstr(line, "[vsyscall]") && (anywhere || strstr(line, "[vdso]")))
                *gadget = search(pid, start, end);
        fclose(maps);
    }
    return *gadget ? 0 : -ENOENT;
}

/* Let the thread make one system call; -EPROTO when it did something else. */
int dl_make_call(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget, uint64_t deadline,
                 long number, long first, long second, long *answer)
{
    struct user_regs_struct regs = *saved;

    regs.rip = gadget;
    regs.rax = (unsigned long)number;
    regs.orig_rax = (unsigned long)-1;
    regs.rdi = (unsigned long)first;
    regs.rsi = (unsigned long)second;
    regs.rdx = regs.r10 = regs.r8 = 0;
    if (dl_tracer(in, PTRACE_SETREGS, 0, &regs) < 0)
        return -errno;
    for (int stops = 0; stops < 2;) {
        int status, error, signal = 0;

        /* A stop of the whole group (SIGSTOP cannot be blocked) may come in between: it is in force again when we
         * are gone. */
        do {
            if (dl_tracer(in, PTRACE_SYSCALL, 0, (void *)(long)signal) < 0)
                return -errno;
            error = dl_next_stop(in, deadline, &status);
            if (error)
                return error;
            signal = status >> 16 ? 0 : WSTOPSIG(status);
            if (signal == (SIGTRAP | 0x80))
                break;
            if (signal && signal != SIGSTOP)
                return -EPROTO;
        } while (1);
        stops++;
    }
    if (dl_tracer(in, PTRACE_GETREGS, 0, &regs) < 0)
        return -errno;
    *answer = (long)regs.rax;
    return 0;
}

/* A userfaultfd that the stopped thread makes, and we take. It keeps no descriptor, whatever happened to ours. */
int dl_take_userfaultfd(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget,
                        uint64_t deadline, int pidfd)
{
    long answer = -1, closed = 0;
    int error, again;

    in->step = DL_INJECT_CALL;
    error = dl_make_call(in, saved, gadget, deadline, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY, 0,
                         &answer);
    if (error)
        return error;
    if (answer < 0) {
        in->step = DL_INJECT_USERFAULTFD;
        return (int)answer;
    }
    in->step = DL_INJECT_PIDFD;
    in->uffd = (int)syscall(SYS_pidfd_getfd, pidfd, (int)answer, 0);
    if (in->uffd < 0)
        error = -errno;
    else
        fcntl(in->uffd, F_SETFD, FD_CLOEXEC);
    again = dl_make_call(in, saved, gadget, deadline, SYS_close, answer, 0, &closed);
    if (!error && (again || closed)) {
        in->step = DL_INJECT_CALL;
        error = again ? again : (int)closed;
    }
    return error;
}

/* A process that shares the target's memory and never runs: it stays stopped, ours to trace, and is killed when we end.
 * As long as it is there, so is the memory: what was written just before an exit or an exec can still be asked for.
 * CLONE_PARENT makes it a child of the target's parent, which is us; it keeps no descriptor open. */
int dl_take_keeper(struct dl_injection *in, const struct user_regs_struct *saved, uint64_t gadget, uint64_t deadline)
{
    struct dl_injection keeper = *in;
    struct user_regs_struct regs;
    long child = -1, closed = -1;
    int status, error;

    in->step = DL_INJECT_KEEPER;
    if (dl_tracer(in, PTRACE_SETOPTIONS, 0, (void *)(long)(PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE)) < 0)
        return -errno;
    error = dl_make_call(in, saved, gadget, deadline, SYS_clone, CLONE_VM | CLONE_PARENT, 0, &child);
    if (dl_tracer(in, PTRACE_SETOPTIONS, 0, (void *)(long)PTRACE_O_TRACESYSGOOD) < 0 && !error)
        error = -errno;
    if (error || child < 0)
        return error ? error : (int)child;
    keeper.tid = (int)child;
    error = dl_next_stop(&keeper, deadline, &status);
    if (!error && (dl_tracer(&keeper, PTRACE_SETOPTIONS, 0,
                             (void *)(long)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)) < 0 ||
                   dl_tracer(&keeper, PTRACE_GETREGS, 0, &regs) < 0))
        error = -errno;
    if (!error)
        error = dl_make_call(&keeper, &regs, gadget, deadline, SYS_close_range, 0, (long)UINT32_MAX, &closed);
    if (!error && closed)
        error = (int)closed;
    if (error) {
        kill((pid_t)child, SIGKILL);
        waitpid((pid_t)child, &status, __WALL);
        return error;
    }
    in->keeper = (int)child;
    return 0;
}

static int borrow(struct dl_injection *in, uint64_t gadget, int pidfd)
{
    struct user_regs_struct saved;
    uint64_t mask, all = ~UINT64_C(0), begin, deadline;
    int error, put_back;

    in->step = DL_INJECT_SEIZE;
    if (dl_tracer(in, PTRACE_SEIZE, 0, (void *)(long)PTRACE_O_TRACESYSGOOD) < 0)
        return -errno;
    in->step = DL_INJECT_STOP;
    begin = dl_now_ns();
    deadline = begin + (uint64_t)in->patience_ms * 1000000u;
    if (dl_tracer(in, PTRACE_INTERRUPT, 0, 0) < 0)
        return -errno;
    error = dl_until_interrupted(in, deadline);
    if (error)
        return error; /* when the tracer, helper or thread, ends, the kernel lets the thread go */
    in->step = DL_INJECT_REGISTERS;
    if (dl_tracer(in, PTRACE_GETREGS, 0, &saved) < 0 || dl_tracer(in, PTRACE_GETSIGMASK, KERNEL_SIGSET_BYTES, &mask) < 0) {
        error = -errno;
        goto detach;
    }
    if (saved.cs != LONG_MODE_CS) {
        in->step = DL_INJECT_WORD_SIZE;
        error = -ENOEXEC;
        goto detach;
    }
    if (dl_tracer(in, PTRACE_SETSIGMASK, KERNEL_SIGSET_BYTES, &all) < 0) {
        error = -errno;
        goto detach;
    }
    /* From here on the thread has registers that are not its own: no more giving up before they are back. Patience was
     * for the stop; if the machine is busy, the call waits for its turn, however little of the patience was left. */
    deadline = dl_now_ns() + CALL_NS;
    error = dl_take_userfaultfd(in, &saved, gadget, deadline, pidfd);
    if (!error && in->keep)
        error = dl_take_keeper(in, &saved, gadget, deadline);
    put_back = dl_tracer(in, PTRACE_SETREGS, 0, &saved) < 0 ? -errno : 0;
    /* To the place where the kernel handles signals and restarts calls. */
    if (!put_back && dl_tracer(in, PTRACE_INTERRUPT, 0, 0) < 0)
        put_back = -errno;
    if (!put_back && dl_tracer(in, PTRACE_CONT, 0, 0) < 0)
        put_back = -errno;
    if (!put_back)
        put_back = dl_until_interrupted(in, dl_now_ns() + 1000000000u);
    if (!put_back && dl_tracer(in, PTRACE_SETREGS, 0, &saved) < 0)
        put_back = -errno;
    if (dl_tracer(in, PTRACE_SETSIGMASK, KERNEL_SIGSET_BYTES, &mask) < 0 && !put_back)
        put_back = -errno;
    if (put_back && !error) {
        in->step = DL_INJECT_REGISTERS;
        error = put_back;
    }
detach:
    if (dl_tracer(in, PTRACE_DETACH, 0, 0) < 0 && !error) {
        in->step = DL_INJECT_DETACH;
        error = -errno;
    }
    in->stopped_ns = dl_now_ns() - begin;
    return error;
}

void dl_let_go(struct dl_injection *in)
{
    int status;

    if (in->uffd >= 0)
        close(in->uffd);
    in->uffd = -1;
    if (in->keeper > 0) {
        kill(in->keeper, SIGKILL);
        while (waitpid(in->keeper, &status, __WALL) < 0 && errno == EINTR)
            ;
    }
    in->keeper = 0;
}

static void attempt(struct dl_injection *in)
{
    uint64_t gadget;
    int pidfd;

    in->step = DL_INJECT_GADGET;
    in->error = dl_find_gadget(in->pid, &gadget);
    if (in->error)
        return;
    in->step = DL_INJECT_PIDFD;
    pidfd = (int)syscall(SYS_pidfd_open, in->pid, 0);
    if (pidfd < 0) {
        in->error = -errno;
        return;
    }
    in->error = borrow(in, gadget, pidfd);
    close(pidfd);
    if (in->error)
        dl_let_go(in);
    if (!in->error)
        in->step = DL_INJECT_DONE;
}

static int helper(void *argument)
{
    struct dl_injection *in = argument;

    setsid(); /* what is sent to our group is not sent to it */
    attempt(in);
    _exit(0);
}

int dl_inject(struct dl_injection *in)
{
    enum { STACK = 1 << 18 };
    sigset_t all, before;
    int status, child;

    in->uffd = -1;
    in->error = in->keeper = 0;
    in->stopped_ns = 0;
    in->calls = 0;
    if (in->in_process) {
        attempt(in);
        return in->error;
    }
    in->step = DL_INJECT_HELPER;
    void *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return in->error = -errno;
    /* CLONE_VFORK: this thread waits, so that errno, which they share, has one user. No exit signal: nobody else's
     * wait() finds the helper. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    in->error = -EINTR;
    child = clone(helper, (char *)stack + STACK, CLONE_VM | CLONE_FILES | CLONE_VFORK, in);
    if (child < 0)
        in->error = -errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (child > 0)
        while (waitpid(child, &status, __WALL) < 0 && errno == EINTR)
            ;
    munmap(stack, STACK);
    return in->error;
}

#else /* needs the registers of another architecture */

int dl_inject(struct dl_injection *in)
{
    in->uffd = -1;
    in->keeper = 0;
    in->step = DL_INJECT_UNSUPPORTED;
    return in->error = -ENOSYS;
}

#endif
