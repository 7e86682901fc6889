/* The process's SIGSEGV handler: installed once, for good; what is not ours goes to the one before it. */
#ifndef DIRTYLOG_FAULTS_H
#define DIRTYLOG_FAULTS_H

#include <stdint.h>

enum dl_fault {
    DL_FAULT_FOREIGN = 0, /* no span has the page */
    DL_FAULT_OPENED = 1,  /* the page was protected, and is open and marked now */
    DL_FAULT_WAS_OPEN = 2 /* the page was open already: another thread was faster, or this is no store */
};

/* What the handler asks the engine, which takes its own lock: open the page of `address`. `changes`
 * counts what may have protected or abandoned pages since; -errno: the kernel refuses to open it. */
int dl_mprotect_fault(uintptr_t address, uint64_t *changes);

/* Both under the engine's lock. Install: 0, or -EBUSY where another handler was put over ours. */
int dl_faults_install(void);
int dl_faults_installed(void);

#endif /* DIRTYLOG_FAULTS_H */
