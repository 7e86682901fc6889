/* Holds a value in each register and below its stack pointer, turns until SIGTERM, and says which of them have changed.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

enum { GENERAL = 14, VECTORS = 16, BELOW = 16 };

volatile int stop_turning;
uint64_t given[GENERAL], found[GENERAL + 2 * VECTORS + BELOW];

/* All but rsp, and but rax, by which the addresses of what is given and found come. */
__asm__(".text\n"
        "turn:\n"
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "mov given@GOTPCREL(%rip), %rax\n"
        "mov (%rax), %rbx; mov 8(%rax), %rcx; mov 16(%rax), %rdx; mov 24(%rax), %rsi; mov 32(%rax), %rdi\n"
        "mov 40(%rax), %rbp; mov 48(%rax), %r8; mov 56(%rax), %r9; mov 64(%rax), %r10; mov 72(%rax), %r11\n"
        "mov 80(%rax), %r12; mov 88(%rax), %r13; mov 96(%rax), %r14; mov 104(%rax), %r15\n"
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "movq %rbx, %xmm\\n; punpcklqdq %xmm\\n, %xmm\\n\n"
        "mov %rcx, -8*(\\n+1)(%rsp)\n"
        ".endr\n"
        "mov stop_turning@GOTPCREL(%rip), %rax\n"
        "1: cmpl $0, (%rax)\n"
        "je 1b\n"
        "mov found@GOTPCREL(%rip), %rax\n"
        "mov %rbx, (%rax); mov %rcx, 8(%rax); mov %rdx, 16(%rax); mov %rsi, 24(%rax); mov %rdi, 32(%rax)\n"
        "mov %rbp, 40(%rax); mov %r8, 48(%rax); mov %r9, 56(%rax); mov %r10, 64(%rax); mov %r11, 72(%rax)\n"
        "mov %r12, 80(%rax); mov %r13, 88(%rax); mov %r14, 96(%rax); mov %r15, 104(%rax)\n"
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "movdqu %xmm\\n, 112+16*\\n(%rax)\n"
        "mov -8*(\\n+1)(%rsp), %rcx\n"
        "mov %rcx, 368+8*\\n(%rax)\n"
        ".endr\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
        "ret\n");
void turn(void);

static void stop(int number)
{
    (void)number;
    stop_turning = 1;
}

int main(void)
{
    int changed = 0;

    signal(SIGTERM, stop);
    for (int i = 0; i < GENERAL; i++)
        given[i] = UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(i + 1);
    puts("turning");
    fflush(stdout);
    turn();
    for (int i = 0; i < GENERAL + 2 * VECTORS + BELOW; i++) {
        uint64_t expected = i < GENERAL ? given[i] : i < GENERAL + 2 * VECTORS ? given[0] : given[1];

        if (found[i] != expected) {
            printf("%d: %016llx\n", i, (unsigned long long)found[i]);
            changed = 1;
        }
    }
    puts(changed ? "changed" : "the same");
    return changed;
}
