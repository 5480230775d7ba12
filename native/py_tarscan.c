/*
 * py_tarscan.c - TarScanner and TarError: the scanner of tarscan.h for Python
 *
 * Ownership: the object owns one ovl_tarscan from __new__ to dealloc.  Fed buffers are held only during the call.
 * Threads: feed and finish run without the GIL; `busy` (changed with the GIL held) turns a second call meanwhile
 * into RuntimeError.
 */
#include <errno.h>
#include <stdlib.h>

#include "module.h"
#include "tarscan.h"

struct tarscanner {
	PyObject_HEAD
	struct ovl_tarscan *scan;
	PyObject *tar_error;
	bool busy;
};

static int set_attribute(PyObject *object, const char *name, PyObject *value)
{
	int err = value ? PyObject_SetAttrString(object, name, value) : -1;

	Py_XDECREF(value);
	return err;
}

/* Raises TarError(text) with offset, rule and name. */
static void raise_tar_error(struct tarscanner *self)
{
	const struct ovl_tar_error *error = ovl_tarscan_error(self->scan);
	PyObject *text = PyUnicode_FromFormat("%s (at byte %llu)", error->rule, (unsigned long long)error->offset);
	PyObject *exception = text ? PyObject_CallOneArg(self->tar_error, text) : NULL;

	if (exception && set_attribute(exception, "offset", PyLong_FromUnsignedLongLong(error->offset)) == 0 &&
	    set_attribute(exception, "rule", PyUnicode_FromString(error->rule)) == 0 &&
	    set_attribute(exception, "name",
			  PyBytes_FromStringAndSize((const char *)error->name, (Py_ssize_t)error->name_len)) == 0)
		PyErr_SetObject(self->tar_error, exception);
	Py_XDECREF(exception);
	Py_XDECREF(text);
}

static PyObject *raise_err(struct tarscanner *self, ovl_err_t err)
{
	if (err == -EBADMSG)
		raise_tar_error(self);
	else if (err == -EINVAL)
		PyErr_SetString(PyExc_RuntimeError, "the scanner has failed or is finished");
	else
		ovl_raise(err);
	return NULL;
}

static bool enter(struct tarscanner *self)
{
	if (self->busy) {
		PyErr_SetString(PyExc_RuntimeError, "the scanner is in use by another thread");
		return false;
	}
	self->busy = true;
	return true;
}

static PyObject *tarscanner_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"whiteouts", "entries_max", "memory_max", NULL};
	unsigned long long entries = 0, memory = 0;
	struct ovl_module_state *state;
	struct ovl_tar_limits limits;
	struct tarscanner *self;
	int whiteouts = 1;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$pKK:TarScanner", names, &whiteouts, &entries, &memory))
		return NULL;
	state = PyType_GetModuleState(type);
	self = state ? (struct tarscanner *)type->tp_alloc(type, 0) : NULL;
	if (!self)
		return NULL;
	self->tar_error = Py_NewRef(state->tar_error);
	limits = (struct ovl_tar_limits){.entries = entries, .memory = memory};
	err = ovl_tarscan_new(whiteouts != 0, &limits, &self->scan);
	if (err) {
		Py_DECREF(self);
		return ovl_raise(err);
	}
	return (PyObject *)self;
}

static int tarscanner_traverse(PyObject *object, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(object));
	Py_VISIT(((struct tarscanner *)object)->tar_error);
	return 0;
}

static int tarscanner_clear(PyObject *object)
{
	Py_CLEAR(((struct tarscanner *)object)->tar_error);
	return 0;
}

static void tarscanner_dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	PyObject_GC_UnTrack(object);
	ovl_tarscan_free(((struct tarscanner *)object)->scan);
	tarscanner_clear(object);
	type->tp_free(object);
	Py_DECREF(type);
}

