/* Vector kernels, one set for each instruction set, with run-time dispatch.
 *
 * The bodies are written once, as inline functions over a few primitives (which
 * words of a line are not zero, taking a whole line, the pages of a word), and
 * instantiated for each instruction set.
 */
#include "_bits/cpuid.h"
#include "_bits/simd.h"

#include <string.h>

#if defined(__SANITIZE_THREAD__)
#define DL_UNDER_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define DL_UNDER_TSAN
#endif
#endif

#define DL_INLINE static inline __attribute__((always_inline))

typedef unsigned (*dl_line_mask_fn)(const uint64_t *line);
/* Takes words of `mask` two at a time, if it can; returns which are left. */
typedef unsigned (*dl_take_pairs_fn)(uint64_t *line, unsigned mask, uint64_t *out);
typedef int (*dl_expand_singles_fn)(const uint64_t *numbers, const uint64_t *masks, int64_t *out);
typedef size_t (*dl_gather_line_fn)(const uint64_t *line, int64_t first, uint64_t *masks, int64_t *firsts);
typedef void (*dl_expand_word_fn)(uint64_t word, unsigned bits, int64_t first, int64_t *out);

#define DL_WHOLE_LINE 0xffu /* a line mask: no word of it is clean */

/* ---- bodies --------------------------------------------------------------- */

/* Others may mark meanwhile: each word is read once, whole. */
DL_INLINE uint64_t popcount_from(const uint64_t *words, size_t i, size_t n, uint64_t total)
{
#pragma GCC unroll 4
    for (; i < n; i++)
        total += (uint64_t)__builtin_popcountll(dl_load_relaxed(&words[i]));
    return total;
}

DL_INLINE uint64_t popcount_by_words(const uint64_t *words, size_t n) { return popcount_from(words, 0, n, 0); }

DL_INLINE size_t next_nonzero_body(const uint64_t *words, size_t from, size_t n, dl_line_mask_fn line_mask)
{
    for (; from + DL_LINE_WORDS <= n; from += DL_LINE_WORDS) {
        unsigned mask = line_mask(words + from);
        if (mask)
            return from + (size_t)__builtin_ctz(mask);
    }
    for (; from < n; from++)
        if (dl_load_relaxed(&words[from]))
            break;
    return from;
}

DL_INLINE uint64_t take_word(uint64_t *word, int clear)
{
    if (clear == DL_CLEAR_QUIESCENT) {
        uint64_t was = dl_load_relaxed(word);
        dl_store_relaxed(word, 0);
        return was;
    }
    return clear ? dl_exchange(word, 0) : dl_load_relaxed(word);
}

/* Which of the words [at, end) are not zero, of a line at most. */
DL_INLINE unsigned words_mask(const uint64_t *words, size_t at, size_t end, dl_line_mask_fn line_mask)
{
    if (at + DL_LINE_WORDS <= end)
        return line_mask(words + at);
    unsigned mask = 0;
    for (unsigned i = 0; at + i < end; i++)
        mask |= (unsigned)(dl_load_relaxed(&words[at + i]) != 0) << i;
    return mask;
}

/* The lines of [first_line, end_line) in one group, which has some of them. */
DL_INLINE uint64_t group_part(uint64_t group, uint64_t first_line, uint64_t end_line)
{
    uint64_t start = group * DL_GROUP_LINES, lines = DL_ALL_PAGES;
    if (first_line > start)
        lines &= dl_mask_from((unsigned)(first_line - start));
    if (end_line < start + DL_GROUP_LINES)
        lines &= dl_mask_below((unsigned)(end_line - start));
    return lines;
}

/* Note and take the lines of groups [group, end), of a line of the summary at most; returns how many groups have some. */
DL_INLINE size_t take_groups(const struct dl_bitmap *b, uint64_t group, uint64_t end, uint64_t first_line, uint64_t end_line,
                             struct dl_taken *taken, int clear, uint64_t *nlines, dl_line_mask_fn line_mask)
{
    size_t n = 0;
    for (unsigned mask = words_mask(b->summary, group, end, line_mask); mask; mask &= mask - 1) {
        uint64_t at = group + (uint64_t)__builtin_ctz(mask);
        uint64_t part = group_part(at, first_line, end_line);
        uint64_t lines = clear ? dl_summary_take(b, at, part) : dl_load_relaxed(&b->summary[at]) & part;
        taken[n].group = at;
        taken[n].lines = lines;
        n += lines != 0;
        *nlines += (uint64_t)__builtin_popcountll(lines);
    }
    return n;
}

/* I4: the top before the summary. No more spans are taken at once than there is room for the groups of, so that none is
 * left with its top bit taken and its summary not. A span of which the range has a part keeps its top bit. */
