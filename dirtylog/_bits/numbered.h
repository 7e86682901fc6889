/* A harvest to page numbers, into memory of somebody else's that may have room for some of them only.
 *
 * I5: what finds no room stays dirty; its bits are never cleared. While there is room for all pages of some lines, those
 * lines are taken blindly, by vector code. Less than that left, it goes word by word, and in the last words bit by bit.
 */
#ifndef DIRTYLOG_NUMBERED_H
#define DIRTYLOG_NUMBERED_H

#include "_bits/harvest.h"

enum {
    DL_NUMBERED_GROUPS = 64, /* noted at once */
    DL_NUMBERED_LINES = 64,  /* taken at once: 8 KiB of entries at most, on the caller's stack */
};

struct dl_numbered {
    const struct dl_kernels *k;
    uint64_t *words;
    int64_t *out;
    size_t count, room;
};

static inline size_t dl_numbered_left(const struct dl_numbered *to) { return to->room - to->count; }

/* The pages of `mask` in one word, as many as there is room for; 0 if there is no more room, and some stay. */
static inline int dl_number_word(struct dl_numbered *to, uint64_t word, uint64_t mask)
{
    uint64_t dirty, fits;
    do {
        size_t left = dl_numbered_left(to);
        dirty = dl_load_relaxed(&to->words[word]) & mask;
        /* Where all pages of a word have room, also those that are marked after the load are taken. */
        fits = left < DL_WORD_PAGES ? dl_lowest_bits(dirty, left) : mask;
        for (uint64_t taken = dl_harvest_mask(&to->words[word], fits); taken; taken &= taken - 1)
            to->out[to->count++] = (int64_t)(word * DL_WORD_PAGES + dl_ffs(taken));
        /* If another harvest had some of those that fit, there is room for others still. */
    } while (dirty & ~fits && dl_numbered_left(to));
    return !(dirty & ~fits);
}

/* Lines for all of whose pages there is room, DL_NUMBERED_LINES of them at most. */
static inline void dl_number_lines(struct dl_numbered *to, const struct dl_taken *taken, size_t groups)
{
    uint64_t numbers[DL_NUMBERED_LINES * DL_LINE_WORDS], masks[DL_NUMBERED_LINES * DL_LINE_WORDS];
    size_t entries = to->k->take_lines_sparse(to->words, taken, groups, numbers, masks, DL_CLEAR);
    to->count += to->k->expand_sparse(numbers, masks, entries, to->out + to->count, dl_numbered_left(to));
}

/* A group with many dirty lines, for all of whose pages there is room. */
static inline void dl_number_group(struct dl_numbered *to, const struct dl_taken *taken)
{
    uint64_t copy[DL_GROUP_WORDS] = {0}, first = taken->group * DL_GROUP_WORDS;
    struct dl_taken lines = {0, taken->lines};
    to->k->take_lines_dense(to->words + first, &lines, 1, copy, DL_CLEAR);
    to->count += to->k->expand(copy, DL_GROUP_WORDS, (int64_t)(first * DL_WORD_PAGES), to->out + to->count,
                               dl_numbered_left(to));
}

/* The first of some lines, word by word; 0 if pages of it have to stay. */
static inline int dl_number_line(struct dl_numbered *to, struct dl_taken *taken)
{
    uint64_t word = taken->group * DL_GROUP_WORDS + dl_ffs(taken->lines) * (uint64_t)DL_LINE_WORDS;
    for (uint64_t end = word + DL_LINE_WORDS; word < end; word++)
        if (!dl_number_word(to, word, DL_ALL_PAGES))
            return 0;
    taken->lines &= taken->lines - 1;
    return 1;
}

static inline unsigned dl_line_count(const struct dl_taken *taken) { return (unsigned)__builtin_popcountll(taken->lines); }
static inline int dl_has_many_lines(const struct dl_taken *taken) { return dl_line_count(taken) > DL_GROUP_LINES / 2; }

/* Take from the lines noted in `n` groups; returns how many groups are done. What is left in `taken` is not: fewer than
 * `n` groups are done where there is no room for a page. */
