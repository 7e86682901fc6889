/* Yardsticks in plain C for the benchmarks: the kernel's harvest loop, a bare
 * locked OR, AVX-512 extraction, and marking through dirtylog's C API.
 *
 * Compiled with -O2, as the kernel is; never part of the package.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VBMI2__)
#include <immintrin.h>
#endif

#include "dirtylog/capi.h"

static const struct dirtylog_api *dirtylog;

static int two_buffers(PyObject *args, Py_buffer *a, Py_buffer *b)
{
    return PyArg_ParseTuple(args, "w*w*", a, b);
}

/* harvest(words, out): what kvm_get_dirty_log_protect() does to a slot's bitmap:
 * clear the buffer, then skip clean words, exchange the others, copy. */
static PyObject *harvest(PyObject *self, PyObject *args)
{
    Py_buffer words_view, out_view;
    if (!two_buffers(args, &words_view, &out_view))
        return NULL;
    uint64_t *words = words_view.buf, *out = out_view.buf;
    size_t n = (size_t)words_view.len / 8;
    Py_BEGIN_ALLOW_THREADS
    memset(out, 0, n * 8);
    for (size_t i = 0; i < n; i++) {
        if (!__atomic_load_n(&words[i], __ATOMIC_RELAXED))
            continue;
        out[i] = __atomic_exchange_n(&words[i], 0, __ATOMIC_SEQ_CST);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&words_view);
    PyBuffer_Release(&out_view);
    Py_RETURN_NONE;
}

/* indices(words, out): page numbers by AVX-512 compress; None where the CPU or the compiler cannot. */
static PyObject *indices(PyObject *self, PyObject *args)
{
    Py_buffer words_view, out_view;
    if (!two_buffers(args, &words_view, &out_view))
        return NULL;
    Py_ssize_t count = -1;
#if defined(__AVX512VBMI2__)
    const uint64_t *words = words_view.buf;
    int64_t *out = out_view.buf;
    size_t n = (size_t)words_view.len / 8;
    Py_BEGIN_ALLOW_THREADS
    uint8_t every[64];
    for (int i = 0; i < 64; i++)
        every[i] = (uint8_t)i;
    __m512i positions = _mm512_loadu_si512(every);
    count = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t word = words[i];
        if (!word)
            continue;
        int bits = __builtin_popcountll(word);
        uint8_t found[64];
        _mm512_storeu_si512(found, _mm512_maskz_compress_epi8(word, positions));
        __m512i start = _mm512_set1_epi64((int64_t)(i * 64));
        for (int j = 0; j < bits; j += 8) {
            __m128i part = _mm_loadl_epi64((const __m128i *)(found + j));
            _mm512_storeu_si512(out + count + j, _mm512_add_epi64(start, _mm512_cvtepu8_epi64(part)));
        }
        count += bits;
    }
    Py_END_ALLOW_THREADS
#endif
    PyBuffer_Release(&words_view);
    PyBuffer_Release(&out_view);
    if (count < 0)
        Py_RETURN_NONE;
    return PyLong_FromSsize_t(count);
}

/* lock_or(words, pages): a bare locked OR for each page. */
static PyObject *lock_or(PyObject *self, PyObject *args)
{
    Py_buffer words_view, pages_view;
    if (!two_buffers(args, &words_view, &pages_view))
        return NULL;
    uint64_t *words = words_view.buf;
    const int64_t *pages = pages_view.buf;
    size_t n = (size_t)pages_view.len / 8;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < n; i++)
        __atomic_fetch_or(&words[pages[i] / 64], UINT64_C(1) << (pages[i] % 64), __ATOMIC_SEQ_CST);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&words_view);
    PyBuffer_Release(&pages_view);
    Py_RETURN_NONE;
}

/* mark(bitmap, pages): the same through dirtylog's table, a call for each page. */
static PyObject *mark(PyObject *self, PyObject *args)
{
    PyObject *object;
    Py_buffer pages_view;
    if (!PyArg_ParseTuple(args, "Ow*", &object, &pages_view))
        return NULL;
    const dirtylog_bitmap *bitmap = dirtylog->bitmap(object);
    if (bitmap) {
        const int64_t *pages = pages_view.buf;
        size_t n = (size_t)pages_view.len / 8;
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < n; i++)
            dirtylog->mark(bitmap, (uint64_t)pages[i]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&pages_view);
    if (!bitmap)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"harvest", harvest, METH_VARARGS, NULL},
    {"indices", indices, METH_VARARGS, NULL},
    {"lock_or", lock_or, METH_VARARGS, NULL},
    {"mark", mark, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "yardsticks", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_yardsticks(void)
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
