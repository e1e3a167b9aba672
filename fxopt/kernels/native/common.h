// What every kernel of the library needs. Include this first, and every standard header before `per_isa.h`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define FXOPT_INLINE inline __attribute__((always_inline))
// A C function that Python calls.
#define FXOPT_API extern "C" __attribute__((visibility("default")))

// Keeps a vector in its register: without it GCC loads it again for each use, and loses a third of the speed.
#if defined(__x86_64__) || defined(__i386__)
#define FXOPT_KEEP(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define FXOPT_KEEP(v) asm("" : "+w"(v))
#else
#define FXOPT_KEEP(v)
#endif

// Keeps a pointer in a register of its own, where GCC would make one for every address.
#define FXOPT_KEEP_POINTER(p) asm("" : "+r"(p))

namespace fxopt {

// The instruction sets, as they are numbered for Python.
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

// Scratch memory on a cache line's boundary, for one call or one thread of it.
class Scratch {
  public:
    explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
        if (data_ == nullptr)
            std::abort(); // as torch's own threads do; there is no way to raise from here
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    template <typename T> T *as() const { return static_cast<T *>(data_); }

  private:
    void *data_;
};

// Memory that a thread keeps between calls: large memory that is freed goes back to the system and comes again page by
// page, which costs more than many a product. Large memory is asked for in pages of 2 MB: what is read here and there in a
// panel has more pages of 4 kB than the CPU remembers the addresses of.
class KeptMemory {
  public:
    KeptMemory() = default;
    ~KeptMemory() { std::free(data_); }
    KeptMemory(const KeptMemory &) = delete;
    KeptMemory &operator=(const KeptMemory &) = delete;

    float *get(int64_t floats) {
        if (floats > size_) {
            std::free(data_);
            const size_t asked = static_cast<size_t>(floats) * 4, page = asked < LARGE / 2 ? SMALL : LARGE;
            const size_t bytes = (asked + page - 1) / page * page;
            data_ = static_cast<float *>(std::aligned_alloc(page, bytes));
            if (data_ == nullptr)
                std::abort();
#if defined(MADV_HUGEPAGE)
            if (page == LARGE)
                madvise(data_, bytes, MADV_HUGEPAGE); // where the system has none, small ones do
#endif
            size_ = static_cast<int64_t>(bytes / 4);
        }
        return data_;
    }

  private:
    static constexpr size_t SMALL = 4096, LARGE = 2 << 20;
    float *data_ = nullptr;
    int64_t size_ = 0;
};

} // namespace fxopt
