/* An extension of another package that stores to pages and marks them, one by one, as fast as it can. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dirtylog/capi.h"

static const struct dirtylog_api *dirtylog;

/* store_and_mark(bitmap, values, first, step, value, turns): `turns` times over, store the next value to every
 * page `first + k * step` and mark it after the store (I3). Without the GIL; returns how many marks were made. */
static PyObject *store_and_mark(PyObject *self, PyObject *args)
{
    PyObject *object;
    Py_buffer values;
    unsigned long long first, step, value, turns;
    unsigned long long marks = 0;
    if (!PyArg_ParseTuple(args, "Ow*KKKK", &object, &values, &first, &step, &value, &turns))
        return NULL;
    const dirtylog_bitmap *bitmap = dirtylog->bitmap(object);
    const unsigned long long npages = bitmap ? dirtylog->npages(bitmap) : 0;
    if (!bitmap || step == 0 || (unsigned long long)values.len < npages * 8) {
        PyBuffer_Release(&values);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "there is no value for each page, or no step");
        return NULL;
    }
    uint64_t *words = values.buf;
    Py_BEGIN_ALLOW_THREADS
    for (unsigned long long turn = 0; turn < turns; turn++)
        for (unsigned long long page = first; page < npages; page += step) {
            __atomic_store_n(&words[page], value + turn, __ATOMIC_RELAXED);
            marks += dirtylog->mark(bitmap, page) == 0;
        }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    return PyLong_FromUnsignedLongLong(marks);
}

static PyMethodDef methods[] = {
    {"store_and_mark", store_and_mark, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "stores", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_stores(void)
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
