/* Gives an answer that an exception has thrown away back to its source (I5).
 *
 * Python runs signal handlers when a call has returned, and if one raises, the interpreter drops the answer from its
 * stack before anybody has stored it. No code of ours runs in between, but for the end of the answer itself: it finds
 * the exception on its way. An answer that its owner has done with ends while none is.
 */
#ifndef DIRTYLOG_THROWN_H
#define DIRTYLOG_THROWN_H

#include <Python.h>

typedef void dl_take_back(PyObject *source, PyObject *pages);

/* Who takes an answer back. Set before the answer is handed out, and never changed. */
struct dl_giver {
    PyObject *source;  /* a weak reference; NULL: nobody */
    dl_take_back *take_back;
};

/* Notes the source; one that is noted already is nearer to the memory, and stays. */
static inline void dl_giver_set(struct dl_giver *giver, PyObject *source, dl_take_back *take_back)
{
    if (giver->source == NULL) {
        Py_INCREF(source);
        giver->take_back = take_back;
        giver->source = source;
    }
}

/* To be called first when `pages`, an object that the collector knows, is deallocated. */
static inline void dl_giver_end(struct dl_giver *giver, PyObject *pages)
{
    PyObject *reference = giver->source;
    if (reference == NULL)
        return;
    giver->source = NULL;
    if (PyErr_Occurred()) {
        /* The source may release the GIL, and nobody may find an object without references meanwhile. */
        PyObject_GC_UnTrack(pages);
#if PY_VERSION_HEX >= 0x030D0000
        PyObject *source;
        if (PyWeakref_GetRef(reference, &source) > 0) {
            giver->take_back(source, pages);
            Py_DECREF(source);
        }
#else
        PyObject *source = PyWeakref_GET_OBJECT(reference);
        if (source != Py_None) {
            Py_INCREF(source);
            giver->take_back(source, pages);
            Py_DECREF(source);
        }
#endif
    }
    Py_DECREF(reference);
}

/* Makes a type deallocate by `mine`, which ends with what is returned. */
static inline destructor dl_dealloc_by(PyObject *type, destructor mine)
{
    destructor own = ((PyTypeObject *)type)->tp_dealloc;
    ((PyTypeObject *)type)->tp_dealloc = mine;
    return own;
}

#endif /* DIRTYLOG_THROWN_H */
