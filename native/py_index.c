/*
 * py_index.c - Index: the reader of index.h for Python
 *
 * Ownership: the object holds a Py_buffer on whatever the image lies in (bytes, an mmap) until it dies, so the image
 * neither moves nor goes away.  Threads: immutable after __new__; any number may call it.
 *
 * Errors: ValueError where the image is damaged, at open or later; NotADirectoryError and OSError(EINVAL) where the
 * question does not fit the inode.
 */
#include <errno.h>
#include <stdlib.h>

#include "module.h"
#include "tarscan.h"

struct index {
	PyObject_HEAD
	Py_buffer view;
	struct ovl_index ix;
};

static PyObject *raise_err(ovl_err_t err)
{
	if (err == -EUCLEAN) {
		PyErr_SetString(PyExc_ValueError, "the layer index is damaged");
		return NULL;
	}
	return ovl_raise(err);
}

const struct ovl_index *ovl_index_from_object(PyObject *module, PyObject *object)
{
	struct ovl_module_state *state = ovl_module_state(module);

	if (!PyObject_TypeCheck(object, state->index_type)) {
		PyErr_Format(PyExc_TypeError, "expected Index, not %.100s", Py_TYPE(object)->tp_name);
		return NULL;
	}
	return &((struct index *)object)->ix;
}

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"buffer", "verify", NULL};
	struct index *self;
	PyObject *buffer;
	const char *why;
	int verify = 1;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$p:Index", names, &buffer, &verify))
		return NULL;
	self = (struct index *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	if (PyObject_GetBuffer(buffer, &self->view, PyBUF_SIMPLE) < 0)
		goto fail;
	Py_BEGIN_ALLOW_THREADS
	err = ovl_index_open(&self->ix, self->view.buf, (size_t)self->view.len, verify != 0, &why);
	Py_END_ALLOW_THREADS
	if (err) {
		PyErr_SetString(PyExc_ValueError, why);
		goto fail;
	}
	return (PyObject *)self;
fail:
	Py_DECREF(self);
	return NULL;
}

static int index_traverse(PyObject *object, visitproc visit, void *arg)
{
	/* Not the exporter of our buffer: a memoryview that the collector finds in a cycle with us is cleared before we
	 * are, and what it maps is unmapped under the C index.  One that is not visited is kept until we release it. */
	Py_VISIT(Py_TYPE(object));
	return 0;
}

/* No tp_clear: the buffer has to outlive every reader of the C index.  A cycle through the exporter of a buffer is
 * not possible with bytes or an mmap. */
static void index_dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	PyObject_GC_UnTrack(object);
	if (((struct index *)object)->view.obj)
		PyBuffer_Release(&((struct index *)object)->view);
	type->tp_free(object);
	Py_DECREF(type);
}

static const struct ovl_index *index_of(PyObject *object)
{
	return &((struct index *)object)->ix;
}

static PyObject *bytes_from(const uint8_t *at, size_t len)
{
	return PyBytes_FromStringAndSize((const char *)at, (Py_ssize_t)len);
}

/* An inode number from Python; -1 with an exception set. */
static int parse_ref(PyObject *number, uint32_t *ref)
{
	unsigned long value = PyLong_AsUnsignedLong(number);

	if (value == (unsigned long)-1 && PyErr_Occurred())
		return -1;
	if (value > UINT32_MAX) {
		PyErr_SetString(PyExc_OverflowError, "an inode number of an index is below 2**32");
		return -1;
	}
	*ref = (uint32_t)value;
	return 0;
}

static PyObject *index_lookup(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
	struct ovl_index_entry entry;
	uint32_t dir;
	ovl_err_t err;

	if (count != 2 || !PyBytes_Check(args[1])) {
		PyErr_SetString(PyExc_TypeError, "lookup(directory: int, name: bytes)");
		return NULL;
	}
	if (parse_ref(args[0], &dir) < 0)
		return NULL;
	err = ovl_index_lookup(index_of(object), dir, PyBytes_AS_STRING(args[1]), (size_t)PyBytes_GET_SIZE(args[1]),
			       &entry);
	if (err == -ENOENT)
		Py_RETURN_NONE;
	if (err)
		return raise_err(err);
	return Py_BuildValue("iIIy#", (int)entry.what, entry.ref, entry.flags,
			     entry.target ? (const char *)entry.target : "", (Py_ssize_t)entry.target_len);
}

