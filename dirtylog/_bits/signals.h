/* Lets Python's signal handlers run before an answer leaves, so that whoever has taken pages can keep them (I5).
 *
 * In two steps, because Cython's try block costs a harvest of nothing a twentieth of its time: ask, put the
 * pages where they are safe by code that calls no Python, then let the exception go.
 */
#ifndef DIRTYLOG_SIGNALS_H
#define DIRTYLOG_SIGNALS_H

#include <Python.h>

/* Whether a handler has raised; its exception is then set. */
static inline int dl_signals_raise(void) { return PyErr_CheckSignals() < 0; }

/* Says to Cython that an exception is set. */
static inline int dl_raised(void) { return -1; }

#endif /* DIRTYLOG_SIGNALS_H */
