/* dirtylog for C and C++ extensions: a versioned table of functions.
 *
 *     static const struct dirtylog_api *dirtylog;
 *     ... in the module's init:  if (!(dirtylog = dirtylog_import())) return NULL;
 *     ... with the GIL:          dirtylog_bitmap *log = dirtylog->bitmap(object);
 *     ... from any thread:       dirtylog->mark(log, page);
 *
 * Functions are only ever added, at the end; what stands here keeps its place and
 * its meaning as long as DIRTYLOG_API_VERSION does. `size` tells a newer header
 * whether an older library has a function.
 *
 * Except for `bitmap`, every function may be called from any thread, with or
 * without the GIL, as long as the DirtyBitmap object is alive. None of them raises.
 */
#ifndef DIRTYLOG_CAPI_H
#define DIRTYLOG_CAPI_H

#include <stddef.h>
#include <stdint.h>

#define DIRTYLOG_API_VERSION 1u
#define DIRTYLOG_API_CAPSULE "dirtylog._C_API"

struct dl_bitmap; /* opaque: marked by these functions alone, which know all of its levels */
typedef struct dl_bitmap dirtylog_bitmap;

struct dirtylog_api {
    uint32_t version;
    uint32_t size; /* bytes of this table */

    /* The bitmap of a dirtylog.DirtyBitmap; NULL with TypeError for another object. Needs the
     * GIL. Borrowed: valid while the object lives. The argument is a PyObject *. */
    const dirtylog_bitmap *(*bitmap)(void *object);

    uint64_t (*npages)(const dirtylog_bitmap *bitmap);

    /* Mark after the store to the page: each is a full memory barrier before the mark can be
     * seen. 0, or -1 with nothing marked where a page is out of range. */
    int (*mark)(const dirtylog_bitmap *bitmap, uint64_t page);
    int (*mark_range)(const dirtylog_bitmap *bitmap, uint64_t first, uint64_t count);
    int (*mark_pages)(const dirtylog_bitmap *bitmap, const int64_t *pages, size_t n);

    /* 1, 0, or -1 where the page is out of range. */
    int (*is_dirty)(const dirtylog_bitmap *bitmap, uint64_t page);

    /* Get and clear: writes all ceil(npages / 64) words of `out`, returns how many pages were dirty. */
    uint64_t (*harvest)(const dirtylog_bitmap *bitmap, uint64_t *out);

    /* The same, many times faster where much is dirty, for a caller who knows that nobody else marks, clears or harvests
     * from the call to its return, and has heard so from those who did (a join, a lock). What is marked meanwhile all
     * the same may be lost. */
    uint64_t (*harvest_quiescent)(const dirtylog_bitmap *bitmap, uint64_t *out);

    /* How many pages are dirty; takes none. A moment's view of each word while others mark; what a harvest beside it is
     * looking at may be missing. */
    uint64_t (*count)(const dirtylog_bitmap *bitmap);

    /* Get and clear page numbers, the lowest first: at most `room` of them into `out`; returns how many. What finds no room
     * stays dirty. Fewer than `room` are all that were dirty when the call began: call until then. All of `room` may be
     * written, also what lies behind the numbers returned. Another harvest beside this one may pass over what finds no room
     * here; the next call of either has it. */
    size_t (*harvest_pages)(const dirtylog_bitmap *bitmap, int64_t *out, size_t room);
};

#ifdef Py_PYTHON_H
/* The table; NULL with ImportError if dirtylog is not there or speaks another version. */
static inline const struct dirtylog_api *dirtylog_import(void)
{
    const struct dirtylog_api *api = (const struct dirtylog_api *)PyCapsule_Import(DIRTYLOG_API_CAPSULE, 0);
    if (api && (api->version != DIRTYLOG_API_VERSION || api->size < sizeof(struct dirtylog_api))) {
        PyErr_Format(PyExc_ImportError, "dirtylog has API version %u of %u bytes; this extension was built for %u of %u",
                     (unsigned)api->version, (unsigned)api->size, (unsigned)DIRTYLOG_API_VERSION,
                     (unsigned)sizeof(struct dirtylog_api));
        return NULL;
    }
    return api;
}
#endif

#endif /* DIRTYLOG_CAPI_H */
