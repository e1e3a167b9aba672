// The extension module: the kernels of sparse layers, called with the tensors themselves.
//
// A small sparse layer is soon done. To read eight tensors' types, shapes and addresses in Python and to go through ctypes
// takes a good part of that, most of all where Python's own code has left the caches, as after any large product. So it is
// done here, through the stable part of Python's API and DLPack's C exchange API: nothing is linked, and no version of
// Python or torch breaks it.
//
// Every function that computes returns None, and has done nothing, where its tensors are not what the kernels take as it
// is: plain ones on the CPU, float32 with int32 indices, without gaps, neither empty nor of sizes that do not go
// together. What is right and what is wrong with others is for the Python code, which has it all to itself where torch
// is older than the exchange API.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "block_linear.h"
#include "dlpack.h"
#include "unstructured.h"

namespace {

using fxopt::dlpack::Exchange;

// What `connect` was given, and names.
struct {
    PyTypeObject *tensor, *parameter;
    PyObject *empty, *options; // torch.empty, dict(dtype=torch.float32)
    PyObject *strided;         // torch.strided
    PyObject *is_negated;      // torch.Tensor.is_neg
    const Exchange *exchange;
    PyObject *layout, *is_cpu, *is_cuda;
} torch = {};

// Whether what was asked is `wanted`, and not another object or an exception, which is forgotten.
bool is(PyObject *answer, const PyObject *wanted) {
    if (answer == nullptr)
        PyErr_Clear();
    else
        Py_DECREF(answer);
    return answer != nullptr && answer == wanted;
}

// A tensor that is lent for a call.
class View : public fxopt::dlpack::Tensor {
  public:
    // Whether `object` is a plain tensor that holds its numbers on a CPU or GPU: no subclass, and neither sparse, batched,
    // negated lazily nor all zeros.
    bool lend_plain(PyObject *object) {
        // What DLPack cannot say is asked first: an exception of C++, with where it was raised, takes a millisecond.
        return is_tensor(object) && is(PyObject_GetAttr(object, torch.layout), torch.strided) &&
               (is(PyObject_GetAttr(object, torch.is_cpu), Py_True) ||
                is(PyObject_GetAttr(object, torch.is_cuda), Py_True)) &&
               is(PyObject_CallFunctionObjArgs(torch.is_negated, object, nullptr), Py_False) && lend(object);
    }

    bool floats(PyObject *object, int32_t least = 1, int32_t most = 1 << 30) {
        return lend_plain(object) && is_dense(fxopt::dlpack::FLOAT) && dimensions >= least && dimensions <= most;
    }
    bool indices(PyObject *object) {
        return is_tensor(object) && lend(object) && is_dense(fxopt::dlpack::INTEGER) && dimensions == 1;
    }

    int64_t numel() const { return fold(dimensions); }
    int64_t rows() const { return fold(dimensions - 1); }
    int64_t last() const { return shape[dimensions - 1]; }
    template <typename T> T *as() const { return static_cast<T *>(data); }

    bool has_shape(const int64_t *other, int32_t size) const {
        return dimensions == size && std::equal(other, other + size, shape);
    }
    bool has_rows_of(const View &other) const { // the same dimensions before the last
        return dimensions == other.dimensions && std::equal(shape, shape + dimensions - 1, other.shape);
    }

  private:
    static bool is_tensor(PyObject *object) {
        return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
    }
    bool lend(PyObject *object) {
        if (torch.exchange->view(object, this) != 0) {
            PyErr_Clear(); // it has no storage, or a dtype that DLPack does not know
            return false;
        }
        data = static_cast<char *>(data) + byte_offset;
        // What is known to be all zeros has no memory, and a storage may have been freed (FSDP does): then this is an
        // offset and no address. An address that could be one is left to Python, which asks the storage.
        constexpr uint64_t LOWEST = uint64_t(1) << 32;
        return reinterpret_cast<uintptr_t>(data) >= LOWEST || numel() == 0;
    }
    bool is_dense(uint8_t code) const {
        if (device.type != fxopt::dlpack::CPU || dtype.code != code || dtype.bits != 32 || dtype.lanes != 1)
            return false;
        int64_t step = 1;
        for (int32_t i = dimensions - 1; strides != nullptr && i >= 0; --i) {
            if (shape[i] != 1 && strides[i] != step)
                return false;
            step *= shape[i];
        }
        return true;
    }
    int64_t fold(int32_t end) const {
        int64_t product = 1;
        for (int32_t i = 0; i < end; ++i)
            product *= shape[i];
        return product;
    }
};

// A new contiguous float32 tensor.
class Result {
  public:
    Result() = default;
    ~Result() { Py_XDECREF(object_); }
    Result(const Result &) = delete;
    Result &operator=(const Result &) = delete;