static PyObject *index_list(PyObject *object, PyObject *number)
{
	struct ovl_index_entry entry;
	struct ovl_index_iter iter;
	PyObject *list = NULL;
	uint32_t dir;
	ovl_err_t err;
	int more;

	if (parse_ref(number, &dir) < 0)
		return NULL;
	err = ovl_index_list(index_of(object), dir, &iter, NULL);
	if (err)
		return raise_err(err);
	list = PyList_New(0);
	if (!list)
		return NULL;
	while ((more = ovl_index_next(&iter, &entry)) == 1) {
		PyObject *item = Py_BuildValue("y#i", (const char *)entry.name, (Py_ssize_t)entry.name_len,
					       (int)entry.what);

		if (!item || PyList_Append(list, item) < 0) {
			Py_XDECREF(item);
			goto fail;
		}
		Py_DECREF(item);
	}
	if (more == 0)
		return list;
	raise_err(more);
fail:
	Py_DECREF(list);
	return NULL;
}

static PyObject *index_attr(PyObject *object, PyObject *number)
{
	struct ovl_index_attr attr;
	long long mtime_ns;
	uint32_t ref;
	ovl_err_t err;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_attr(index_of(object), ref, &attr);
	if (err)
		return raise_err(err);
	mtime_ns = attr.mtime_sec * 1000000000ll + attr.mtime_nsec;
	return Py_BuildValue("IIIIIKKLLL", attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev,
			     (unsigned long long)attr.size, (unsigned long long)attr.blocks, mtime_ns, mtime_ns,
			     mtime_ns);
}

static PyObject *index_flags(PyObject *object, PyObject *number)
{
	struct ovl_index_attr attr;
	uint32_t ref;
	ovl_err_t err;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_attr(index_of(object), ref, &attr);
	return err ? raise_err(err) : PyLong_FromUnsignedLong(attr.flags);
}

static PyObject *index_readlink(PyObject *object, PyObject *number)
{
	const uint8_t *target;
	uint32_t ref;
	size_t len;
	ovl_err_t err;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_readlink(index_of(object), ref, &target, &len);
	return err ? raise_err(err) : bytes_from(target, len);
}

static PyObject *index_xattrs(PyObject *object, PyObject *number)
{
	struct ovl_index_xattr_iter iter;
	const uint8_t *name, *value;
	size_t name_len, value_len;
	PyObject *dict;
	uint32_t ref;
	ovl_err_t err;
	int more;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_xattrs(index_of(object), ref, &iter);
	if (err)
		return raise_err(err);
	dict = PyDict_New();
	if (!dict)
		return NULL;
	while ((more = ovl_index_next_xattr(&iter, &name, &name_len, &value, &value_len)) == 1) {
		PyObject *key = bytes_from(name, name_len);
		PyObject *text = key ? bytes_from(value, value_len) : NULL;
		int failed = !text || PyDict_SetItem(dict, key, text) < 0;

		Py_XDECREF(key);
		Py_XDECREF(text);
		if (failed)
			goto fail;
	}
	if (more == 0)
		return dict;
	raise_err(more);
fail:
	Py_DECREF(dict);
	return NULL;
}

/* The path of one name, as bytes. */
static PyObject *path_from(const struct ovl_index *ix, uint32_t parent, const uint8_t *name, size_t name_len)
{
	size_t size = 0;
	ovl_err_t err = ovl_index_path(ix, parent, name, name_len, NULL, 0, &size);
	PyObject *path = NULL;

	if (err && err != -ERANGE)
		return raise_err(err);
	path = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
	if (!path)
		return NULL;
	if (size == 0)
		return path;
	err = ovl_index_path(ix, parent, name, name_len, (uint8_t *)PyBytes_AS_STRING(path), size, &size);
	if (err || (size_t)PyBytes_GET_SIZE(path) != size) {
		Py_DECREF(path);
		return raise_err(-EUCLEAN);
	}
	return path;
}

static PyObject *index_links(PyObject *object, PyObject *number)
{
	const struct ovl_index *ix = index_of(object);
	struct ovl_index_name_iter iter;
	PyObject *list = NULL, *path = NULL;
	const uint8_t *name;
	uint32_t ref, parent;
	size_t name_len;
	ovl_err_t err;
	int more = 0;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_names(ix, ref, &iter);
	if (err)
		return raise_err(err);
	list = PyList_New(0);
	if (!list)
		return NULL;
	if (ref == OVL_INDEX_ROOT) {
		path = PyBytes_FromStringAndSize("", 0);
		if (!path || PyList_Append(list, path) < 0)
			goto fail;
		Py_DECREF(path);
		return list;
	}
	while ((more = ovl_index_next_name(&iter, &parent, &name, &name_len)) == 1) {
		path = path_from(ix, parent, name, name_len);
		if (!path || PyList_Append(list, path) < 0)
			goto fail;
		Py_CLEAR(path);
	}
	if (more == 0)
		return list;
	raise_err(more);
fail:
	Py_XDECREF(path);
	Py_DECREF(list);
	return NULL;
}

