// A growable array of int32 that, unlike a vector, writes nothing where it grows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fastbert {

class Ints {
 public:
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int32_t* data() { return data_.get(); }
  const int32_t* data() const { return data_.get(); }
  int32_t& operator[](size_t i) { return data_.get()[i]; }
  int32_t operator[](size_t i) const { return data_.get()[i]; }
  const int32_t* begin() const { return data_.get(); }
  const int32_t* end() const { return data_.get() + size_; }

  void reserve(size_t n) {
    if (n <= capacity_) return;
    auto* moved = static_cast<int32_t*>(std::realloc(data_.get(), n * sizeof(int32_t)));
    if (moved == nullptr) throw std::bad_alloc();
    static_cast<void>(data_.release());
    data_.reset(moved);
    capacity_ = n;
  }

  // New elements hold anything.
  void resize(size_t n) {
    if (n > capacity_) reserve(std::max(n, 2 * capacity_));
    size_ = n;
  }

  void push_back(int32_t value) {
    resize(size_ + 1);
    data_.get()[size_ - 1] = value;
  }

  void append(const int32_t* values, size_t n) {
    if (n == 0) return;
    resize(size_ + n);
    std::memcpy(data_.get() + size_ - n, values, n * sizeof(int32_t));
  }

  void clear() { size_ = 0; }

 private:
  struct Free {
    void operator()(int32_t* p) const { std::free(p); }
  };
  std::unique_ptr<int32_t[], Free> data_;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace fastbert
