/* Decides whether a SIGSEGV is a store to a protected page, and hands on what is not. */
#define _GNU_SOURCE
#include "_faults.h"

#include <errno.h>

#ifdef __linux__

#include <signal.h>
#include <string.h>
#include <ucontext.h>

static int installed;
static struct sigaction previous;

/* The last fault of this thread that opened nothing. A handler must not allocate: glibc allocates the
 * variables of a module that was loaded late at the first use, unless they are initial-exec; musl cannot
 * load a module that has such, and allocates all of them when it loads it. */
#ifdef __GLIBC__
#define OF_THIS_THREAD __thread __attribute__((tls_model("initial-exec")))
#else
#define OF_THIS_THREAD __thread
#endif
static OF_THIS_THREAD struct {
    uintptr_t address;
    uint64_t changes;
} last;

/* Whether the processor says that it was fetching code. Where it does not say, 0. */
static int is_code_fetch(const ucontext_t *context)
{
#if defined(__x86_64__)
    return (context->uc_mcontext.gregs[REG_ERR] & 16) != 0;
#elif defined(__aarch64__)
    const char *at = (const char *)context->uc_mcontext.__reserved;
    const char *end = at + sizeof context->uc_mcontext.__reserved;
    uint32_t record[2]; /* magic, size */

    for (; at + 16 <= end; at += record[1]) {
        uint64_t syndrome;

        memcpy(record, at, sizeof record);
        if (record[0] == 0 || record[1] < 16)
            break;
        if (record[0] != 0x45535201)
            continue;
        memcpy(&syndrome, at + 8, sizeof syndrome);
        /* Exception class: an instruction abort, from user mode or not. */
        return (syndrome >> 26 & 0x3e) == 0x20;
    }
    return 0;
#else
    return 0;
#endif
}

static void chain(int number, siginfo_t *info, void *context)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};

    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else if (!(previous.sa_handler == SIG_IGN && info->si_code <= 0)) {
        /* The store is tried again and ends the process, as it would have without us. */
        sigaction(SIGSEGV, &standard, NULL);
        if (info->si_code <= 0)
            raise(SIGSEGV);
    }
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    int error = errno, ours = 0;

    /* Tracked memory is never executable: a jump into it would fault for ever, opened or not. */
    if (info->si_code == SEGV_ACCERR && !is_code_fetch(context)) {
        uintptr_t address = (uintptr_t)info->si_addr;
        uint64_t changes;
        int fault = dl_mprotect_fault(address, &changes);

        if (fault == DL_FAULT_OPENED) {
            ours = 1;
        } else if (fault >= 0) {
            /* Another thread has opened the page, or closed its span, between the fault and here: try once
             * more. A fault that comes back with nothing protected or closed in between is nobody's store. */
            ours = !(last.address == address && last.changes == changes);
            last.address = address;
            last.changes = changes;
        }
    }
    if (!ours)
        chain(number, info, context);
    errno = error;
}

static int is_ours(const struct sigaction *now)
{
    return (now->sa_flags & SA_SIGINFO) && now->sa_sigaction == on_fault;
}

int dl_faults_installed(void)
{
    struct sigaction now;

    return sigaction(SIGSEGV, NULL, &now) == 0 && is_ours(&now);
}

/* The handler stays for good: a thread may have faulted on a page that a close has since opened, and the
 * signal that is on its way to it must still find the handler. */
int dl_faults_install(void)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK}, now;

    if (sigaction(SIGSEGV, NULL, &now) < 0)
        return -errno;
    if (is_ours(&now))
        return 0;
    /* Whoever installed a handler over ours may call ours as its previous one; over it once more, the
     * two would call each other for ever. */
    if (installed && ((now.sa_flags & SA_SIGINFO) || (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN)))
        return -EBUSY;
    sigfillset(&ours.sa_mask);
    previous = now;
    if (sigaction(SIGSEGV, &ours, NULL) < 0)
        return -errno;
    installed = 1;
    return 0;
}

#else

int dl_faults_install(void) { return -ENOSYS; }
int dl_faults_installed(void) { return 0; }

#endif