DL_INLINE size_t take_spans_body(const struct dl_bitmap *b, uint64_t first_line, uint64_t end_line, uint64_t *next,
                                 struct dl_taken *taken, size_t room, int clear, uint64_t *nlines,
                                 dl_line_mask_fn line_mask)
{
    uint64_t group = *next, end = (end_line + DL_GROUP_LINES - 1) / DL_GROUP_LINES;
    uint64_t first_span = (first_line + DL_SPAN_LINES - 1) / DL_SPAN_LINES;
    /* The last span may be shorter than others, and is whole all the same. */
    uint64_t end_span = end_line == dl_lines_for(b->npages) ? dl_spans_for(b->npages) : end_line / DL_SPAN_LINES;
    size_t n = 0;
    while (group < end && n + DL_SPAN_GROUPS <= room) {
        uint64_t span = group / DL_SPAN_GROUPS;
        if (span < first_span || span >= end_span) {
            uint64_t stop = (span + 1) * DL_SPAN_GROUPS;
            n += take_groups(b, group, stop < end ? stop : end, first_line, end_line, taken + n, clear, nlines, line_mask);
            group = stop;
            continue;
        }
        uint64_t word = next_nonzero_body(b->top, span / DL_WORD_PAGES, dl_words_for(end_span), line_mask);
        uint64_t from = word * DL_WORD_PAGES > span ? word * DL_WORD_PAGES : span;
        struct dl_part part = dl_part_first(from, end_span);
        group = ((word + 1) * DL_WORD_PAGES < end_span ? (word + 1) * DL_WORD_PAGES : end_span) * DL_SPAN_GROUPS;
        if (!part.mask) /* nothing up to the last of them */
            continue;
        uint64_t all = dl_load_relaxed(&b->top[word]) & part.mask;
        uint64_t spans = dl_lowest_bits(all, (room - n) / DL_SPAN_GROUPS);
        if (spans != all)
            group = (word * DL_WORD_PAGES + dl_ffs(all ^ spans)) * DL_SPAN_GROUPS;
        if (clear && spans)
            spans = dl_top_take(b, word, spans);
        for (; spans; spans &= spans - 1) {
            uint64_t at = (word * DL_WORD_PAGES + dl_ffs(spans)) * DL_SPAN_GROUPS, stop = at + DL_SPAN_GROUPS;
            n += take_groups(b, at, stop < end ? stop : end, first_line, end_line, taken + n, clear, nlines, line_mask);
        }
    }
    *next = group;
    return n;
}

/* I4: the summary before the words. Eight groups are tested at once; `taken` has
 * room for eight more whenever there is another turn. */
DL_INLINE size_t take_summary_body(const struct dl_bitmap *b, uint64_t first_line, uint64_t end_line, uint64_t *next,
                                   struct dl_taken *taken, size_t room, int clear, uint64_t *nlines,
                                   dl_line_mask_fn line_mask)
{
    if (b->top)
        return take_spans_body(b, first_line, end_line, next, taken, room, clear, nlines, line_mask);
    uint64_t group = *next, end = (end_line + DL_GROUP_LINES - 1) / DL_GROUP_LINES;
    size_t n = 0;
    for (; group < end && n + DL_LINE_WORDS <= room; group += DL_LINE_WORDS) {
        uint64_t stop = group + DL_LINE_WORDS;
        n += take_groups(b, group, stop < end ? stop : end, first_line, end_line, taken + n, clear, nlines, line_mask);
    }
    *next = group;
    return n;
}

/* ---- one line: which of its words are not zero is found at once, for all of them,
 * and those are taken. A mark that comes in between finds the summary bit taken and
 * sets it again (I4), or, without a summary, is for the next harvest. ---- */

/* A word that was not zero may have been taken by another harvester since: an empty
 * exchange is no entry. */
DL_INLINE size_t take_line_sparse(uint64_t *words, size_t at, unsigned mask, uint64_t *numbers, uint64_t *masks,
                                  size_t count, int clear)
{
    for (; mask; mask &= mask - 1) {
        size_t word = at + (size_t)__builtin_ctz(mask);
        numbers[count] = word;
        masks[count] = take_word(&words[word], clear);
        count += masks[count] != 0;
    }
    return count;
}

DL_INLINE void take_words(uint64_t *line, unsigned mask, uint64_t *out, int clear, dl_take_pairs_fn take_pairs)
{
    if (clear && clear != DL_CLEAR_QUIESCENT)
        mask = take_pairs(line, mask, out);
    for (; mask; mask &= mask - 1) {
        unsigned i = (unsigned)__builtin_ctz(mask);
        out[i] = take_word(&line[i], clear);
    }
}

DL_INLINE void take_line_dense(uint64_t *words, size_t at, unsigned mask, uint64_t *out, int clear,
                               dl_take_pairs_fn take_pairs)
{
    if (mask == DL_WHOLE_LINE && clear == DL_CLEAR_QUIESCENT) {
        dl_move_line(words + at, out + at);
        return;
    }
    if (mask == DL_WHOLE_LINE && clear) {
        /* Written behind the locked instructions, each of which waits for the stores before it. Word by word: one vector
         * that is loaded from what was stored in parts would wait as well. */
        uint64_t line[DL_LINE_WORDS];
        take_words(words + at, DL_WHOLE_LINE, line, clear, take_pairs);
        for (unsigned i = 0; i < DL_LINE_WORDS; i++)
            dl_store_relaxed(&out[at + i], line[i]);
        return;
    }
    take_words(words + at, mask, out + at, clear, take_pairs);
}

