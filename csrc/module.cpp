// The module entry. Importing the module loads the library, and with it every registration.
#include <Python.h>

#define FUSED_SO_CONCAT(a, b) a##b
#define FUSED_SO_ENTRY(name) FUSED_SO_CONCAT(PyInit_, name)

PyMODINIT_FUNC FUSED_SO_ENTRY(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "fused_so", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
