/*
 * module.c - ovlfs._native: the C half of the layer and fuse rooms, bound to Python
 *
 * Nothing happens here but assembly.  The pure C (tarscan, build, index, ...) knows nothing of Python; each
 * py_*.c binds one part of it; this file makes the module out of them.  To add a part: its entry point and its
 * fields of the state go to module.h, and one line into each of the three lists below.
 */
#include "module.h"

#include <errno.h>

static int (*const parts[])(PyObject *module) = {
	ovl_add_tarscan,
	ovl_add_index,
	ovl_add_lane,
	ovl_add_tree,
	ovl_add_trace,
};

PyObject *ovl_raise(ovl_err_t err)
{
	if (err == -ENOMEM)
		return PyErr_NoMemory();
	errno = -err;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static int module_exec(PyObject *module)
{
	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		if (parts[i](module) < 0)
			return -1;
	return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct ovl_module_state *state = ovl_module_state(module);

	Py_VISIT(state->tar_error);
	Py_VISIT(state->tarscanner_type);
	Py_VISIT(state->index_type);
	Py_VISIT(state->tree_type);
	Py_VISIT(state->inode_type);
	Py_VISIT(state->trace_type);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct ovl_module_state *state = ovl_module_state(module);

	Py_CLEAR(state->tar_error);
	Py_CLEAR(state->tarscanner_type);
	Py_CLEAR(state->index_type);
	Py_CLEAR(state->tree_type);
	Py_CLEAR(state->inode_type);
	Py_CLEAR(state->trace_type);
	return 0;
}

static void module_free(void *module)
{
	module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
	{Py_mod_exec, (void *)module_exec},
	{0, NULL},
};

static struct PyModuleDef module_def = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "ovlfs._native",
	.m_doc = "The parts of ovlfs that are written in C.",
	.m_size = sizeof(struct ovl_module_state),
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
	.m_free = module_free,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModuleDef_Init(&module_def);
}
