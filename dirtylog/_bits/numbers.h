/* Small arrays of page numbers to and from Python, for a fraction of what numpy's Python functions take.
 *
 * numpy.empty() parses its arguments, and its answer then has to be asked for its address: of the time in which a
 * harvest of one page becomes a page number, that was nearly all. numpy offers other extension modules a table of C
 * functions whose places have not changed since its first release, through a capsule. Two of them are enough, so that
 * its headers are not needed to build.
 */
#ifndef DIRTYLOG_NUMBERS_H
#define DIRTYLOG_NUMBERS_H

#include <Python.h>
#include <stdint.h>

/* npy_intp is Py_ssize_t wherever Python runs. */
struct dl_numpy {
    PyTypeObject *type;
    PyObject *of_int64; /* the dtype that all arrays of plain int64 share */
    PyObject *(*make)(PyTypeObject *type, int ndim, const Py_ssize_t *shape, int number, const Py_ssize_t *strides,
                      void *data, int itemsize, int flags, PyObject *object);
    void *(*address)(PyObject *array, const Py_ssize_t *index);
    int int64; /* numpy's number of the type */
    int knows_fields; /* arrays have the fields of dl_array */
};

/* How an array begins. numpy's own macros read these fields, in every extension module that was compiled with them. */
struct dl_array {
    PyObject_HEAD
    int64_t *data;
    int ndim;
    Py_ssize_t *shape, *strides;
    PyObject *base, *dtype;
    int flags;
};

enum { DL_ARRAY_IN_ONE_PIECE = 0x001, DL_ARRAY_ALIGNED = 0x100 };

enum { DL_NUMPY_TYPE = 2, DL_NUMPY_MAKE = 93, DL_NUMPY_ADDRESS = 160 };

/* The numbers of an array of plain int64 in one dimension, without gaps and aligned (I8), and how many; NULL if it is
 * something else, or if that has to be found out in another way. They stay where they are until Python code runs;
 * where threads run side by side that is no promise, and a buffer has to hold them. */
static inline const int64_t *dl_numpy_look(const struct dl_numpy *numpy, PyObject *object, Py_ssize_t *n)
{
#ifdef Py_GIL_DISABLED
    (void)numpy, (void)object, (void)n;
    return NULL;
#else
    const struct dl_array *array = (const struct dl_array *)object;
    const int whole = DL_ARRAY_IN_ONE_PIECE | DL_ARRAY_ALIGNED;
    if (!numpy->knows_fields || Py_TYPE(object) != numpy->type || array->dtype != numpy->of_int64 || array->ndim != 1 ||
        (array->flags & whole) != whole)
        return NULL;
    *n = array->shape[0];
    return array->data;
#endif
}

/* Whether the fields of an array say what its buffer does. */
static inline int dl_numpy_check_fields(const struct dl_numpy *numpy, PyObject *object)
{
    const struct dl_array *array = (const struct dl_array *)object;
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_STRIDES) < 0) {
        PyErr_Clear();
        return 0;
    }
    int same = array->dtype == numpy->of_int64 && array->ndim == view.ndim && view.ndim == 1 && array->data == view.buf &&
               array->shape && array->shape[0] == view.shape[0] && array->strides && array->strides[0] == view.strides[0] &&
               array->flags & DL_ARRAY_IN_ONE_PIECE && array->flags & DL_ARRAY_ALIGNED;
    PyBuffer_Release(&view);
    return same;
}

/* Finds the two in the table, and learns from an example what an int64 array is. Returns -1 with an exception if the
 * table is none. */
static inline int dl_numpy_open(struct dl_numpy *numpy, PyObject *table, PyObject *type, int int64, PyObject *dtype,
                                PyObject *example)
{
    void **functions = (void **)PyCapsule_GetPointer(table, NULL);
    if (!functions)
        return -1;
    if (functions[DL_NUMPY_TYPE] != (void *)type) {
        PyErr_SetString(PyExc_ImportError, "numpy's table of C functions does not begin as it always has");
        return -1;
    }
    numpy->type = (PyTypeObject *)functions[DL_NUMPY_TYPE];
    *(void **)&numpy->make = functions[DL_NUMPY_MAKE];
    *(void **)&numpy->address = functions[DL_NUMPY_ADDRESS];
    numpy->int64 = int64;
    numpy->of_int64 = Py_NewRef(dtype);
    numpy->knows_fields = dl_numpy_check_fields(numpy, example);
    return 0;
}

/* A new int64 array of `rows` numbers, or of `rows` times `columns`, and the address of its numbers, which holds as
 * long as the array does. */
static inline PyObject *dl_numpy_new(const struct dl_numpy *numpy, Py_ssize_t rows, Py_ssize_t columns, int64_t **data)
{
    static const Py_ssize_t start[2] = {0, 0};
    const Py_ssize_t shape[2] = {rows, columns};
    PyObject *array =
        numpy->make(numpy->type, columns ? 2 : 1, shape, numpy->int64, NULL, NULL, 0, 0, NULL);
    if (array)
        *data = (int64_t *)numpy->address(array, start);
    return array;
}

/* The numbers of a list or tuple of plain ints, at most `room` of them, into `out`. Returns how many, or -1 if
 * something else is in it, or more: then nothing is wrong yet, and numpy has to look. Calls no Python code. */
static inline Py_ssize_t dl_numbers_of_items(PyObject *items, int64_t *out, Py_ssize_t room)
{
    Py_ssize_t n, i = 0;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(items);
#endif
    n = PySequence_Fast_GET_SIZE(items);
    for (; n <= room && i < n; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, i);
        int overflow = 0;
        if (!PyLong_CheckExact(item))
            break;
        out[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
        if (overflow)
            break;
    }
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    return i == n ? n : -1;
}

/* Holds an array if it is one of int64 without gaps, aligned (I8), in one dimension. Returns whether it does; if not,
 * nothing is wrong yet. */
static inline int dl_hold_numbers(PyObject *array, Py_buffer *view)
{
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (view->ndim == 1 && view->itemsize == 8 && (uintptr_t)view->buf % 8 == 0 && view->format &&
        (view->format[0] == 'l' || view->format[0] == 'q') && view->format[1] == 0)
        return 1;
    PyBuffer_Release(view);
    return 0;
}

#endif /* DIRTYLOG_NUMBERS_H */
