/* What a parent does for its child on every architecture: signals that it passes on, and whether two share memory. */
#define _GNU_SOURCE
#include "sources/process/_launch.h"

#include <errno.h>

#ifdef __linux__

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KCMP_VM 1

static const int passed[] = {SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGWINCH};
enum { PASSED = sizeof(passed) / sizeof(passed[0]) };
static struct sigaction before_passing[PASSED];
static volatile sig_atomic_t receiver;

static void pass(int number, siginfo_t *info, void *context)
{
    int error = errno, to = receiver;

    (void)context;
    if (to > 0 && info->si_code != SI_KERNEL && info->si_pid != to)
        kill(to, number);
    errno = error;
}

int dl_pass_signals(int pid)
{
    struct sigaction now = {.sa_sigaction = pass, .sa_flags = SA_SIGINFO | SA_RESTART}, old;

    if (pid && receiver)
        return -EBUSY;
    if (!pid && !receiver)
        return 0; /* nothing to end: no handler was kept to be put back */
    receiver = pid;
    sigfillset(&now.sa_mask);
    for (int i = 0; i < PASSED; i++) {
        if (!pid) {
            sigaction(passed[i], &before_passing[i], NULL);
            continue;
        }
        if (sigaction(passed[i], NULL, &old) < 0)
            return -errno;
        before_passing[i] = old;
        /* Who ignores a signal has told its children to (nohup). */
        if (old.sa_handler != SIG_IGN && sigaction(passed[i], &now, NULL) < 0)
            return -errno;
    }
    return 0;
}

int dl_same_memory(int pid, int other)
{
    long answer = syscall(SYS_kcmp, pid, other, KCMP_VM, 0, 0);

    return answer < 0 ? -errno : answer == 0;
}

#else

int dl_pass_signals(int pid)
{
    (void)pid;
    return -ENOSYS;
}

int dl_same_memory(int pid, int other)
{
    (void)pid;
    (void)other;
    return -ENOSYS;
}

#endif
