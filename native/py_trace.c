/*
 * py_trace.c - Trace: lane_trace.h for Python
 *
 * Ownership: the object owns the trace; a Lane and a Tree that tell it something refer to the object.  All methods are
 * quick and keep the GIL: the one lock below is held for copying only.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lane_trace.h"
#include "module.h"

#define DRAIN_MAX 1024 /* records in one go: 320 KiB of them */

struct trace_object {
	PyObject_HEAD
	struct ovl_lane_trace *trace;
};

struct ovl_lane_trace *ovl_trace_from_object(PyObject *module, PyObject *object)
{
	if (!PyObject_TypeCheck(object, ovl_module_state(module)->trace_type)) {
		PyErr_Format(PyExc_TypeError, "a Trace is needed, not %.200s", Py_TYPE(object)->tp_name);
		return NULL;
	}
	return ((struct trace_object *)object)->trace;
}

static struct ovl_lane_trace *get(PyObject *object)
{
	return ((struct trace_object *)object)->trace;
}

static PyObject *trace_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {NULL};
	struct trace_object *self;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Trace", names))
		return NULL;
	self = (struct trace_object *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	err = ovl_lane_trace_new(&self->trace);
	if (err) {
		Py_DECREF(self);
		return ovl_raise(err);
	}
	return (PyObject *)self;
}

static void trace_dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	ovl_lane_trace_free(get(object));
	type->tp_free(object);
	Py_DECREF(type);
}

