/* The numbers of a migration's protocol, and the header of a frame. */
#ifndef DIRTYLOG_MIGRATE_FORMAT_H
#define DIRTYLOG_MIGRATE_FORMAT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_bits/crc32.h"

/* The protocol's numbers, which docs/reference/migration-format.md explains. */
#define DL_FRAME_VERSION 3
#define DL_FRAME_CHECKED ((size_t)20) /* the header before its CRC */
#define DL_FRAME_HEADER ((size_t)24)
#define DL_FRAME_PREFIX ((size_t)8) /* number of extents, codec, zeros */
#define DL_FRAME_EXTENT ((size_t)16)
#define DL_FRAME_PAGES 3
#define DL_FRAME_ZEROS 4
#define DL_FRAME_DELTAS 13
#define DL_FRAME_EXTENTS ((size_t)4096)
/* The bytes that a frame may speak of, and those that it may hold. */
#define DL_FRAME_WINDOW ((size_t)1 << 20)
#define DL_FRAME_MOST (DL_FRAME_PREFIX + DL_FRAME_EXTENT * DL_FRAME_EXTENTS + DL_FRAME_WINDOW)

static inline void dl_put_le(unsigned char *out, uint64_t value, int nbytes)
{
    for (int i = 0; i < nbytes; i++)
        out[i] = (unsigned char)(value >> 8 * i);
}

static inline uint64_t dl_take_le(const unsigned char *data, int nbytes)
{
    uint64_t value = 0;
    for (int i = 0; i < nbytes; i++)
        value |= (uint64_t)data[i] << 8 * i;
    return value;
}

/* The header of a frame, of which `behind` bytes stand behind it already, and `apart` bytes follow whose CRC is known. */
static inline void dl_put_header(unsigned char *header, int kind, uint64_t sequence, size_t behind, uint32_t sum,
                                 size_t apart)
{
    memcpy(header, "dlog", 4);
    header[4] = DL_FRAME_VERSION;
    header[5] = (unsigned char)kind;
    header[6] = header[7] = 0;
    dl_put_le(header + 8, sequence, 4);
    dl_put_le(header + 12, behind + apart, 8);
    uint32_t crc = dl_crc32(header, DL_FRAME_CHECKED, 0);
    crc = dl_crc32(header + DL_FRAME_HEADER, behind, crc);
    if (apart)
        crc = dl_crc32_join(crc, sum, apart);
    dl_put_le(header + DL_FRAME_CHECKED, crc, 4);
}

#endif /* DIRTYLOG_MIGRATE_FORMAT_H */