    // False where it is not what was asked for (a mode made another), or with an exception set.
    bool make(const int64_t *shape, int32_t dimensions, int64_t last) {
        PyObject *size = PyTuple_New(dimensions + 1), *arguments = PyTuple_New(1);
        for (int32_t i = 0; size != nullptr && i <= dimensions; ++i)
            PyTuple_SetItem(size, i, PyLong_FromLongLong(i < dimensions ? shape[i] : last));
        if (arguments != nullptr)
            PyTuple_SetItem(arguments, 0, size); // steals it
        else
            Py_XDECREF(size);
        object_ = PyErr_Occurred() ? nullptr : PyObject_Call(torch.empty, arguments, torch.options);
        Py_XDECREF(arguments);
        return object_ != nullptr && view_.floats(object_);
    }
    bool make(int64_t size) { return make(nullptr, 0, size); }

    float *data() const { return view_.as<float>(); }
    PyObject *take() {
        PyObject *taken = object_;
        object_ = nullptr;
        return taken;
    }

  private:
    PyObject *object_ = nullptr;
    View view_;
};

PyObject *unfit() {
    if (PyErr_Occurred())
        return nullptr;
    Py_RETURN_NONE;
}

// A bias of `size` numbers, or None.
struct Bias {
    const float *data = nullptr;
    bool of(PyObject *object, int64_t size) {
        if (object == Py_None)
            return true;
        View view;
        if (!view.floats(object, 1, 1) || view.last() != size)
            return false;
        data = view.as<float>();
        return true;
    }
};

// row_start, column, column_start, row, place: five arguments.
struct Pattern {
    View row_start, column, column_start, row, place;
    bool of(PyObject *const *objects, int64_t values) {
        return row_start.indices(objects[0]) && column.indices(objects[1]) && column_start.indices(objects[2]) &&
               row.indices(objects[3]) && place.indices(objects[4]) && column.last() == values &&
               row.last() == values && place.last() == values && rows() > 0 && columns() > 0;
    }
    int64_t rows() const { return row_start.last() - 1; }
    int64_t columns() const { return column_start.last() - 1; }
};

// A sequence of exactly `count` numbers; an exception is set where it is none.
bool read(PyObject *sequence, int64_t *numbers, Py_ssize_t count) {
    if (PySequence_Size(sequence) != count)
        return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject *item = PySequence_GetItem(sequence, i);
        if (item == nullptr)
            return false;
        numbers[i] = PyLong_AsLongLong(item);
        Py_DECREF(item);
    }
    return !PyErr_Occurred();
}

struct Context { // the first two arguments: native.call_context()
    int isa, threads;
    explicit Context(PyObject *const *a) : isa(int(PyLong_AsLong(a[0]))), threads(int(PyLong_AsLong(a[1]))) {}
};

bool counts(const char *name, Py_ssize_t given, Py_ssize_t least, Py_ssize_t most) {
    if (given >= least && given <= most)
        return true;
    PyErr_Format(PyExc_TypeError, "%s was given %zd arguments; expected %zd", name, given, most);
    return false;
}

// --- unstructured: linear --------------------------------------------------------------------------------------------

// (isa, threads, x, values, bias, *pattern) -> y
PyObject *sparse_linear(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("sparse_linear", count, 10, 10))
        return nullptr;
    const Context context(a);
    View x, values;
    Bias bias;
    Pattern pattern;
    if (!x.floats(a[2]) || !values.floats(a[3], 1, 1) || !pattern.of(a + 5, values.last()) || x.numel() == 0 ||
        x.last() != pattern.columns() || !bias.of(a[4], pattern.rows()))
        return unfit();
    Result y;
    if (!y.make(x.shape, x.dimensions - 1, pattern.rows()))
        return unfit();
    int refused;
    Py_BEGIN_ALLOW_THREADS;
    refused = fxopt_sparse_linear(x.as<float>(), pattern.row_start.as<int32_t>(), pattern.column.as<int32_t>(),
                                  values.as<float>(), bias.data, y.data(), values.last(), x.rows(), x.last(),
                                  pattern.rows(), context.isa, context.threads);
    Py_END_ALLOW_THREADS;
    return refused ? unfit() : y.take();
}