static inline size_t dl_number_taken(struct dl_numbered *to, struct dl_taken *taken, size_t n)
{
    size_t done = 0;
    while (done < n) {
        size_t lines = dl_numbered_left(to) / DL_LINE_PAGES, end = done;
        if (lines > DL_NUMBERED_LINES)
            lines = DL_NUMBERED_LINES;
        if (lines == 0) {
            if (!dl_number_line(to, &taken[done]))
                break;
            done += taken[done].lines == 0;
        } else if (lines >= DL_GROUP_LINES && dl_has_many_lines(&taken[done])) {
            dl_number_group(to, &taken[done++]);
        } else if (dl_line_count(&taken[done]) > lines) {
            struct dl_taken some = {taken[done].group, dl_lowest_bits(taken[done].lines, lines)};
            dl_number_lines(to, &some, 1);
            taken[done].lines ^= some.lines;
        } else {
            for (; end < n && dl_line_count(&taken[end]) <= lines && !(end > done && dl_has_many_lines(&taken[end])); end++)
                lines -= dl_line_count(&taken[end]);
            dl_number_lines(to, taken + done, end - done);
            done = end;
        }
    }
    return done;
}

/* Of little room few groups are noted: those that it ends before are given back. */
static inline size_t dl_numbered_groups(const struct dl_numbered *to)
{
    size_t groups = dl_numbered_left(to) / DL_WORD_PAGES;
    return groups < DL_LINE_WORDS ? DL_LINE_WORDS : groups < DL_NUMBERED_GROUPS ? groups : DL_NUMBERED_GROUPS;
}

static inline void dl_number_own(struct dl_numbered *to, const struct dl_bitmap *b)
{
    struct dl_taken taken[DL_NUMBERED_GROUPS];
    uint64_t group = 0, nlines = 0;
    while (group < dl_groups_for(b->npages) && dl_numbered_left(to)) {
        size_t n = to->k->take_summary(b, 0, dl_lines_for(b->npages), &group, taken, dl_numbered_groups(to), 1, &nlines);
        if (n == 0)
            continue;
        dl_fence_seq_cst(); /* I4, as in dl_take_range() */
        size_t done = dl_number_taken(to, taken, n);
        /* I5: those that have not been taken to their end, the one at which it ended among them. */
        dl_summary_untake(b, taken + done, n - done);
    }
}

/* Words that no summary describes. */
static inline void dl_number_foreign(struct dl_numbered *to, const struct dl_bitmap *b)
{
    uint64_t whole = b->npages / DL_WORD_PAGES, word = 0;
    uint64_t numbers[DL_GROUP_WORDS], masks[DL_GROUP_WORDS];
    while ((word = to->k->next_nonzero(b->words, word, whole)) < whole) {
        uint64_t fit = dl_numbered_left(to) / DL_WORD_PAGES, end = whole;
        if (end - word > DL_GROUP_WORDS)
            end = word + DL_GROUP_WORDS;
        if (fit == 0) {
            if (!dl_number_word(to, word++, DL_ALL_PAGES))
                return;
            continue;
        }
        if (end - word > fit)
            end = word + fit;
        size_t entries = to->k->take_sparse(b->words, word, end, numbers, masks, DL_CLEAR);
        to->count += to->k->expand_sparse(numbers, masks, entries, to->out + to->count, dl_numbered_left(to));
        word = end;
    }
    /* I7: whoever shares the memory may set bits past the last page; they are not ours. */
    if (b->npages % DL_WORD_PAGES)
        dl_number_word(to, whole, dl_tail_mask(b->npages));
}

/* Get and clear pages, the lowest first, as many as there is room for; returns how many. Fewer than `room`: all that were
 * dirty when it began. Of `out` all of `room` may be written. */
static inline size_t dl_harvest_pages(const struct dl_kernels *k, const struct dl_bitmap *b, int64_t *out, size_t room)
{
    struct dl_numbered to = {k, b->words, out, 0, room};
    if (b->summary)
        dl_number_own(&to, b);
    else
        dl_number_foreign(&to, b);
    dl_harvest_end();
    return to.count;
}

#endif /* DIRTYLOG_NUMBERED_H */