static PyObject *trace_start(PyObject *object, PyObject *arg)
{
	Py_ssize_t capacity = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
	ovl_err_t err;

	if (capacity == -1 && PyErr_Occurred())
		return NULL;
	err = ovl_lane_trace_start(get(object), capacity < 0 ? 0 : (size_t)capacity);
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

static PyObject *trace_stop(PyObject *object, PyObject *Py_UNUSED(unused))
{
	ovl_lane_trace_stop(get(object));
	Py_RETURN_NONE;
}

static PyObject *trace_merged(PyObject *object, PyObject *args)
{
	unsigned long long nodeid, ns;
	const char *layers;
	Py_ssize_t names, len;
	uint16_t copy[OVL_TRACE_NAME_MAX / sizeof(uint16_t)];

	if (!PyArg_ParseTuple(args, "Kny#K:merged", &nodeid, &names, &layers, &len, &ns))
		return NULL;
	if ((size_t)len > sizeof(copy))
		len = (Py_ssize_t)sizeof(copy);
	memcpy(copy, layers, (size_t)len);
	ovl_lane_trace_merge(get(object), nodeid, names < 0 ? 0 : (size_t)names, copy, (size_t)len / sizeof(copy[0]), ns);
	Py_RETURN_NONE;
}

static PyObject *describe(const struct ovl_trace_record *record)
{
	return Py_BuildValue("iIKKKKiiOy#", (int)record->kind, record->opcode, (unsigned long long)record->at_ns,
			     (unsigned long long)record->took_ns, (unsigned long long)record->nodeid,
			     (unsigned long long)record->number, (int)record->error,
			     (int)record->layer, record->by_starter ? Py_True : Py_False, (const char *)record->name,
			     (Py_ssize_t)record->name_len);
}

static PyObject *trace_drain(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct ovl_trace_record *records = calloc(DRAIN_MAX, sizeof(*records));
	PyObject *list = records ? PyList_New(0) : PyErr_NoMemory(), *result = NULL;
	uint64_t dropped = 0;
	size_t count;

	if (!list)
		goto out;
	count = ovl_lane_trace_drain(get(object), records, DRAIN_MAX, &dropped);
	for (size_t i = 0; i < count; i++) {
		PyObject *one = describe(&records[i]);
		int err = one ? PyList_Append(list, one) : -1;

		Py_XDECREF(one);
		if (err < 0)
			goto out;
	}
	result = Py_BuildValue("OK", list, (unsigned long long)dropped);
out:
	Py_XDECREF(list);
	free(records);
	return result;
}

/* [(ns, how many)] of an opcode: the middles of the buckets that are not empty. */
static PyObject *latencies_of(const struct ovl_lane_trace *trace, uint32_t opcode)
{
	uint64_t counts[OVL_TRACE_BUCKETS];
	PyObject *list = PyList_New(0);

	if (!list)
		return NULL;
	ovl_lane_trace_latencies(trace, opcode, counts);
	for (unsigned i = 0; i < OVL_TRACE_BUCKETS; i++) {
		unsigned long long middle = (ovl_trace_bucket_ns(i) + ovl_trace_bucket_ns(i + 1)) / 2;
		PyObject *one = counts[i] ? Py_BuildValue("KK", middle, (unsigned long long)counts[i]) : NULL;
		int err = counts[i] ? (one ? PyList_Append(list, one) : -1) : 0;

		Py_XDECREF(one);
		if (err < 0) {
			Py_DECREF(list);
			return NULL;
		}
	}
	return list;
}

static PyObject *trace_latencies(PyObject *object, PyObject *Py_UNUSED(unused))
{
	PyObject *all = PyDict_New();

	for (uint32_t opcode = 0; all && opcode < OVL_LANE_OPCODES; opcode++) {
		PyObject *list = latencies_of(get(object), opcode), *key = PyLong_FromUnsignedLong(opcode);
		int err = list && key ? 0 : -1;

		if (!err && PyList_GET_SIZE(list) > 0)
			err = PyDict_SetItem(all, key, list);
		Py_XDECREF(list);
		Py_XDECREF(key);
		if (err < 0)
			Py_CLEAR(all);
	}
	return all;
}

static PyObject *trace_counts(PyObject *object, PyObject *Py_UNUSED(unused))
{
	uint64_t counts[OVL_TRACE_KINDS], copied;

	ovl_lane_trace_counts(get(object), counts, &copied);
	return Py_BuildValue("{sKsKsKsK}K", "copy-up", (unsigned long long)counts[OVL_TRACE_COPY_UP], "whiteout",
			     (unsigned long long)counts[OVL_TRACE_WHITEOUT], "opaque",
			     (unsigned long long)counts[OVL_TRACE_OPAQUE], "rename",
			     (unsigned long long)counts[OVL_TRACE_RENAME], (unsigned long long)copied);
}

static PyMethodDef trace_methods[] = {
	{"start", trace_start, METH_O, "start(capacity): begin to record; EALREADY."},
	{"stop", trace_stop, METH_NOARGS, "stop(): record no more, and forget what was not drained."},
	{"merged", trace_merged, METH_VARARGS, "merged(nodeid, names, layers, began_ns): as the tree in C tells it."},
	{"drain", trace_drain, METH_NOARGS,
	 "drain() -> ([(kind, opcode, at_ns, took_ns, nodeid, number, error, layer, by_starter, name)], how many were dropped)."},
	{"counts", trace_counts, METH_NOARGS, "counts() -> ({decision: how often}, bytes that were copied up), natively."},
	{"latencies", trace_latencies, METH_NOARGS, "latencies() -> {opcode: [(ns, how many)]} of native answers."},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot trace_slots[] = {
	{Py_tp_doc, "Trace()\n--\n\nHow long native answers take, and which ones were just given."},
	{Py_tp_new, (void *)trace_new},
	{Py_tp_dealloc, (void *)trace_dealloc},
	{Py_tp_methods, trace_methods},
	{0, NULL},
};

static PyType_Spec trace_spec = {
	.name = "ovlfs._native.Trace",
	.basicsize = sizeof(struct trace_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = trace_slots,
};

int ovl_add_trace(PyObject *module)
{
	struct ovl_module_state *state = ovl_module_state(module);

	state->trace_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &trace_spec, NULL);
	if (!state->trace_type)
		return -1;
	return PyModule_AddType(module, state->trace_type);
}
