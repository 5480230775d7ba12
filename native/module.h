/*
 * module.h - what the parts of the extension module share
 *
 * Each py_<thing>.c makes one or a few Python types and has one entry point here, `int ovl_add_<thing>(module)`:
 * 0, or -1 with an exception set.  module.c calls them in the order of the list below.  State lives in the module,
 * never in static variables: a second interpreter gets its own.
 */
#ifndef OVL_MODULE_H
#define OVL_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "index.h"

/* Owned references, released with the module. */
struct ovl_module_state {
	PyObject *tar_error;           /* exception type TarError */
	PyTypeObject *tarscanner_type; /* TarScanner */
	PyTypeObject *index_type;      /* Index */
	PyTypeObject *tree_type;       /* Tree */
	PyTypeObject *inode_type;      /* Inode */
	PyTypeObject *trace_type;      /* Trace */
};

static inline struct ovl_module_state *ovl_module_state(PyObject *module)
{
	return PyModule_GetState(module);
}

int ovl_add_tarscan(PyObject *module);
int ovl_add_index(PyObject *module);
int ovl_add_lane(PyObject *module);
int ovl_add_tree(PyObject *module);
int ovl_add_trace(PyObject *module);

/* The C index inside an Index object: borrowed, valid as long as `object` is.  NULL with TypeError set for anything
 * else. */
const struct ovl_index *ovl_index_from_object(PyObject *module, PyObject *object);

/* The live tree inside a Tree object: borrowed, valid as long as `object` is.  NULL with TypeError set for anything else. */
struct ovl_tree;
struct ovl_tree *ovl_tree_from_object(PyObject *module, PyObject *object);

/* The trace inside a Trace object, likewise. */
struct ovl_lane_trace;
struct ovl_lane_trace *ovl_trace_from_object(PyObject *module, PyObject *object);

/* Sets the Python exception for an ovl_err_t: MemoryError, or OSError with the errno.  Returns NULL. */
PyObject *ovl_raise(ovl_err_t err);

#endif