/* ---- the lines that a summary named; our own words, so that the last line is whole ---- */

/* Lines asked for before they are taken, which covers a miss in every cache. */
#define DL_AHEAD_LINES 48u

DL_INLINE unsigned prefetch_lines(const uint64_t *words, const struct dl_taken *taken)
{
    for (uint64_t lines = taken->lines; lines; lines &= lines - 1)
        __builtin_prefetch(words + taken->group * DL_GROUP_WORDS + dl_ffs(lines) * DL_LINE_WORDS, 1);
    return (unsigned)__builtin_popcountll(taken->lines);
}

DL_INLINE size_t take_lines_sparse_body(uint64_t *words, const struct dl_taken *taken, size_t groups, uint64_t *numbers,
                                        uint64_t *masks, int clear, dl_line_mask_fn line_mask)
{
    size_t count = 0, next = 0;
    unsigned ahead = 0;
    for (size_t i = 0; i < groups; i++) {
        while (next < groups && ahead < DL_AHEAD_LINES)
            ahead += prefetch_lines(words, &taken[next++]);
        ahead -= (unsigned)__builtin_popcountll(taken[i].lines);
        for (uint64_t lines = taken[i].lines; lines; lines &= lines - 1) {
            size_t at = taken[i].group * DL_GROUP_WORDS + dl_ffs(lines) * (size_t)DL_LINE_WORDS;
            count = take_line_sparse(words, at, line_mask(words + at), numbers, masks, count, clear);
        }
    }
    return count;
}

/* Most lines are dirty: the processor's own prefetcher does as well. */
DL_INLINE void take_lines_dense_body(uint64_t *words, const struct dl_taken *taken, size_t groups, uint64_t *out, int clear,
                                     dl_line_mask_fn line_mask, dl_take_pairs_fn take_pairs)
{
    for (size_t i = 0; i < groups; i++)
        for (uint64_t lines = taken[i].lines; lines; lines &= lines - 1) {
            size_t at = taken[i].group * DL_GROUP_WORDS + dl_ffs(lines) * (size_t)DL_LINE_WORDS;
            take_line_dense(words, at, line_mask(words + at), out, clear, take_pairs);
        }
}

/* ---- every line of some words, whose summary nobody keeps ---- */

DL_INLINE void take_dense_body(uint64_t *words, size_t n, uint64_t *out, int clear, dl_line_mask_fn line_mask,
                               dl_take_pairs_fn take_pairs)
{
    for (size_t at = 0; at < n; at += DL_LINE_WORDS)
        take_line_dense(words, at, words_mask(words, at, n, line_mask), out, clear, take_pairs);
}

DL_INLINE size_t take_sparse_body(uint64_t *words, size_t first, size_t end, uint64_t *numbers, uint64_t *masks, int clear,
                                  dl_line_mask_fn line_mask)
{
    size_t count = 0;
    for (size_t at = first; at < end; at += DL_LINE_WORDS)
        count = take_line_sparse(words, at, words_mask(words, at, end, line_mask), numbers, masks, count, clear);
    return count;
}

/* The word by word way, for the end of the output, where a vector store could
 * reach past it. */
DL_INLINE size_t expand_word_exactly(uint64_t word, int64_t first, int64_t *out, size_t room)
{
    size_t count = 0;
    for (; word && count < room; word &= word - 1)
        out[count++] = first + (int64_t)dl_ffs(word);
    return count;
}

DL_INLINE size_t expand_word(uint64_t word, int64_t first, int64_t *out, size_t count, size_t capacity,
                             dl_expand_word_fn expand)
{
    if (capacity - count < DL_WORD_PAGES)
        return count + expand_word_exactly(word, first, out + count, capacity - count);
    unsigned bits = (unsigned)__builtin_popcountll(word);
    expand(word, bits, first, out + count);
    return count + bits;
}

/* Which of a line's words are clean is anybody's guess where some are, and a loop over the others would end on a wrong
 * one in nearly every line: these are gathered first. A block that begins with a line of dirty words is spared that. */
#define DL_EXPAND_WORDS 256

