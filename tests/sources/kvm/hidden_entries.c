/* A KVM whose vCPUs keep entries where no harvest sees them, played by threads: Intel's page-modification logging.
 *
 * ioctl() is this program's. KVM_RUN writes pages, notes them in a buffer of its own, and moves the buffer into the
 * ring when the guest leaves; it leaves when a signal arrives after it was entered, or with immediate_exit set on
 * entry, as the kernel's does. After each harvest, every page written before it has to be in the slot's words.
 *
 *     hidden_entries [no-kick]     exits with 1 if a page was missed, 2 if a run did not end as it should
 */
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int played(int fd, unsigned long request, ...);
#define ioctl played
#include "sources/kvm/_kvm.h"

#define VCPUS 2
#define ROUNDS 400
#define PAGES_A_ROUND 3
#define PAGES (ROUNDS * PAGES_A_ROUND)
#define ENTRIES 64

struct vcpu {
    struct dl_ring_entry entries[ENTRIES];
    struct dl_ring ring;
    struct dl_runner runner;
    uint8_t run[64];
    uint64_t hidden[PAGES];
    unsigned nhidden;
    uint32_t push, reset;
    uint64_t written, allowed, again, other;
    int at_door; /* between the call and the guest, where a signal finds nothing to interrupt */
    int lingers; /* there: UNTIL_ASKED, or UNTIL_LET_GO */
};

enum { UNTIL_ASKED = 1, UNTIL_LET_GO };

static struct vcpu vcpus[VCPUS];
static __thread volatile sig_atomic_t interrupted;
static int number;

