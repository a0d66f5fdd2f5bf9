// One set of threads for all operations, whichever of MindSpore's threads calls.  Work is handed out in small parts,
// so that a thread that another process holds up leaves its share to the others.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

class Pool {
 public:
  static Pool& one() {
    static Pool* pool = new Pool;  // never destroyed: its threads wait for work until the process ends
    return *pool;
  }

  int64_t size() const { return workers_ + 1; }

  // To be called before the first work; threads are only ever added, as many as the system gives.
  void grow(int64_t threads) {
    std::lock_guard<std::mutex> turn(turn_);
    try {
      for (; workers_ + 1 < threads; workers_++) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {
    }
  }

  // work(i) for all i below `parts`, on this thread and the others.  While another call is under way: on this one.
  // Throws bad_alloc, when all parts have ended, if one of them did.
  template <class F>
  void run(int64_t parts, const F& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (parts < 2 || workers_ == 0 || !turn.owns_lock()) {
      for (int64_t i = 0; i < parts; i++) work(i);
      return;
    }
    const uint64_t job = (ticket_.load() >> 32) + 1;
    ticket_.store(job << 32 | CLOSED);
    call_ = [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); };
    work_ = &work;
    parts_ = parts;
    done_.store(0);
    failed_.store(false);
    ticket_.store(job << 32);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_parts();
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < parts; spins++)
      spins < SPINS ? pause() : std::this_thread::yield();
    if (failed_.load()) throw std::bad_alloc();
  }

 private:
  static constexpr uint64_t CLOSED = 0xffffffff;
  static constexpr int64_t SPINS = 20000;  // some 0.1 ms: longer than the pauses between a graph's nodes

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // A part is taken by changing the ticket from what it was when the job was read: job and part are of one time.
  void take_parts() {
    for (;;) {
      uint64_t ticket = ticket_.load();
      const int64_t part = ticket & 0xffffffff;
      const auto call = call_.load(std::memory_order_relaxed);
      const void* work = work_.load(std::memory_order_relaxed);
      if (part == CLOSED || part >= parts_.load(std::memory_order_relaxed)) return;
      if (!ticket_.compare_exchange_strong(ticket, ticket + 1)) continue;
      try {
        call(work, part);
      } catch (const std::bad_alloc&) {
        failed_.store(true);
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void serve() {
    for (uint64_t seen = ticket_.load();;) {
      int64_t spins = 0;
      while (ticket_.load() == seen && spins++ < SPINS) pause();
      if (ticket_.load() == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_++;
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
        asleep_--;
      }
      take_parts();
      seen = ticket_.load();
    }
  }

  int64_t workers_ = 0;
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
  std::atomic<uint64_t> ticket_{CLOSED};  // number of the job, next part
  std::atomic<int64_t> done_{0}, parts_{0};
  std::atomic<bool> failed_{false};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
};

// body(begin, end) over [0, count) in parts that become shorter, down to `least`: all threads end nearly together, and
// none stops often in what it reads.
template <class F>
void guided_for(int64_t count, int64_t least, const F& body) {
  Pool& pool = Pool::one();
  const int64_t threads = pool.size();
  if (threads == 1 || count < 2 * least) return body(int64_t(0), count);
  std::atomic<int64_t> next{0};
  pool.run(threads, [&](int64_t) {
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t part = std::max(least, std::min((count - begin) / (2 * threads), count / (4 * threads)));
      const int64_t end = std::min(count, begin + part);
      if (!next.compare_exchange_weak(begin, end)) continue;
      body(begin, end);
      begin = next.load();
    }
  });
}

// body(begin, end) over parts of [0, count), each at least `least` long.
template <class F>
void parallel_for(int64_t count, int64_t least, const F& body) {
  Pool& pool = Pool::one();
  const int64_t most = pool.size() == 1 ? 1 : pool.size() * 8;
  const int64_t parts = std::max(int64_t(1), std::min(most, count / std::max(int64_t(1), least)));
  pool.run(parts, [&](int64_t i) { body(count * i / parts, count * (i + 1) / parts); });
}