// Room for dx, dw and db: the gradients that are wanted, and empty tensors for the others.
struct Gradients {
    Result x, values, bias;
    int wanted = 0;

    bool make(PyObject *flags, const View &like, int64_t count, int64_t outputs) {
        int64_t numbers[3];
        if (!read(flags, numbers, 3))
            return false;
        wanted = (numbers[0] ? fxopt::INPUT : 0) | (numbers[1] ? fxopt::VALUES : 0) | (numbers[2] ? fxopt::BIAS : 0);
        const bool room = numbers[0] ? x.make(like.shape, like.dimensions - 1, like.last()) : x.make(0);
        return room && values.make(numbers[1] ? count : 0) && bias.make(numbers[2] ? outputs : 0);
    }
    PyObject *take() { return Py_BuildValue("(NNN)", x.take(), values.take(), bias.take()); }
};

// (isa, threads, gradient, x, values, *pattern, wanted) -> dx, dw, db
PyObject *sparse_linear_backward(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("sparse_linear_backward", count, 11, 11))
        return nullptr;
    const Context context(a);
    View g, x, values;
    Pattern pattern;
    if (!g.floats(a[2]) || !x.floats(a[3]) || !values.floats(a[4], 1, 1) || !pattern.of(a + 5, values.last()) ||
        x.numel() == 0 || x.last() != pattern.columns() || g.last() != pattern.rows() ||
        !g.has_rows_of(x))
        return unfit();
    Gradients d;
    if (!d.make(a[10], x, values.last(), pattern.rows()))
        return unfit();
    int refused;
    Py_BEGIN_ALLOW_THREADS;
    refused = fxopt_sparse_linear_backward(
        x.as<float>(), g.as<float>(), pattern.column_start.as<int32_t>(), pattern.row.as<int32_t>(),
        pattern.place.as<int32_t>(), values.as<float>(), d.x.data(), d.values.data(), d.bias.data(), values.last(),
        x.rows(), x.last(), pattern.rows(), d.wanted, context.isa, context.threads);
    Py_END_ALLOW_THREADS;
    return refused ? unfit() : d.take();
}

// --- unstructured: convolution ---------------------------------------------------------------------------------------

// The sizes of a convolution of images [batch,] channels, height, width, as `Window` of unstructured_window.py.
struct Window {
    fxopt::Shape s;
    int64_t outer = 0; // dimensions before the channels

    // Of x, pattern and the arguments kernel_size, stride, padding (four numbers), dilation and groups.
    bool of(const View &x, const Pattern &pattern, PyObject *const *options) {
        int64_t kernel[2], stride[2], padding[4], dilation[2], out[2];
        if (!read(options[0], kernel, 2) || !read(options[1], stride, 2) || !read(options[2], padding, 4) ||
            !read(options[3], dilation, 2))
            return false;
        const int64_t groups = PyLong_AsLongLong(options[4]), *size = x.shape + x.dimensions - 2;
        if (PyErr_Occurred() || groups < 1 || groups > LARGEST)
            return false;
        int64_t reach = 1;
        for (int i = 0; i < 2; ++i) {
            for (const int64_t n : {kernel[i], stride[i], dilation[i], padding[2 * i] + 1, padding[2 * i + 1] + 1, size[i]})
                if (n < 1 || n > LARGEST)
                    return false;
            const int64_t span = dilation[i] * (kernel[i] - 1) + 1;
            const int64_t padded = size[i] + padding[2 * i] + padding[2 * i + 1];
            if (padded < span)
                return false;
            out[i] = (padded - span) / stride[i] + 1;
            const int64_t side = fxopt::most(padded, out[i] * stride[i]) + dilation[i] * kernel[i] + 2 * stride[i];
            if (__builtin_mul_overflow(reach, side, &reach))
                return false;
        }
        const int64_t channels = x.shape[x.dimensions - 3], outputs = pattern.rows();
        if (channels < 1 || pattern.columns() != channels * stride[0] * stride[1] || channels % groups != 0 ||
            outputs % groups != 0 || __builtin_mul_overflow(reach, fxopt::most(channels, outputs), &reach) ||
            reach >= LARGEST)
            return false;
        outer = x.dimensions - 3;
        s = {outer == 0 ? 1 : x.shape[0], channels,  size[0],    size[1],    outputs,    out[0],      out[1],     kernel[0],
             kernel[1],                   stride[0], stride[1],  padding[0], padding[2], dilation[0], dilation[1]};
        return true;
    }
    const int64_t *numbers() const { return &s.batch; }