static PyObject *tarscanner_feed(PyObject *object, PyObject *buffer)
{
	struct tarscanner *self = (struct tarscanner *)object;
	Py_buffer view;
	ovl_err_t err;

	if (PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0)
		return NULL;
	if (!enter(self)) {
		PyBuffer_Release(&view);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	err = ovl_tarscan_feed(self->scan, view.buf, (size_t)view.len);
	Py_END_ALLOW_THREADS
	self->busy = false;
	PyBuffer_Release(&view);
	if (err)
		return raise_err(self, err);
	Py_RETURN_NONE;
}

static PyObject *tarscanner_skip(PyObject *object, PyObject *number)
{
	struct tarscanner *self = (struct tarscanner *)object;
	unsigned long long len = PyLong_AsUnsignedLongLong(number);
	ovl_err_t err;

	if (len == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	if (!enter(self))
		return NULL;
	err = ovl_tarscan_skip(self->scan, len);
	self->busy = false;
	if (err) {
		PyErr_SetString(PyExc_ValueError, "these bytes must be fed");
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyObject *tarscanner_finish(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct tarscanner *self = (struct tarscanner *)object;
	uint8_t *image = NULL;
	PyObject *out;
	size_t len = 0;
	ovl_err_t err;

	if (!enter(self))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = ovl_tarscan_finish(self->scan, &image, &len);
	Py_END_ALLOW_THREADS
	self->busy = false;
	if (err)
		return raise_err(self, err);
	out = PyBytes_FromStringAndSize((const char *)image, (Py_ssize_t)len);
	free(image);
	return out;
}

static PyObject *tarscanner_skippable(PyObject *object, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(ovl_tarscan_skippable(((struct tarscanner *)object)->scan));
}

static PyObject *tarscanner_offset(PyObject *object, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(ovl_tarscan_offset(((struct tarscanner *)object)->scan));
}

static PyObject *tarscanner_ended(PyObject *object, void *Py_UNUSED(closure))
{
	return PyBool_FromLong(ovl_tarscan_ended(((struct tarscanner *)object)->scan));
}

static PyMethodDef tarscanner_methods[] = {
	{"feed", tarscanner_feed, METH_O, "feed(buffer): the next bytes of the stream.  Raises TarError."},
	{"skip", tarscanner_skip, METH_O, "skip(length): the next bytes are not read.  At most `skippable`."},
	{"finish", tarscanner_finish, METH_NOARGS, "finish() -> bytes: the stream is over; the index image."},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef tarscanner_getset[] = {
	{"skippable", tarscanner_skippable, NULL, "How many of the next bytes need not be read.", NULL},
	{"offset", tarscanner_offset, NULL, "Bytes fed and skipped so far.", NULL},
	{"ended", tarscanner_ended, NULL, "The end marker was seen; what follows means nothing.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tarscanner_slots[] = {
	{Py_tp_doc, "TarScanner(*, whiteouts=True, entries_max=0, memory_max=0)\n--\n\n"
		    "Reads a layer tar as it passes by and writes its index."},
	{Py_tp_new, (void *)tarscanner_new},
	{Py_tp_traverse, (void *)tarscanner_traverse},
	{Py_tp_clear, (void *)tarscanner_clear},
	{Py_tp_dealloc, (void *)tarscanner_dealloc},
	{Py_tp_methods, tarscanner_methods},
	{Py_tp_getset, tarscanner_getset},
	{0, NULL},
};

static PyType_Spec tarscanner_spec = {
	.name = "ovlfs._native.TarScanner",
	.basicsize = sizeof(struct tarscanner),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = tarscanner_slots,
};

int ovl_add_tarscan(PyObject *module)
{
	struct ovl_module_state *state = ovl_module_state(module);

	state->tar_error = PyErr_NewExceptionWithDoc("ovlfs._native.TarError",
						     "A tar that breaks a rule.  offset, rule, name: where and what.",
						     PyExc_ValueError, NULL);
	if (!state->tar_error || PyModule_AddObjectRef(module, "TarError", state->tar_error) < 0)
		return -1;
	state->tarscanner_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tarscanner_spec, NULL);
	if (!state->tarscanner_type || PyModule_AddType(module, state->tarscanner_type) < 0)
		return -1;
	return 0;
}
