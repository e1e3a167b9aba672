/* An empty extension module: with it the shared object is an ordinary part of a wheel (tag abi3). The kernels are plain
   C functions in the same file, reached through ctypes. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
