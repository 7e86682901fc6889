/* ptrace(2) and pidfd_open(2), for who stops a thread of another process; after the system's own headers. */
#ifndef DIRTYLOG_PTRACE_H
#define DIRTYLOG_PTRACE_H

#include <sys/ptrace.h>
#include <sys/syscall.h>

/* Declared here because the distribution's headers may be older than the kernel. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef PTRACE_GETSIGMASK
#define PTRACE_GETSIGMASK 0x420a
#define PTRACE_SETSIGMASK 0x420b
#endif
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif
#define KERNEL_SIGSET_BYTES ((void *)8)

#endif /* DIRTYLOG_PTRACE_H */