DL_INLINE size_t expand_body(const uint64_t *words, size_t n, int64_t first, int64_t *out, size_t capacity,
                             dl_line_mask_fn line_mask, dl_gather_line_fn gather_line, dl_expand_word_fn expand)
{
    uint64_t gathered[DL_EXPAND_WORDS];
    int64_t firsts[DL_EXPAND_WORDS];
    size_t count = 0, i = 0;
    while (i < n) {
        size_t found = 0, end = n - i < DL_EXPAND_WORDS ? n : i + DL_EXPAND_WORDS;
        if (end - i >= DL_LINE_WORDS && line_mask(words + i) != DL_WHOLE_LINE)
            for (; i + DL_LINE_WORDS <= end; i += DL_LINE_WORDS)
                found += gather_line(words + i, first + (int64_t)(i * DL_WORD_PAGES), gathered + found, firsts + found);
        for (size_t at = 0; at < found; at++)
            count = expand_word(gathered[at], firsts[at], out, count, capacity, expand);
        for (; i < end; i++) {
            uint64_t word = dl_load_relaxed(&words[i]);
            if (word)
                count = expand_word(word, first + (int64_t)(i * DL_WORD_PAGES), out, count, capacity, expand);
        }
    }
    return count;
}

/* Where little is dirty most words have one page: eight such entries are one store. */
DL_INLINE size_t expand_sparse_body(const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out, size_t capacity,
                                    dl_expand_singles_fn expand_singles, dl_expand_word_fn expand)
{
    size_t count = 0, i = 0;
    while (i < n) {
        if (n - i >= DL_LINE_WORDS && capacity - count >= DL_LINE_WORDS && expand_singles(numbers + i, masks + i, out + count)) {
            count += DL_LINE_WORDS;
            i += DL_LINE_WORDS;
            continue;
        }
        for (size_t end = n - i < DL_LINE_WORDS ? n : i + DL_LINE_WORDS; i < end; i++)
            count = expand_word(masks[i], (int64_t)(numbers[i] * DL_WORD_PAGES), out, count, capacity, expand);
    }
    return count;
}

