// What kernels ask of the process that calls them: threads and memory. The torch side fills it in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace macaron_ops {

struct Host {
  int64_t threads;  // that `parallel` uses at most; 1 inside another parallel region
  // Calls body(context, begin, end) on disjoint ranges that cover [0, count), at most one per thread, and waits.
  void (*parallel)(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context);
  void* (*allocate)(size_t bytes);  // aligned to 64 bytes, not initialised
  void (*release)(void*);
};

// A buffer that ends with its scope.
template <class T>
class Buffer {
 public:
  Buffer(const Host& host, int64_t count)
      : host_(host), p_(count > 0 ? static_cast<T*>(host.allocate(size_t(count) * sizeof(T))) : nullptr) {}
  ~Buffer() { if (p_ != nullptr) host_.release(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return p_; }

 private:
  const Host& host_;
  T* p_;
};

// parallel(host, count, [&](int64_t begin, int64_t end) { ... }): the function must not throw.
template <class Function>
static inline void parallel(const Host& host, int64_t count, const Function& function) {
  if (count <= 0) return;
  if (host.threads == 1 || count == 1) return function(int64_t(0), count);
  host.parallel(
      count,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Function*>(context))(begin, end); },
      &function);
}

}  // namespace macaron_ops