  private:
    static constexpr int64_t LARGEST = int64_t(1) << 31; // what the kernels' int32 offsets reach
};

// (isa, threads, x, values, bias, *pattern, kernel_size, stride, padding, dilation, groups) -> y
PyObject *sparse_conv2d(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("sparse_conv2d", count, 15, 15))
        return nullptr;
    const Context context(a);
    View x, values;
    Bias bias;
    Pattern pattern;
    Window window;
    if (!x.floats(a[2], 3, 4) || !values.floats(a[3], 1, 1) || !pattern.of(a + 5, values.last()) || x.numel() == 0 ||
        !bias.of(a[4], pattern.rows()) || !window.of(x, pattern, a + 10))
        return unfit();
    const fxopt::Shape &s = window.s;
    const int64_t shape[] = {s.batch, s.outputs, s.out_height};
    Result y;
    if (!y.make(shape + 1 - window.outer, int32_t(2 + window.outer), s.out_width))
        return unfit();
    int refused;
    Py_BEGIN_ALLOW_THREADS;
    refused = fxopt_sparse_conv2d(x.as<float>(), pattern.row_start.as<int32_t>(), pattern.column.as<int32_t>(),
                                  values.as<float>(), bias.data, y.data(), window.numbers(), values.last(), context.isa,
                                  context.threads);
    Py_END_ALLOW_THREADS;
    return refused ? unfit() : y.take();
}

// (isa, threads, gradient, x, values, *pattern, kernel_size, stride, padding, dilation, groups, wanted) -> dx, dw, db
PyObject *sparse_conv2d_backward(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("sparse_conv2d_backward", count, 16, 16))
        return nullptr;
    const Context context(a);
    View g, x, values;
    Pattern pattern;
    Window window;
    if (!g.floats(a[2], 3, 4) || !x.floats(a[3], 3, 4) || !values.floats(a[4], 1, 1) ||
        !pattern.of(a + 5, values.last()) || x.numel() == 0 || !window.of(x, pattern, a + 10))
        return unfit();
    const fxopt::Shape &s = window.s;
    const int64_t shape[] = {s.batch, s.outputs, s.out_height, s.out_width};
    Gradients d;
    if (!g.has_shape(shape + 1 - window.outer, x.dimensions) || !d.make(a[15], x, values.last(), s.outputs))
        return unfit();
    int refused;
    Py_BEGIN_ALLOW_THREADS;
    refused = fxopt_sparse_conv2d_backward(
        x.as<float>(), g.as<float>(), pattern.column_start.as<int32_t>(), pattern.row.as<int32_t>(),
        pattern.place.as<int32_t>(), values.as<float>(), d.x.data(), d.values.data(), d.bias.data(), window.numbers(),
        values.last(), d.wanted, context.isa, context.threads);
    Py_END_ALLOW_THREADS;
    return refused ? unfit() : d.take();
}

// --- block-sparse ----------------------------------------------------------------------------------------------------

// data (nnz, outer, inner), crow, col and index, as block_linear.py has them: four arguments, bias or none between.
struct Blocks {
    View data, crow, col, index;
    int64_t nnz = 0, rows = 0, columns = 0, outer = 0, inner = 0;

    bool of(PyObject *const *blocks, PyObject *const *where) {
        if (!data.floats(*blocks, 3, 3) || !crow.indices(where[0]) || !col.indices(where[1]) || !index.indices(where[2]))
            return false;
        nnz = data.shape[0], outer = data.shape[1], inner = data.shape[2];
        rows = crow.last() - 1, columns = index.last() - 3 * nnz - 1;
        return nnz > 0 && rows > 0 && columns > 0 && col.last() == nnz && outer > 0 && inner > 0 &&
               outer % LANES == 0 && inner % LANES == 0;
    }

  private:
    static constexpr int64_t LANES = 16; // LANES of block_linear.py
};