/* Where words are taken, once for each of the two ways: no loop has to ask which it is. */
#define DL_INSTANTIATE(path, attributes)                                                                                   \
    attributes static uint64_t popcount_##path(const uint64_t *words, size_t n)                                            \
    {                                                                                                                      \
        return popcount_words_##path(words, n);                                                                            \
    }                                                                                                                      \
    attributes static size_t next_nonzero_##path(const uint64_t *words, size_t from, size_t n)                             \
    {                                                                                                                      \
        return next_nonzero_body(words, from, n, line_mask_##path);                                                        \
    }                                                                                                                      \
    attributes static size_t take_summary_##path(const struct dl_bitmap *b, uint64_t first_line, uint64_t end_line,        \
                                                 uint64_t *next, struct dl_taken *taken, size_t room, int clear,           \
                                                 uint64_t *nlines)                                                         \
    {                                                                                                                      \
        return take_summary_body(b, first_line, end_line, next, taken, room, clear, nlines, line_mask_##path);             \
    }                                                                                                                      \
    attributes static void take_dense_##path(uint64_t *words, size_t n, uint64_t *out, int clear)                          \
    {                                                                                                                      \
        if (clear == DL_CLEAR_QUIESCENT)                                                                                   \
            take_dense_body(words, n, out, DL_CLEAR_QUIESCENT, line_mask_##path, take_pairs_##path);                       \
        else                                                                                                               \
            take_dense_body(words, n, out, clear != DL_LEAVE, line_mask_##path, take_pairs_##path);                        \
    }                                                                                                                      \
    attributes static size_t take_sparse_##path(uint64_t *words, size_t first, size_t end, uint64_t *numbers,              \
                                                uint64_t *masks, int clear)                                                \
    {                                                                                                                      \
        if (clear == DL_CLEAR_QUIESCENT)                                                                                   \
            return take_sparse_body(words, first, end, numbers, masks, DL_CLEAR_QUIESCENT, line_mask_##path);              \
        return take_sparse_body(words, first, end, numbers, masks, clear != DL_LEAVE, line_mask_##path);                   \
    }                                                                                                                      \
    attributes static void take_lines_dense_##path(uint64_t *words, const struct dl_taken *taken, size_t groups,           \
                                                   uint64_t *out, int clear)                                               \
    {                                                                                                                      \
        if (clear == DL_CLEAR_QUIESCENT)                                                                                   \
            take_lines_dense_body(words, taken, groups, out, DL_CLEAR_QUIESCENT, line_mask_##path, take_pairs_##path);     \
        else                                                                                                               \
            take_lines_dense_body(words, taken, groups, out, clear != DL_LEAVE, line_mask_##path, take_pairs_##path);      \
    }                                                                                                                      \
    attributes static size_t take_lines_sparse_##path(uint64_t *words, const struct dl_taken *taken, size_t groups,        \
                                                      uint64_t *numbers, uint64_t *masks, int clear)                       \
    {                                                                                                                      \
        if (clear == DL_CLEAR_QUIESCENT)                                                                                   \
            return take_lines_sparse_body(words, taken, groups, numbers, masks, DL_CLEAR_QUIESCENT, line_mask_##path);     \
        return take_lines_sparse_body(words, taken, groups, numbers, masks, clear != DL_LEAVE, line_mask_##path);          \
    }                                                                                                                      \
    attributes static size_t expand_##path(const uint64_t *words, size_t n, int64_t first, int64_t *out, size_t capacity)  \
    {                                                                                                                      \
        return expand_body(words, n, first, out, capacity, line_mask_##path, gather_line_##path,                           \
                           expand_word_##path);                                                                            \
    }                                                                                                                      \
    attributes static size_t expand_sparse_##path(const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out,  \
                                                  size_t capacity)                                                         \
    {                                                                                                                      \
        return expand_sparse_body(numbers, masks, n, out, capacity, expand_singles_##path, expand_word_##path);            \
    }                                                                                                                      \
    static const struct dl_kernels kernels_##path = {                                                                      \
        #path,                                                                                                             \
        popcount_##path,                                                                                                   \
        next_nonzero_##path,                                                                                               \
        take_summary_##path,                                                                                               \
        take_dense_##path,                                                                                                 \
        take_sparse_##path,                                                                                                \
        take_lines_dense_##path,                                                                                           \
        take_lines_sparse_##path,                                                                                          \
        expand_##path,                                                                                                     \
        expand_sparse_##path,                                                                                              \
    };

/* ---- scalar ---------------------------------------------------------------- */

DL_INLINE unsigned line_mask_scalar(const uint64_t *line)
{
    unsigned mask = 0;
    for (unsigned i = 0; i < DL_LINE_WORDS; i++)
        mask |= (unsigned)(dl_load_relaxed(&line[i]) != 0) << i;
    return mask;
}

DL_INLINE unsigned take_pairs_scalar(uint64_t *line, unsigned mask, uint64_t *out)
{
    (void)line, (void)out;
    return mask;
}

#define popcount_words_scalar popcount_by_words

DL_INLINE size_t gather_line_scalar(const uint64_t *line, int64_t first, uint64_t *masks, int64_t *firsts)
{
    size_t found = 0;
    for (size_t i = 0; i < DL_LINE_WORDS; i++) {
        masks[found] = dl_load_relaxed(&line[i]);
        firsts[found] = first + (int64_t)(i * DL_WORD_PAGES);
        found += masks[found] != 0;
    }
    return found;
}

DL_INLINE int expand_singles_scalar(const uint64_t *numbers, const uint64_t *masks, int64_t *out)
{
    (void)numbers, (void)masks, (void)out;
    return 0;
}

DL_INLINE void expand_word_scalar(uint64_t word, unsigned bits, int64_t first, int64_t *out)
{
    (void)bits;
    for (; word; word &= word - 1)
        *out++ = first + (int64_t)dl_ffs(word);
}

DL_INSTANTIATE(scalar, )

#if defined(__x86_64__) || defined(__aarch64__)
/* Positions of the set bits of a byte, one a byte of the entry. Filled when the module is
 * loaded, before any thread can call a kernel. */
static uint64_t byte_positions[256];

__attribute__((constructor)) static void fill_byte_positions(void)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        uint64_t entry = 0;
        unsigned at = 0;
        for (unsigned bit = 0; bit < 8; bit++)
            if (byte >> bit & 1)
                entry |= (uint64_t)bit << (8 * at++);
        byte_positions[byte] = entry;
    }
}

#endif

#if defined(__aarch64__)
#include <arm_neon.h>

/* ---- NEON, which every 64-bit Arm processor has: nothing has to be asked ------------------ */

DL_INLINE unsigned line_mask_neon(const uint64_t *line)
{
    static const uint16_t weights[DL_LINE_WORDS] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint64x2_t a = vld1q_u64(line), b = vld1q_u64(line + 2), c = vld1q_u64(line + 4), d = vld1q_u64(line + 6);
    uint64x2_t any = vorrq_u64(vorrq_u64(a, b), vorrq_u64(c, d));
    if (!(vgetq_lane_u64(any, 0) | vgetq_lane_u64(any, 1)))
        return 0;
    uint32x4_t low = vcombine_u32(vmovn_u64(vtstq_u64(a, a)), vmovn_u64(vtstq_u64(b, b)));
    uint32x4_t high = vcombine_u32(vmovn_u64(vtstq_u64(c, c)), vmovn_u64(vtstq_u64(d, d)));
    uint16x8_t dirty = vcombine_u16(vmovn_u32(low), vmovn_u32(high));
    return vaddvq_u16(vandq_u16(dirty, vld1q_u16(weights)));
}

#define popcount_words_neon popcount_by_words
#define take_pairs_neon take_pairs_scalar
#define expand_singles_neon expand_singles_scalar
#define gather_line_neon gather_line_scalar

/* Eight numbers for each byte, as on AVX2: past the last one, within the 64 that expand_word() has made sure of. */
DL_INLINE void expand_word_neon(uint64_t word, unsigned bits, int64_t first, int64_t *out)
{
    if (bits <= 6) {
        expand_word_scalar(word, bits, first, out);
        return;
    }
    for (unsigned byte = 0; byte < 8; byte++, word >>= 8, first += 8) {
        uint16x8_t positions = vmovl_u8(vcreate_u8(byte_positions[word & 0xff]));
        uint32x4_t low = vmovl_u16(vget_low_u16(positions)), high = vmovl_u16(vget_high_u16(positions));
        uint64x2_t start = vdupq_n_u64((uint64_t)first);
        uint64_t *to = (uint64_t *)out;
        vst1q_u64(to, vaddw_u32(start, vget_low_u32(low)));
        vst1q_u64(to + 2, vaddw_u32(start, vget_high_u32(low)));
        vst1q_u64(to + 4, vaddw_u32(start, vget_low_u32(high)));
        vst1q_u64(to + 6, vaddw_u32(start, vget_high_u32(high)));
        out += __builtin_popcountll(word & 0xff);
    }
}

DL_INSTANTIATE(neon, )
#endif /* __aarch64__ */

#if defined(__x86_64__)
#include <immintrin.h>

/* ---- dirty words of a line, two at a time ----------------------------------------- */

#define DL_CX16 __attribute__((target("cx16")))

typedef unsigned __int128 dl_pair __attribute__((may_alias));

/* I8: one locked instruction for two words: a dense harvest is bound by their number.
 * It is a full barrier like the exchanges that it stands for, and other processors'
 * locked operations on either word come before it or after it, since all of them
 * hold the line. If a mark came in between it takes nothing, and the words are
 * exchanged one by one: nobody waits for anybody. */
DL_CX16 DL_INLINE void take_pair(uint64_t *words, uint64_t *out)
{
    dl_pair seen = (dl_pair)dl_load_relaxed(&words[1]) << 64 | dl_load_relaxed(&words[0]);
    if (__sync_bool_compare_and_swap((dl_pair *)words, seen, 0)) {
        out[0] = (uint64_t)seen;
        out[1] = (uint64_t)(seen >> 64);
    } else {
        out[0] = dl_exchange(&words[0], 0);
        out[1] = dl_exchange(&words[1], 0);
    }
}

/* Those of which both words are dirty: all of them where much is, and where 1 % of all pages are, they save a quarter of
 * the locked instructions. Foreign words may be aligned to 8 bytes only. */
DL_CX16 DL_INLINE unsigned take_dirty_pairs(uint64_t *line, unsigned mask, uint64_t *out)
{
    if ((uintptr_t)line % sizeof(dl_pair))
        return mask;
    if (mask == DL_WHOLE_LINE) { /* known where this is inlined: no loop over bits */
        for (unsigned i = 0; i < DL_LINE_WORDS; i += 2)
            take_pair(line + i, out + i);
        return 0;
    }
    unsigned pairs = mask & mask >> 1 & 0x55;
    for (unsigned left = pairs; left; left &= left - 1) {
        unsigned i = (unsigned)__builtin_ctz(left);
        take_pair(line + i, out + i);
    }
    return mask & ~(pairs | pairs << 1);
}

/* ThreadSanitizer takes the two words by a routine of its own, which other threads' marks of one
 * word do not respect: there each word is exchanged. */
#ifdef DL_UNDER_TSAN
#define take_pairs_vector take_pairs_scalar
#else
#define take_pairs_vector take_dirty_pairs
#endif
#define take_pairs_avx2 take_pairs_vector
#define take_pairs_avx512 take_pairs_vector

/* ---- AVX2: eight bits by a table of their positions ------------------------- */

#define DL_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt,cx16")))

DL_AVX2 DL_INLINE unsigned dirty_of_avx2(__m256i low, __m256i high)
{
    __m256i any = _mm256_or_si256(low, high);
    if (_mm256_testz_si256(any, any))
        return 0;
    __m256i zero = _mm256_setzero_si256();
    unsigned clean = (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(low, zero))) |
                     (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(high, zero))) << 4;
    return ~clean & 0xff;
}

DL_AVX2 DL_INLINE unsigned line_mask_avx2(const uint64_t *line)
{
    return dirty_of_avx2(_mm256_loadu_si256((const __m256i *)line), _mm256_loadu_si256((const __m256i *)(line + 4)));
}

#define popcount_words_avx2 popcount_by_words

/* Of four words, the halves of those in a mask, one after the other: a byte each, lowest first. */
static const uint64_t halves_of[16] = {
    0,      0x0100,     0x0302,     0x03020100,     0x0504,     0x05040100,     0x05040302,     0x050403020100,
    0x0706, 0x07060100, 0x07060302, 0x070603020100, 0x07060504, 0x070605040100, 0x070605040302, 0x0706050403020100,
};

/* Writes four words and four numbers, of which those of `dirty` come first. */
DL_AVX2 DL_INLINE size_t gather_four_avx2(__m256i words, unsigned dirty, int64_t first, uint64_t *masks, int64_t *firsts)
{
    __m256i halves = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)halves_of[dirty]));
    __m256i starts = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 64, 128, 192));
    _mm256_storeu_si256((__m256i *)masks, _mm256_permutevar8x32_epi32(words, halves));
    _mm256_storeu_si256((__m256i *)firsts, _mm256_permutevar8x32_epi32(starts, halves));
    return (size_t)__builtin_popcount(dirty);
}

