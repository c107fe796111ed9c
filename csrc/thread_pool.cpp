#include "thread_pool.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fastbert {

struct ThreadPool::Job {
  Job(const std::function<void(size_t)>& work_, size_t n_tasks_) : work(work_), n_tasks(n_tasks_) {}

  const std::function<void(size_t)>& work;
  const size_t n_tasks;
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  size_t n_done = 0;
  size_t failed = SIZE_MAX;  // the first task that threw
  std::exception_ptr error;  // and what

  // Does tasks until there are none left that nobody has begun.
  void take_part() {
    size_t n = 0;
    for (size_t i = next++; i < n_tasks; i = next++, ++n) {
      try {
        work(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (i > failed) continue;
        failed = i;
        error = std::current_exception();
      }
    }
    if (n == 0) return;
    const std::lock_guard lock(mutex);
    n_done += n;
    if (n_done == n_tasks) finished.notify_one();
  }
};

ThreadPool& ThreadPool::instance() {
  // Never destroyed: at exit some thread may still be inside run(), which then works alone.
  static std::atomic<ThreadPool*> pool{nullptr};
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new ThreadPool;
    std::atexit([] { pool.load()->join(); });
#if defined(__linux__)
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
#endif
  });
  return *pool;
}

void ThreadPool::run(size_t n_tasks, size_t n_threads, const std::function<void(size_t)>& work) {
  if (n_threads > n_tasks) n_threads = n_tasks;
  if (n_threads <= 1) {
    for (size_t i = 0; i < n_tasks; ++i) work(i);
    return;
  }
  const auto job = std::make_shared<Job>(work, n_tasks);
  {
    const std::lock_guard lock(mutex_);
    if (!stopping_) {
      start(n_threads - 1);
      jobs_.insert(jobs_.end(), n_threads - 1, job);
    }
  }
  wake_.notify_all();
  job->take_part();
  std::unique_lock lock(job->mutex);
  job->finished.wait(lock, [&] { return job->n_done == n_tasks; });
  if (job->error) std::rethrow_exception(job->error);
}

// With mutex_ held.
void ThreadPool::start(size_t n_threads) {
  try {
    while (threads_.size() < n_threads) threads_.emplace_back([this] { serve(); });
  } catch (const std::system_error&) {  // no more to be had: those there are do the work
  }
}

void ThreadPool::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<Job> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job->take_part();
    lock.lock();
  }
}

void ThreadPool::join() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

size_t n_available_cpus() {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) {
    return static_cast<size_t>(CPU_COUNT(&cpus));
  }
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : n;
}

}  // namespace fastbert
