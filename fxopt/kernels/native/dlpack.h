// How tensors are read from C, whatever version of torch made them: what is used here of DLPack 1.3 and its C exchange
// API (https://dmlc.github.io/dlpack/latest/c_api.html), whose layout does not change while the major version does not.
#pragma once

#include <cstdint>

namespace fxopt::dlpack {

constexpr uint32_t MAJOR = 1;
constexpr int32_t CPU = 1;                // DLDeviceType
constexpr uint8_t INTEGER = 0, FLOAT = 2; // DLDataTypeCode

struct Tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides; // strides of elements; null where there are no gaps
    uint64_t byte_offset;
};

struct Header {
    struct {
        uint32_t major, minor;
    } version;
    Header *previous; // the same of an older major version, or null
};

// What `torch.Tensor.__dlpack_c_exchange_api__`, a capsule of the name "dlpack_exchange_api", points to.
struct Exchange {
    Header header;
    void (*allocate)(), (*managed_from_python)(), (*managed_to_python)(); // not used here
    int (*view)(void *object, Tensor *out); // lends a tensor, nothing owned; -1 and a Python exception where it can't
    void (*current_stream)();               // not used here
};

} // namespace fxopt::dlpack