DL_AVX2 DL_INLINE size_t gather_line_avx2(const uint64_t *line, int64_t first, uint64_t *masks, int64_t *firsts)
{
    __m256i low = _mm256_loadu_si256((const __m256i *)line), high = _mm256_loadu_si256((const __m256i *)(line + 4));
    unsigned dirty = dirty_of_avx2(low, high);
    if (!dirty)
        return 0;
    size_t found = gather_four_avx2(low, dirty & 15, first, masks, firsts);
    return found + gather_four_avx2(high, dirty >> 4, first + 4 * DL_WORD_PAGES, masks + found, firsts + found);
}

/* The pages of eight entries, none of them empty, if each has one; nothing is written otherwise. */
DL_AVX2 DL_INLINE int expand_singles_avx2(const uint64_t *numbers, const uint64_t *masks, int64_t *out)
{
    __m256i less = _mm256_set1_epi64x(-1);
    __m256i low = _mm256_loadu_si256((const __m256i *)masks), high = _mm256_loadu_si256((const __m256i *)(masks + 4));
    if (!_mm256_testz_si256(low, _mm256_add_epi64(low, less)) || !_mm256_testz_si256(high, _mm256_add_epi64(high, less)))
        return 0;
    for (unsigned i = 0; i < DL_LINE_WORDS; i++)
        out[i] = (int64_t)(numbers[i] * DL_WORD_PAGES + _tzcnt_u64(masks[i]));
    return 1;
}

