/* Stops threads of another process, by ptrace(2): to borrow one for a system call, or to hold all while memory is read.
 * Nothing here knows registers, so that it is the same on every architecture.
 */
#define _GNU_SOURCE
#include "sources/process/_inject.h"

#include <errno.h>

#ifdef __linux__

#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sources/process/_ptrace.h"

uint64_t dl_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Every request goes through here, so that a test can hold the tracer before any of them, and end us meanwhile. */
long dl_tracer(struct dl_injection *in, long request, void *address, void *data)
{
    if (++in->calls == in->stop_at)
        syscall(SYS_kill, syscall(SYS_getpid), SIGSTOP);
    return ptrace((enum __ptrace_request)request, in->tid, address, data);
}

/* Wait for the thread's next stop, and say what waitpid would; -ETIMEDOUT when it does not come, -ESRCH when the thread is
 * gone. How it ended is looked at and left: where the thread is a child of ours, whoever started it asks for that. */
int dl_next_stop(struct dl_injection *in, uint64_t deadline, int *status)
{
    struct timespec pause = {0, 20000};

    for (;;) {
        siginfo_t found = {.si_pid = 0};

        if (waitid(P_PID, (id_t)in->tid, &found, WSTOPPED | WEXITED | WNOWAIT | WNOHANG | __WALL) < 0 && errno != EINTR)
            return -ESRCH;
        if (found.si_pid == in->tid) {
            if (found.si_code != CLD_TRAPPED && found.si_code != CLD_STOPPED)
                return -ESRCH;
            /* The stop alone is taken: if the thread was killed meanwhile, there is none, and the next look says so. */
            found.si_pid = 0;
            if (!waitid(P_PID, (id_t)in->tid, &found, WSTOPPED | WNOHANG | __WALL) && found.si_pid == in->tid) {
                *status = found.si_status << 8 | 0x7f;
                return 0;
            }
            continue;
        }
        if (dl_now_ns() > deadline)
            return -ETIMEDOUT;
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < 1000000)
            pause.tv_nsec += pause.tv_nsec / 4;
    }
}

/* Go on until the stop that PTRACE_INTERRUPT asks for. A signal that comes first is delivered, as without us. */
int dl_until_interrupted(struct dl_injection *in, uint64_t deadline)
{
    int status, error;

    for (;;) {
        error = dl_next_stop(in, deadline, &status);
        if (error)
            return error;
        if (status >> 16 == PTRACE_EVENT_STOP)
            return 0;
        if (dl_tracer(in, PTRACE_CONT, 0, (void *)(long)WSTOPSIG(status)) < 0)
            return -errno;
    }
}

/* Hold a thread where it would handle signals, until dl_let_run, or until the calling thread ends: so that a thread which
 * does not stop in time is not held when it stops later, the caller ends then. */
int dl_hold(int tid, int patience_ms)
{
    struct dl_injection in = {.tid = tid};

    if (dl_tracer(&in, PTRACE_SEIZE, 0, 0) < 0 || dl_tracer(&in, PTRACE_INTERRUPT, 0, 0) < 0)
        return -errno;
    return dl_until_interrupted(&in, dl_now_ns() + (uint64_t)patience_ms * 1000000u);
}

/* A system call that it was in goes on waiting; a stop of its group is in force again. */
int dl_let_run(int tid)
{
    return ptrace(PTRACE_DETACH, tid, 0, 0) < 0 ? -errno : 0;
}

#else

int dl_hold(int tid, int patience_ms)
{
    (void)tid;
    (void)patience_ms;
    return -ENOSYS;
}

int dl_let_run(int tid)
{
    (void)tid;
    return -ENOSYS;
}

#endif
