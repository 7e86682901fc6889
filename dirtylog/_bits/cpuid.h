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
#endif /* __x86_64__ */

#endif /* DIRTYLOG_CPUID_H */