// (isa, threads, x, data, bias, crow, col, index, features, transposed=False) -> y
PyObject *block_linear(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("block_linear", count, 9, 10))
        return nullptr;
    const Context context(a);
    View x;
    Bias bias;
    Blocks w;
    if (!x.floats(a[2]) || !w.of(a + 3, a + 5) || x.numel() == 0)
        return unfit();
    const int turned = count > 9 ? PyObject_IsTrue(a[9]) : 0;
    if (turned < 0)
        return nullptr;
    const int64_t features = PyLong_AsLongLong(a[8]);
    const int32_t *crow = w.crow.as<int32_t>(), *col = w.col.as<int32_t>(), *place = nullptr;
    if (turned) {
        std::swap(w.rows, w.columns);
        std::swap(w.outer, w.inner);
        col = w.index.as<int32_t>() + w.nnz; // as `transposed_index` has them, one after the other
        place = col + w.nnz;
        crow = place + w.nnz;
    }
    if (PyErr_Occurred() || x.last() != w.columns * w.inner || features != w.rows * w.outer ||
        !bias.of(a[4], features))
        return unfit();
    Result y;
    if (!y.make(x.shape, x.dimensions - 1, features))
        return unfit();
    Py_BEGIN_ALLOW_THREADS;
    fxopt_block_product(x.as<float>(), w.data.as<float>(), crow, col, place, bias.data, y.data(), x.rows(), w.rows,
                        w.columns, w.outer, w.inner, !turned, context.isa, context.threads);
    Py_END_ALLOW_THREADS;
    return y.take();
}

// (isa, threads, gradient, x, data, crow, col, index) -> the gradient of data
PyObject *block_gradient(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("block_gradient", count, 8, 8))
        return nullptr;
    const Context context(a);
    View g, x;
    Blocks w;
    if (!g.floats(a[2]) || !x.floats(a[3]) || !w.of(a + 4, a + 5) || x.numel() == 0 || x.last() != w.columns * w.inner ||
        g.last() != w.rows * w.outer || !g.has_rows_of(x))
        return unfit();
    Result d;
    if (!d.make(w.data.shape, 2, w.inner))
        return unfit();
    Py_BEGIN_ALLOW_THREADS;
    fxopt_block_gradient(x.as<float>(), g.as<float>(), w.index.as<int32_t>(), w.col.as<int32_t>(), d.data(), x.rows(),
                         w.nnz, w.rows, w.columns, w.outer, w.inner, context.isa, context.threads);
    Py_END_ALLOW_THREADS;
    return d.take();
}

// --- the module ------------------------------------------------------------------------------------------------------

// (torch.Tensor, torch.nn.Parameter, its exchange capsule, torch.empty, its options, torch.strided, torch.Tensor.is_neg)
// -> whether DLPack's major version is the one that is spoken here; only then may anything else be called.
PyObject *connect(PyObject *, PyObject *const *a, Py_ssize_t count) {
    if (!counts("connect", count, 7, 7))
        return nullptr;
    const void *capsule = PyCapsule_GetPointer(a[2], "dlpack_exchange_api");
    if (capsule == nullptr)
        return nullptr;
    const fxopt::dlpack::Header *header = static_cast<const fxopt::dlpack::Header *>(capsule);
    while (header != nullptr && header->version.major > fxopt::dlpack::MAJOR)
        header = header->previous;
    if (header == nullptr || header->version.major != fxopt::dlpack::MAJOR)
        Py_RETURN_FALSE;
    const Exchange *exchange = reinterpret_cast<const Exchange *>(header);
    PyObject *layout = PyUnicode_InternFromString("layout"), *is_cpu = PyUnicode_InternFromString("is_cpu"),
             *is_cuda = PyUnicode_InternFromString("is_cuda");
    if (PyErr_Occurred())
        return nullptr;
    if (exchange->view == nullptr)
        Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < count; ++i)
        Py_INCREF(a[i]); // for as long as the process lives
    torch = {reinterpret_cast<PyTypeObject *>(a[0]),
             reinterpret_cast<PyTypeObject *>(a[1]),
             a[3],
             a[4],
             a[5],
             a[6],
             exchange,
             layout,
             is_cpu,
             is_cuda};
    Py_RETURN_TRUE;
}

// (*tensors) -> whether each is None or a plain tensor: one that is what it holds.
PyObject *are_plain(PyObject *, PyObject *const *a, Py_ssize_t count) {
    View view;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (a[i] != Py_None && !view.lend_plain(a[i]))
            Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

#define FXOPT_METHOD(name)                                                                                             \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {FXOPT_METHOD(connect),       FXOPT_METHOD(are_plain),
                         FXOPT_METHOD(sparse_linear), FXOPT_METHOD(sparse_linear_backward),
                         FXOPT_METHOD(sparse_conv2d), FXOPT_METHOD(sparse_conv2d_backward),
                         FXOPT_METHOD(block_linear),  FXOPT_METHOD(block_gradient),
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
