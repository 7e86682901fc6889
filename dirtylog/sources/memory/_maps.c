/* Asks the kernel what is mapped where: for one address by PROCMAP_QUERY, else by its list as text. */
#define _GNU_SOURCE
#include "_maps.h"

#include <errno.h>

#ifdef __linux__

#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "sources/_pagemap.h"

/* Declared here under a name of our own, because the distribution's headers may be older or newer. */
struct query {
    uint64_t size, flags, address;
    uint64_t start, end, vma_flags, page_size, offset, inode;
    uint32_t major, minor, name_size, build_id_size;
    uint64_t name, build_id;
};
#define QUERY _IOWR('f', 17, struct query)
#define QUERY_READABLE 0x01
#define QUERY_WRITABLE 0x02
#define QUERY_EXECUTABLE 0x04
#define QUERY_SHARED 0x08
#define QUERY_COVERING_OR_NEXT 0x10

#define NAME_BYTES 512 /* enough to tell what a mapping is; a longer path is cut */

static int walk_by_query(int file, uint64_t start, uint64_t end, int with_names, dl_mapping_visitor *visit,
                         void *context, int *answer)
{
    uint64_t at = start;

    while (at < end) {
        char name[NAME_BYTES] = "";
        struct query query = {
            .size = sizeof query,
            .flags = QUERY_COVERING_OR_NEXT,
            .address = at,
            .name = with_names ? (uint64_t)(uintptr_t)name : 0,
            .name_size = with_names ? sizeof name : 0,
        };
        int error = ioctl(file, QUERY, &query) < 0 ? errno : 0;

        if (error == ENAMETOOLONG) {
            query.name = query.name_size = 0;
            error = ioctl(file, QUERY, &query) < 0 ? errno : 0;
            name[0] = '/';
        }
        /* No mapping at or after the address. */
        if (error == ENOENT)
            return 0;
        if (error)
            return -error;
        if (query.start >= end)
            return 0;
        struct dl_mapping mapping = {
            .start = query.start,
            .end = query.end,
            .permissions = {query.vma_flags & QUERY_READABLE ? 'r' : '-', query.vma_flags & QUERY_WRITABLE ? 'w' : '-',
                            query.vma_flags & QUERY_EXECUTABLE ? 'x' : '-', query.vma_flags & QUERY_SHARED ? 's' : 'p'},
            .page_size = query.page_size,
            .inode = query.inode,
            .major = query.major,
            .minor = query.minor,
        };
        *answer = visit(&mapping, name, context);
        if (*answer)
            return 0;
        at = query.end;
    }
    return 0;
}

/* What one line says, read a character at a time: "start-end rwxp offset major:minor inode   name". */
struct line {
    struct dl_mapping mapping;
    uint64_t numbers[6]; /* start, end, offset, major, minor, inode */
    unsigned field, letters, length;
    char name[NAME_BYTES];
};

static void read_character(struct line *line, char c)
{
    /* The fields in order: numbers 0 and 1, the permissions, then numbers 2 to 5, then the name. */
    unsigned number = line->field < 2 ? line->field : line->field - 1;

    if (line->field == 7) {
        if ((c != ' ' || line->length) && line->length < NAME_BYTES - 1)
            line->name[line->length++] = c;
    } else if (c == ' ' || (c == '-' && line->field == 0) || (c == ':' && line->field == 4)) {
        line->field++;
    } else if (line->field == 2) {
        if (line->letters < 4)
            line->mapping.permissions[line->letters++] = c;
    } else if (number == 5) {
        line->numbers[number] = line->numbers[number] * 10 + (uint64_t)(c - '0');
    } else {
        line->numbers[number] = line->numbers[number] << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
}

static int walk_by_text(int file, uint64_t start, uint64_t end, dl_mapping_visitor *visit, void *context, int *answer)
{
    struct line line = {.field = 0};
    uint64_t lines = 0;
    char text[2048];
    ssize_t size;

    while ((size = read(file, text, sizeof text)) > 0) {
        for (ssize_t i = 0; i < size; i++) {
            if (text[i] != '\n') {
                read_character(&line, text[i]);
                continue;
            }
            lines++;
            line.mapping.start = line.numbers[0];
            line.mapping.end = line.numbers[1];
            line.mapping.major = (uint32_t)line.numbers[3];
            line.mapping.minor = (uint32_t)line.numbers[4];
            line.mapping.inode = line.numbers[5];
            if (line.mapping.start < end && start < line.mapping.end) {
                *answer = visit(&line.mapping, line.name, context);
                if (*answer)
                    return 0;
            }
            line = (struct line){.field = 0};
        }
    }
    /* A process has at least the mapping of the code that asks. */
    return size < 0 ? -errno : lines ? 0 : -ENOENT;
}

int dl_maps_walk(uint64_t start, uint64_t end, int with_names, dl_mapping_visitor *visit, void *context)
{
    /* Not "self": its memory is gone once the process's first thread has ended. */
    int file = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC), answer = 0, error;

    if (file < 0)
        return -errno;
    error = walk_by_query(file, start, end, with_names, visit, context, &answer);
    if (error == -ENOTTY || error == -EINVAL)
        error = walk_by_text(file, start, end, visit, context, &answer);
    close(file);
    return error ? error : answer;
}

static int refuse_unreadable(const struct dl_mapping *mapping, const char *name, void *context)
{
    return mapping->permissions[0] == 'r' ? 0 : -EACCES;
}

int dl_maps_readable(uint64_t start, uint64_t end)
{
    int pagemap, found = 0;

    if (dl_maps_walk(start, end, 0, refuse_unreadable, NULL) == -EACCES)
        return -EACCES;
    pagemap = open("/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        return 0;
    while (found == 0 && start < end)
        found = dl_pagemap_guard(pagemap, &start, end);
    close(pagemap);
    return found > 0 ? -EACCES : 0;
}

#else

int dl_maps_walk(uint64_t start, uint64_t end, int with_names, dl_mapping_visitor *visit, void *context)
{
    return -ENOSYS;
}

int dl_maps_readable(uint64_t start, uint64_t end) { return 0; }

#endif
