/* The program is what execve makes of it, and nothing else: no code of ours runs in it. It is stopped where execve
 * ends, or where it first opens a file that the caller names (for Python, its script: the interpreter's own start is
 * then over); there it makes a userfaultfd and a keeper (_inject.c), and the caller arms its memory before it goes on.
 */
#define _GNU_SOURCE
#include "sources/process/_launch.h"

#include <errno.h>

#if defined(__linux__) && defined(__x86_64__)

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sources/process/_ptrace.h"

/* An interpreter's start has some hundred; a program that never opens what it was said to open is watched from here. */
#define MOST_CALLS 200000
/* A script is looked at first (whether it is an archive) and opened some twenty calls later; then read and closed. */
#define CALLS_AFTER_A_LOOK 100
#define CALLS_TO_READ 20000

static int wait_for(int pid, int *status)
{
    while (waitpid(pid, status, __WALL) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

/* In the child: wait for the word, and be the program. */
static void become(struct dl_launch *launch, int go, int answer, const sigset_t *mask)
{
    char word;
    int error;
    ssize_t got;

    while ((got = read(go, &word, 1)) < 0 && errno == EINTR)
        ;
    /* Not traced: it may not begin, and who started it has ended, or starts it in another way. */
    if (got != 1)
        _exit(127);
    /* Python ignores these two; a program expects what its shell would have given it. */
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    sigprocmask(SIG_SETMASK, mask, NULL);
    execvp(launch->words[0], launch->words);
    error = errno;
    while (write(answer, &error, sizeof(error)) < 0 && errno == EINTR)
        ;
    _exit(127);
}

enum { OTHER, LOOKS, OPENS };

/* Whether the call that the thread has begun opens a file that the watch waits for, or only looks what kind it is of. */
static int opens(const struct dl_launch *launch, const struct user_regs_struct *regs)
{
    char path[4096];
    size_t have = 0;
    uint64_t at, flags;

    if (regs->orig_rax == SYS_openat) {
        at = regs->rsi;
        flags = regs->rdx;
    } else if (regs->orig_rax == SYS_open) {
        at = regs->rdi;
        flags = regs->rsi;
    } else {
        return OTHER;
    }
    while (have < sizeof(path) - 1) {
        size_t length = 256 - (at + have) % 256; /* never across a page that may not be there */
        if (length > sizeof(path) - 1 - have)
            length = sizeof(path) - 1 - have;
        struct iovec here = {path + have, length}, there = {(void *)(uintptr_t)(at + have), length};
        ssize_t got = process_vm_readv(launch->in.pid, &here, 1, &there, 1, 0);

        if (got <= 0)
            return OTHER;
        if (memchr(path + have, 0, (size_t)got))
            break;
        have += (size_t)got;
    }
    path[sizeof(path) - 1] = 0;
    for (char **part = launch->begins; *part; part++) {
        int script = (*part)[0] == '!';
        const char *name = *part + script;
        size_t length = strlen(name), all = strlen(path);
        /* A whole path, or, after "*", a part of one. */
        if (name[0] == '*' ? strstr(path, name + 1) != NULL : length == all && !memcmp(path, name, all))
            return script && flags & O_CLOEXEC ? LOOKS : OPENS;
    }
    return OTHER;
}

/* Go on from the end of execve to the end of the call where the watch begins; 1 when the program has ended. That is the
 * call which closes the file that was waited for: it is read by then, and what comes next is the program's. */
static int go_to_begin(struct dl_launch *launch)
{
    struct dl_injection *in = &launch->in;
    struct user_regs_struct regs;
    int signal = 0, inside = 1, reached = !launch->begins; /* execve itself is a call that has not ended yet */
    int opened = 0, closing = -1, patience = 0;

    for (int stops = 0;;) {
        long request = PTRACE_SYSCALL;

        if (signal < 0) {
            request = PTRACE_LISTEN; /* stopped as a group, until somebody continues it */
            signal = 0;
        }
        if (dl_tracer(in, request, 0, (void *)(long)signal) < 0 && errno != ESRCH)
            return -errno;
        if (wait_for(in->tid, &launch->status) < 0)
            return -errno;
        if (WIFEXITED(launch->status) || WIFSIGNALED(launch->status))
            return 1;
        signal = 0;
        if (WSTOPSIG(launch->status) == (SIGTRAP | 0x80)) {
            inside = !inside;
            if ((opened || (inside && launch->begins)) && dl_tracer(in, PTRACE_GETREGS, 0, &regs) < 0)
                return -errno;
            if (inside && closing >= 0) {
                reached = regs.orig_rax == SYS_close && (int)regs.rdi == closing;
            } else if (inside && launch->begins) {
                int what = opens(launch, &regs);
                opened = what == OPENS;
                if (what == LOOKS && !patience)
                    patience = CALLS_AFTER_A_LOOK;
            } else if (!inside) {
                if (opened && (long)regs.rax >= 0) {
                    closing = (int)regs.rax;
                    patience = CALLS_TO_READ;
                }
                opened = 0;
                if (reached || ++stops > MOST_CALLS || (patience && !--patience))
                    return 0;
            }
        } else if (launch->status >> 16 == PTRACE_EVENT_STOP) {
            int why = WSTOPSIG(launch->status);
            signal = why == SIGSTOP || why == SIGTSTP || why == SIGTTIN || why == SIGTTOU ? -1 : 0;
        } else if (!(launch->status >> 16)) {
            signal = WSTOPSIG(launch->status);
        }
    }
}

static int begin(struct dl_launch *launch)
{
    struct dl_injection *in = &launch->in;
    struct user_regs_struct saved;
    uint64_t gadget, mask, all = ~UINT64_C(0), deadline;
    int error, ended = go_to_begin(launch), pidfd;

    if (ended) {
        launch->ended = ended > 0;
        return ended > 0 ? 0 : ended;
    }
    in->step = DL_INJECT_GADGET;
    error = dl_find_gadget(in->pid, &gadget);
    if (error)
        return error;
    in->step = DL_INJECT_PIDFD;
    pidfd = (int)syscall(SYS_pidfd_open, in->pid, 0);
    if (pidfd < 0)
        return -errno;
    in->step = DL_INJECT_REGISTERS;
    deadline = dl_now_ns() + (uint64_t)in->patience_ms * 1000000u;
    if (dl_tracer(in, PTRACE_GETREGS, 0, &saved) < 0 ||
        dl_tracer(in, PTRACE_GETSIGMASK, KERNEL_SIGSET_BYTES, &mask) < 0)
        error = -errno;
    if (!error && saved.cs != 0x33) {
        in->step = DL_INJECT_WORD_SIZE;
        error = -ENOEXEC;
    }
    if (!error && dl_tracer(in, PTRACE_SETSIGMASK, KERNEL_SIGSET_BYTES, &all) < 0)
        error = -errno;
    if (!error)
        error = dl_take_userfaultfd(in, &saved, gadget, deadline, pidfd);
    if (!error)
        error = dl_take_keeper(in, &saved, gadget, deadline);
    close(pidfd);
    if (error)
        return error;
    in->step = DL_INJECT_REGISTERS;
    if (dl_tracer(in, PTRACE_SETREGS, 0, &saved) < 0 || dl_tracer(in, PTRACE_SETSIGMASK, KERNEL_SIGSET_BYTES, &mask) < 0 ||
        dl_tracer(in, PTRACE_SETOPTIONS, 0, (void *)(long)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)) < 0)
        return -errno;
    in->step = DL_INJECT_DONE;
    return 0;
}

int dl_launch(struct dl_launch *launch)
{
    struct dl_injection *in = &launch->in;
    int go[2], answer[2], error = 0, status;
    sigset_t all, before;
    long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;

    in->uffd = -1;
    in->keeper = in->calls = in->stop_at = 0;
    launch->refused = launch->ended = 0;
    in->step = DL_INJECT_HELPER;
    if (pipe2(go, O_CLOEXEC) < 0)
        return in->error = -errno;
    if (pipe2(answer, O_CLOEXEC) < 0) {
        error = -errno;
        close(go[0]);
        close(go[1]);
        return in->error = error;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    in->pid = in->tid = fork();
    if (!in->pid) {
        close(go[1]);
        become(launch, go[0], answer[1], &before);
    }
    if (in->pid < 0)
        error = -errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close(go[0]);
    close(answer[1]);
    if (!error) {
        in->step = DL_INJECT_SEIZE;
        if (dl_tracer(in, PTRACE_SEIZE, 0, (void *)options) < 0)
            error = -errno;
    }
    if (!error && write(go[1], "", 1) != 1)
        error = -errno;
    /* Until execve has happened; a signal may come first, and ends it or does nothing. */
    for (int signal = 0; !error;) {
        if (wait_for(in->pid, &launch->status) < 0) {
            error = -errno;
        } else if (WIFEXITED(launch->status) || WIFSIGNALED(launch->status)) {
            ssize_t got = read(answer[0], &launch->refused, sizeof(launch->refused));
            if (got != sizeof(launch->refused))
                launch->refused = 0;
            launch->ended = 1;
            break;
        } else if (launch->status >> 16 == PTRACE_EVENT_EXEC) {
            break;
        } else {
            signal = launch->status >> 16 ? 0 : WSTOPSIG(launch->status);
            if (dl_tracer(in, PTRACE_CONT, 0, (void *)(long)signal) < 0)
                error = -errno;
        }
    }
    close(go[1]);
    close(answer[0]);
    if (!error && !launch->ended)
        error = begin(launch);
    if (error && in->pid > 0) {
        dl_let_go(in);
        kill(in->pid, SIGKILL);
        wait_for(in->pid, &status);
    }
    return in->error = error;
}

int dl_launch_go(int pid)
{
    return ptrace(PTRACE_DETACH, pid, 0, 0) < 0 ? -errno : 0;
}

#else /* needs the registers of another architecture */

int dl_launch(struct dl_launch *launch)
{
    launch->in.uffd = -1;
    launch->in.keeper = 0;
    launch->in.step = DL_INJECT_UNSUPPORTED;
    return launch->in.error = -ENOSYS;
}

int dl_launch_go(int pid)
{
    (void)pid;
    return -ENOSYS;
}

#endif
