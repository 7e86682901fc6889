/* The parts that a harvest of pages [first, end) is made of, against one page at a time. Prints what is wrong. */
#include <stdio.h>
#include <stdlib.h>

#include "_bits/harvest.h"

static int check(uint64_t npages, uint64_t first, uint64_t end, int foreign)
{
    struct dl_parts parts = foreign ? dl_foreign_parts_of(npages, first, end) : dl_parts_of(npages, first, end);
    int wrong = parts.first != first || parts.end != end;
    for (uint64_t page = 0; page < npages; page++) {
        int head = page >= parts.first && page < parts.head_end;
        int tail = page >= parts.tail_first && page < parts.end;
        int line = page / DL_LINE_PAGES >= parts.first_line && page / DL_LINE_PAGES < parts.end_line;
        if (foreign) /* whole words are scanned */
            line = page >= parts.head_end && page < parts.tail_first;
        wrong |= head + line + tail != (page >= first && page < end);
    }
    /* Where words are scanned to the end, none of them is one that others may have set bits in past the last page. */
    if (foreign && parts.head_end < parts.tail_first)
        wrong |= parts.head_end % DL_WORD_PAGES || parts.tail_first % DL_WORD_PAGES;
    wrong |= dl_first_group(&parts) * DL_GROUP_LINES > parts.first_line;
    wrong |= dl_end_group(&parts) * DL_GROUP_LINES < parts.end_line;
    if (wrong)
        printf("pages %lu to %lu of %lu%s\n", (unsigned long)first, (unsigned long)end, (unsigned long)npages,
               foreign ? ", foreign" : "");
    return wrong;
}

int main(void)
{
    static const uint64_t sizes[] = {0, 1, 63, 64, 65, 511, 512, 513, 1024, 1100, 1536, 33000};
    int wrong = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (uint64_t a = 0; a < sizeof sizes / sizeof *sizes; a++)
            for (uint64_t b = 0; b < sizeof sizes / sizeof *sizes; b++)
                for (int foreign = 0; foreign < 2; foreign++)
                    if (sizes[a] <= sizes[b] && sizes[b] <= sizes[i])
                        wrong |= check(sizes[i], sizes[a], sizes[b], foreign);
    return wrong;
}