static PyObject *index_extents(PyObject *object, PyObject *number)
{
	struct ovl_index_extent_iter iter;
	struct ovl_index_extent extent;
	PyObject *list = NULL;
	uint32_t ref;
	ovl_err_t err;
	int more;

	if (parse_ref(number, &ref) < 0)
		return NULL;
	err = ovl_index_extents(index_of(object), ref, &iter);
	if (err)
		return raise_err(err);
	list = PyList_New(0);
	if (!list)
		return NULL;
	while ((more = ovl_index_next_extent(&iter, &extent)) == 1) {
		PyObject *item = Py_BuildValue("KKK", (unsigned long long)extent.logical,
					       (unsigned long long)extent.length,
					       (unsigned long long)extent.physical);

		if (!item || PyList_Append(list, item) < 0) {
			Py_XDECREF(item);
			goto fail;
		}
		Py_DECREF(item);
	}
	if (more == 0)
		return list;
	raise_err(more);
fail:
	Py_DECREF(list);
	return NULL;
}

static PyObject *index_counts(PyObject *object, PyObject *Py_UNUSED(unused))
{
	const struct ovl_index *ix = index_of(object);

	return Py_BuildValue("KKKKK", (unsigned long long)ix->files, (unsigned long long)ix->dirs,
			     (unsigned long long)ix->whiteouts, (unsigned long long)ix->opaques,
			     (unsigned long long)ix->bytes);
}

static PyObject *index_tar_end(PyObject *object, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(index_of(object)->tar_end);
}

static PyObject *index_link_count(PyObject *object, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLong(index_of(object)->link_count);
}

static PyMethodDef index_methods[] = {
	{"lookup", (PyCFunction)(void (*)(void))index_lookup, METH_FASTCALL,
	 "lookup(directory, name) -> (what, ref, flags, target) or None"},
	{"list", index_list, METH_O, "list(directory) -> [(name, what)], sorted by name"},
	{"attr", index_attr, METH_O, "attr(ref) -> the fields of ovlfs.layer.base.Attr"},
	{"flags", index_flags, METH_O, "flags(ref) -> INDEX_* of an inode"},
	{"readlink", index_readlink, METH_O, "readlink(ref) -> target of a symlink"},
	{"xattrs", index_xattrs, METH_O, "xattrs(ref) -> {name: value}"},
	{"links", index_links, METH_O, "links(ref) -> all paths of an inode, relative to the root"},
	{"extents", index_extents, METH_O, "extents(ref) -> [(logical, length, physical)]"},
	{"counts", index_counts, METH_NOARGS, "counts() -> (files, dirs, whiteouts, opaques, bytes)"},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef index_getset[] = {
	{"link_count", index_link_count, NULL, "how many names are hard links to the layers below", NULL},
	{"tar_end", index_tar_end, NULL, "Offset in the tar behind the last entry's data.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot index_slots[] = {
	{Py_tp_doc, "Index(buffer, *, verify=True)\n--\n\nWhat is in one layer tar.  The root is inode 0."},
	{Py_tp_new, (void *)index_new},
	{Py_tp_traverse, (void *)index_traverse},
	{Py_tp_dealloc, (void *)index_dealloc},
	{Py_tp_methods, index_methods},
	{Py_tp_getset, index_getset},
	{0, NULL},
};

static PyType_Spec index_spec = {
	.name = "ovlfs._native.Index",
	.basicsize = sizeof(struct index),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = index_slots,
};

int ovl_add_index(PyObject *module)
{
	struct ovl_module_state *state = ovl_module_state(module);

	state->index_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &index_spec, NULL);
	if (!state->index_type || PyModule_AddType(module, state->index_type) < 0)
		return -1;
	if (PyModule_AddIntConstant(module, "INDEX_OPAQUE", OVL_IX_OPAQUE) < 0 ||
	    PyModule_AddIntConstant(module, "INDEX_IMPLIED", OVL_IX_IMPLIED) < 0 ||
	    PyModule_AddIntConstant(module, "INDEX_SPARSE", OVL_IX_SPARSE) < 0)
		return -1;
	return 0;
}