/* Writes up to 8 numbers past the last one, within the 64 that expand_word()
 * has made sure of: a byte's numbers never start past 56. */
DL_AVX2 DL_INLINE void expand_word_avx2(uint64_t word, unsigned bits, int64_t first, int64_t *out)
{
    if (bits <= 8) {
        for (unsigned i = 0; i < 4; i++, word = _blsr_u64(word))
            out[i] = first + (int64_t)_tzcnt_u64(word);
        if (bits <= 4)
            return;
        for (unsigned i = 4; i < 8; i++, word = _blsr_u64(word))
            out[i] = first + (int64_t)_tzcnt_u64(word);
        return;
    }
    for (unsigned byte = 0; byte < 8; byte++, word >>= 8, first += 8) {
        __m128i positions = _mm_cvtsi64_si128((long long)byte_positions[word & 0xff]);
        __m256i start = _mm256_set1_epi64x(first);
        _mm256_storeu_si256((__m256i *)out, _mm256_add_epi64(start, _mm256_cvtepu8_epi64(positions)));
        _mm256_storeu_si256((__m256i *)(out + 4),
                            _mm256_add_epi64(start, _mm256_cvtepu8_epi64(_mm_srli_si128(positions, 4))));
        out += __builtin_popcountll(word & 0xff);
    }
}

DL_INSTANTIATE(avx2, DL_AVX2)

/* ---- AVX-512: compress 64 positions in a register, then store ---------------- */

#define DL_AVX512                                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt,lzcnt,cx16")))

DL_AVX512 DL_INLINE unsigned line_mask_avx512(const uint64_t *line)
{
    __m512i words = _mm512_loadu_si512(line);
    return _mm512_test_epi64_mask(words, words);
}

/* Eight words at a time: a vector load has no atomic form, and moves each aligned word whole, as line_mask_avx512() does. */
DL_AVX512 DL_INLINE uint64_t popcount_words_avx512(const uint64_t *words, size_t n)
{
    __m512i even = _mm512_setzero_si512(), odd = even;
    size_t i = 0;
    for (; i + 2 * DL_LINE_WORDS <= n; i += 2 * DL_LINE_WORDS) {
        even = _mm512_add_epi64(even, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
        odd = _mm512_add_epi64(odd, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + DL_LINE_WORDS)));
    }
    if (i + DL_LINE_WORDS <= n) {
        even = _mm512_add_epi64(even, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
        i += DL_LINE_WORDS;
    }
    return popcount_from(words, i, n, (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(even, odd)));
}

DL_AVX512 DL_INLINE size_t gather_line_avx512(const uint64_t *line, int64_t first, uint64_t *masks, int64_t *firsts)
{
    __m512i words = _mm512_loadu_si512(line);
    __m512i starts = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 64, 128, 192, 256, 320, 384, 448));
    __mmask8 found = _mm512_test_epi64_mask(words, words);
    if (!found)
        return 0;
    _mm512_storeu_si512(masks, _mm512_maskz_compress_epi64(found, words));
    _mm512_storeu_si512(firsts, _mm512_maskz_compress_epi64(found, starts));
    return (size_t)__builtin_popcount(found);
}