static void arrives(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

static void spill(struct vcpu *vcpu)
{
    for (unsigned i = 0; i < vcpu->nhidden; i++) {
        struct dl_ring_entry *entry = &vcpu->entries[vcpu->push++ % ENTRIES];
        entry->slot = (uint32_t)(vcpu - vcpus);
        entry->offset = vcpu->hidden[i];
        __atomic_store_n(&entry->flags, DL_RING_DIRTY, __ATOMIC_RELEASE);
    }
    vcpu->nhidden = 0;
}

static int enter_guest(struct vcpu *vcpu)
{
    if (__atomic_load_n(&vcpu->lingers, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(&vcpu->at_door, 1, __ATOMIC_RELEASE);
        while (!interrupted || __atomic_load_n(&vcpu->lingers, __ATOMIC_ACQUIRE) == UNTIL_LET_GO)
            sched_yield();
        __atomic_store_n(&vcpu->lingers, 0, __ATOMIC_RELEASE);
    }
    interrupted = 0; /* it had its handler, in user space */
    while (!interrupted && !__atomic_load_n(&vcpu->run[DL_RUN_IMMEDIATE_EXIT], __ATOMIC_SEQ_CST)) {
        /* The kernel looks at immediate_exit once; from here on only a signal helps. */
        while (!interrupted) {
            if (vcpu->written < __atomic_load_n(&vcpu->allowed, __ATOMIC_ACQUIRE)) {
                vcpu->hidden[vcpu->nhidden++] = vcpu->written;
                __atomic_store_n(&vcpu->written, vcpu->written + 1, __ATOMIC_RELEASE);
            } else {
                sched_yield();
            }
        }
    }
    spill(vcpu);
    errno = EINTR;
    return -1;
}

static int played(int fd, unsigned long request, ...)
{
    int freed = 0;
    if (request == DL_KVM_RUN)
        return enter_guest(&vcpus[fd]);
    for (int i = 0; i < VCPUS; i++)
        for (; vcpus[i].entries[vcpus[i].reset % ENTRIES].flags & DL_RING_RESET; vcpus[i].reset++, freed++)
            __atomic_store_n(&vcpus[i].entries[vcpus[i].reset % ENTRIES].flags, 0, __ATOMIC_RELEASE);
    return freed;
}

/* Make it leave the guest, and return when it stands at the door of the next run. */
static void stand_at_door(struct vcpu *vcpu, int until)
{
    vcpu->at_door = 0;
    __atomic_store_n(&vcpu->lingers, until, __ATOMIC_RELEASE);
    dl_left_wait(&vcpu->runner, dl_left_ask(&vcpu->runner, vcpu->run, number));
    while (!__atomic_load_n(&vcpu->at_door, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void *run(void *argument)
{
    struct vcpu *vcpu = argument;
    int result;
    while ((result = dl_run((int)(vcpu - vcpus), &vcpu->runner, vcpu->run, number)) == DL_RUN_AGAIN)
        vcpu->again++;
    vcpu->other = result == -EINTR;
    return NULL;
}

int main(int argc, char **argv)
{
    int kicks = argc < 2 || strcmp(argv[1], "no-kick") != 0;
    static uint64_t words[VCPUS][PAGES / 64 + 1], summary[VCPUS][1];
    struct dl_bitmap bitmaps[VCPUS];
    struct dl_ring_slot slots[VCPUS];
    pthread_t threads[VCPUS];
    uint64_t missed = 0, exits[VCPUS], before[VCPUS];
    struct sigaction action;

    alarm(20); /* a run that nobody can end */
    number = dl_kick_signal();
    memset(&action, 0, sizeof action);
    action.sa_handler = arrives;
    sigaction(number, &action, NULL);
    for (int i = 0; i < VCPUS; i++) {
        bitmaps[i] = (struct dl_bitmap){words[i], summary[i], PAGES, NULL};
        slots[i] = (struct dl_ring_slot){&bitmaps[i], (uint32_t)i};
        vcpus[i].ring = (struct dl_ring){vcpus[i].entries, ENTRIES, 0, 0};
        dl_runner_init(&vcpus[i].runner);
        /* One that does not run when it is asked is not waited for, though it runs by then. */
        vcpus[i].allowed = 1;
        exits[i] = dl_left_ask(&vcpus[i].runner, vcpus[i].run, number);
        pthread_create(&threads[i], NULL, run, &vcpus[i]);
        while (!__atomic_load_n(&vcpus[i].written, __ATOMIC_ACQUIRE))
            sched_yield();
        dl_left_wait(&vcpus[i].runner, exits[i]);
    }
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        uint64_t drained = 0, reset;
        for (int i = 0; i < VCPUS; i++) {
            /* Every third round one of them is asked while it stands at the door. */
            if (kicks && round % 3 == 0 && (uint64_t)i == round % VCPUS) {
                stand_at_door(&vcpus[i], UNTIL_ASKED);
            } else {
                __atomic_store_n(&vcpus[i].allowed, round * PAGES_A_ROUND, __ATOMIC_RELEASE);
                while (__atomic_load_n(&vcpus[i].written, __ATOMIC_ACQUIRE) < round * PAGES_A_ROUND)
                    sched_yield();
            }
        }
        for (int i = 0; i < VCPUS; i++)
            before[i] = __atomic_load_n(&vcpus[i].written, __ATOMIC_ACQUIRE);
        for (int i = 0; kicks && i < VCPUS; i++)
            exits[i] = dl_left_ask(&vcpus[i].runner, vcpus[i].run, number);
        for (int i = 0; kicks && i < VCPUS; i++)
            dl_left_wait(&vcpus[i].runner, exits[i]);
        for (int i = 0; i < VCPUS; i++) {
            drained += dl_ring_drain(&vcpus[i].ring, slots, VCPUS).drained;
            for (uint64_t page = 0; page < before[i]; page++)
                missed += !(words[i][page / 64] >> page % 64 & 1);
        }
        dl_kvm_reset_rings(-1, drained, &reset);
        missed += reset != drained;
    }
    for (int i = 0; i < VCPUS; i++) {
        /* A harvest's question and a kick of the same run: it ends, whichever of them came first. */
        if (kicks) {
            stand_at_door(&vcpus[i], UNTIL_LET_GO);
            dl_left_ask(&vcpus[i].runner, vcpus[i].run, number);
        }
        dl_kick(&vcpus[i].runner, vcpus[i].run, number);
        __atomic_store_n(&vcpus[i].lingers, UNTIL_ASKED, __ATOMIC_RELEASE);
        pthread_join(threads[i], NULL);
        if (!vcpus[i].other || (kicks && vcpus[i].again < ROUNDS) || vcpus[i].run[DL_RUN_IMMEDIATE_EXIT])
            return 2;
        dl_runner_destroy(&vcpus[i].runner);
    }
    printf("%llu missed\n", (unsigned long long)missed);
    return missed != 0;
}
