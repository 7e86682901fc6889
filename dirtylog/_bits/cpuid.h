/* What an x86 processor can do, asked of itself: of what a compiler's own function does not know it says that it is not
 * there, and nobody would learn why. */
#ifndef DIRTYLOG_CPUID_H
#define DIRTYLOG_CPUID_H

#if defined(__x86_64__)
#include <cpuid.h>

/* By the name that Linux gives it in /proc/cpuinfo. */
struct dl_feature {
    const char *name;
    unsigned leaf;
    unsigned word; /* 0 to 3: eax, ebx, ecx, edx */
    unsigned bit;
};

static inline int dl_has_feature(const struct dl_feature *feature)
{
    unsigned words[4];
    return __get_cpuid_count(feature->leaf, 0, &words[0], &words[1], &words[2], &words[3]) &&
           words[feature->word] >> feature->bit & 1;
}

/* Whether the operating system saves these registers when it switches threads. */
static inline int dl_system_keeps(unsigned xcr0)
{
    static const struct dl_feature osxsave = {"osxsave", 1, 2, 27};
    unsigned low, high;
    if (!dl_has_feature(&osxsave))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & xcr0) == xcr0;
}
#endif /* __x86_64__ */

#endif /* DIRTYLOG_CPUID_H */
