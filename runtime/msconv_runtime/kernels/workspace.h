// Memory for the work of operations.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>

#include "vector.h"

// Memory in large pages.  What is given back is kept, up to MOST bytes, for the next that it fits: the system clears each
// page that it gives, and every layer of a prompt asks for as much again.
class HIDDEN LargePieces {
 public:
  struct Piece {
    void* at;
    size_t bytes;
  };
  static constexpr size_t PAGE = size_t(2) << 20, LEAST = 2 * PAGE, MOST = size_t(128) << 20;

  static LargePieces& one() {
    static LargePieces* pieces = new LargePieces;  // never destroyed: threads that end late give back to it
    return *pieces;
  }

  // So many bytes or more, at a large page's begin.  Throws bad_alloc.
  Piece take(size_t bytes) {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 0; i < count_; i++)
      if (kept_[i].bytes >= bytes && kept_[i].bytes <= 2 * bytes) return remove(i);
    void* at = map(bytes);
    if (!at) {
      while (count_ > 0) unmap(remove(0));
      at = map(bytes);
    }
    if (!at) throw std::bad_alloc();
    return {at, bytes};
  }

  void give_back(Piece piece) {
    if (piece.bytes > MOST) return unmap(piece);
    std::lock_guard<std::mutex> lock(mutex_);
    while (count_ == AT_ONCE || bytes_ + piece.bytes > MOST) unmap(remove(0));
    kept_[count_++] = piece;
    bytes_ += piece.bytes;
  }

 private:
  static constexpr int AT_ONCE = 16;

  // At a multiple of PAGE; null where there is no memory.
  static void* map(size_t bytes) {
    void* whole = mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return nullptr;
    const size_t before = (PAGE - uintptr_t(whole) % PAGE) % PAGE;
    char* at = static_cast<char*>(whole) + before;
    if (before) munmap(whole, before);
    munmap(at + bytes, PAGE - before);
    madvise(at, bytes, MADV_HUGEPAGE);  // where it is refused, small pages do
    return at;
  }
  static void unmap(Piece piece) { munmap(piece.at, piece.bytes); }

  // The oldest is the first.
  Piece remove(int i) {
    const Piece piece = kept_[i];
    std::copy(kept_ + i + 1, kept_ + count_, kept_ + i);
    count_--;
    bytes_ -= piece.bytes;
    return piece;
  }

  std::mutex mutex_;
  Piece kept_[AT_ONCE];
  int count_ = 0;
  size_t bytes_ = 0;
};

// From a multiple of 64 bytes on: a vector across two cache lines loads at half speed.
template <class V>
class HIDDEN Room {
 public:
  explicit Room(size_t count = 0) { reserve(count); }
  Room(const Room&) = delete;
  ~Room() { release(); }
  // For so many elements; what was there is lost if there was less.
  V* reserve(size_t count) {
    if (count > count_) {
      release();
      size_t bytes = (count + COLUMNS - 1) / COLUMNS * COLUMNS * sizeof(V);
      if (bytes >= LargePieces::LEAST) {
        const auto piece = LargePieces::one().take(bytes);
        data_ = static_cast<V*>(piece.at), bytes = piece.bytes;
      } else if (!(data_ = static_cast<V*>(aligned_alloc(64, bytes)))) {
        throw std::bad_alloc();
      }
      count_ = bytes / sizeof(V);
    }
    return data_;
  }

 private:
  void release() {
    if (const size_t bytes = count_ * sizeof(V); bytes >= LargePieces::LEAST)
      LargePieces::one().give_back({data_, bytes});
    else
      free(data_);
    data_ = nullptr, count_ = 0;
  }

  V* data_ = nullptr;
  size_t count_ = 0;
};
typedef Room<float> Floats;
