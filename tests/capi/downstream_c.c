/* An extension of another package that marks through dirtylog's table of functions. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dirtylog/capi.h"

static const struct dirtylog_api *dirtylog;

/* mark_many(bitmap, first, count): without the GIL, page by page; returns how many were refused. */
static PyObject *mark_many(PyObject *self, PyObject *args)
{
    PyObject *object;
    unsigned long long first, count;
    unsigned long refused = 0;
    if (!PyArg_ParseTuple(args, "OKK", &object, &first, &count))
        return NULL;
    const dirtylog_bitmap *bitmap = dirtylog->bitmap(object);
    if (!bitmap)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (unsigned long long page = first; page < first + count; page++)
        refused += dirtylog->mark(bitmap, page) != 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(refused);
}

/* everything(bitmap, out): what each of the other functions answers. */
static PyObject *everything(PyObject *self, PyObject *args)
{
    PyObject *object;
    Py_buffer out;
    if (!PyArg_ParseTuple(args, "Ow*", &object, &out))
        return NULL;
    const dirtylog_bitmap *bitmap = dirtylog->bitmap(object);
    if (!bitmap) {
        PyBuffer_Release(&out);
        return NULL;
    }
    uint64_t npages = dirtylog->npages(bitmap);
    const int64_t good[] = {1, 3}, bad[] = {5, -1};
    int range = dirtylog->mark_range(bitmap, npages - 2, 2);
    int past = dirtylog->mark_range(bitmap, npages - 2, 3);
    int pages = dirtylog->mark_pages(bitmap, good, 2);
    int wrong = dirtylog->mark_pages(bitmap, bad, 2);
    int dirty = dirtylog->is_dirty(bitmap, 3), clean = dirtylog->is_dirty(bitmap, 5);
    int outside = dirtylog->is_dirty(bitmap, npages);
    uint64_t harvested = dirtylog->harvest(bitmap, out.buf);
    dirtylog->mark_range(bitmap, 60, npages - 60);
    uint64_t moved = dirtylog->harvest_quiescent(bitmap, out.buf);
    int64_t numbers[3];
    dirtylog->mark_range(bitmap, 62, 4);
    uint64_t count = dirtylog->count(bitmap);
    size_t some = dirtylog->harvest_pages(bitmap, numbers, 3), rest = dirtylog->harvest_pages(bitmap, numbers, 3);
    PyBuffer_Release(&out);
    return Py_BuildValue("KiiiiiiiKKKnnL", (unsigned long long)npages, range, past, pages, wrong, dirty, clean, outside,
                         (unsigned long long)harvested, (unsigned long long)moved, (unsigned long long)count,
                         (Py_ssize_t)some, (Py_ssize_t)rest, (long long)numbers[0]);
}

static PyMethodDef methods[] = {
    {"mark_many", mark_many, METH_VARARGS, NULL},
    {"everything", everything, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "downstream_c", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_downstream_c(void)
{
    if (!(dirtylog = dirtylog_import()))
        return NULL;
    PyObject *made = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    /* Or the whole process gets a GIL when it imports this. */
    if (made)
        PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED);
#endif
    return made;
}