/* The pages of eight entries, if each has one; nothing is written otherwise. */
DL_AVX512 DL_INLINE int expand_singles_avx512(const uint64_t *numbers, const uint64_t *masks, int64_t *out)
{
    __m512i one = _mm512_set1_epi64(1), words = _mm512_loadu_si512(masks);
    if (_mm512_cmpneq_epi64_mask(_mm512_popcnt_epi64(words), one))
        return 0;
    __m512i pages = _mm512_popcnt_epi64(_mm512_sub_epi64(words, one)); /* below the one bit: its place */
    _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_slli_epi64(_mm512_loadu_si512(numbers), 6), pages));
    return 1;
}

/* Eight numbers a store, the last store reaching past the word's last number; never past the 64 that expand_word() has made
 * sure of. Whether there are more is not asked before each store: a branch mispredicted costs more than a few stores. */
DL_AVX512 DL_INLINE void expand_word_avx512(uint64_t word, unsigned bits, int64_t first, int64_t *out)
{
    static const uint8_t every_position[64] __attribute__((aligned(64))) = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
        32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
    };
    __m512i start = _mm512_set1_epi64(first);
    __m512i positions = _mm512_maskz_compress_epi8(word, _mm512_load_si512(every_position));
    __m128i part = _mm512_castsi512_si128(positions);
    _mm512_storeu_si512(out, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(part)));
    if (bits <= 8)
        return;
    _mm512_storeu_si512(out + 8, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(_mm_srli_si128(part, 8))));
    if (bits <= 16)
        return;
    part = _mm512_extracti32x4_epi32(positions, 1);
    _mm512_storeu_si512(out + 16, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(part)));
    _mm512_storeu_si512(out + 24, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(_mm_srli_si128(part, 8))));
    part = _mm512_extracti32x4_epi32(positions, 2);
    _mm512_storeu_si512(out + 32, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(part)));
    if (bits <= 40)
        return;
    _mm512_storeu_si512(out + 40, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(_mm_srli_si128(part, 8))));
    part = _mm512_extracti32x4_epi32(positions, 3);
    _mm512_storeu_si512(out + 48, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(part)));
    _mm512_storeu_si512(out + 56, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(_mm_srli_si128(part, 8))));
}

DL_INSTANTIATE(avx512, DL_AVX512)

/* ---- what a path needs ---------------------------------------------------------- */

/* Registers that the operating system keeps for each thread: bits of XCR0. */
#define DL_XCR0_AVX 0x06u
#define DL_XCR0_AVX512 0xe6u

static const struct dl_feature for_avx2[] = {
    {"cx16", 1, 2, 13}, {"popcnt", 1, 2, 23}, {"bmi1", 7, 1, 3},        {"avx2", 7, 1, 5},
    {"bmi2", 7, 1, 8},  {"abm", 0x80000001, 2, 5}, {NULL, 0, 0, 0},
};
static const struct dl_feature for_avx512[] = {
    {"avx512f", 7, 1, 16},      {"avx512dq", 7, 1, 17},         {"avx512bw", 7, 1, 30}, {"avx512vl", 7, 1, 31},
    {"avx512_vbmi2", 7, 2, 6}, {"avx512_vpopcntdq", 7, 2, 14}, {NULL, 0, 0, 0},
};

/* The first of these that is not there; NULL if all are. */
static const char *first_missing(const struct dl_feature *feature, unsigned xcr0, const char *registers)
{
    for (; feature->name; feature++)
        if (!dl_has_feature(feature))
            return feature->name;
    return dl_system_keeps(xcr0) ? NULL : registers;
}

static const char *missing_avx2(void) { return first_missing(for_avx2, DL_XCR0_AVX, "AVX registers of the system"); }

static const char *missing_avx512(void)
{
    const char *missing = missing_avx2();
    return missing ? missing : first_missing(for_avx512, DL_XCR0_AVX512, "AVX-512 registers of the system");
}
#endif /* __x86_64__ */

static const char *missing_nothing(void) { return NULL; }

/* ---- choice ------------------------------------------------------------------ */

static const struct {
    const struct dl_kernels *kernels;
    const char *(*missing)(void);
} every_path[] = {
#if defined(__x86_64__)
    {&kernels_avx512, missing_avx512},
    {&kernels_avx2, missing_avx2},
#elif defined(__aarch64__)
    {&kernels_neon, missing_nothing},
#endif
    {&kernels_scalar, missing_nothing},
};

const struct dl_kernels *dl_kernels_known(size_t i, const char **missing)
{
    if (i >= sizeof every_path / sizeof every_path[0])
        return NULL;
    *missing = every_path[i].missing();
    return every_path[i].kernels;
}

const struct dl_kernels *dl_kernels_at(size_t i)
{
    const struct dl_kernels *kernels;
    const char *missing;
    for (size_t known = 0; (kernels = dl_kernels_known(known, &missing)); known++)
        if (!missing && i-- == 0)
            return kernels;
    return NULL;
}

const struct dl_kernels *dl_kernels_find(const char *name)
{
    const struct dl_kernels *kernels;
    for (size_t i = 0; (kernels = dl_kernels_at(i)); i++)
        if (!name || strcmp(name, kernels->name) == 0)
            return kernels;
    return NULL;
}
