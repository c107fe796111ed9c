// Threads that all tokenizers share: started when first needed, joined when the process ends.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastbert {

class ThreadPool {
 public:
  // The process's pool. A child after fork() gets a new one, since threads stay in the parent.
  static ThreadPool& instance();

  // Calls work(0) to work(n_tasks - 1), each once, on up to n_threads threads, of which the
  // caller's is one; returns when all have returned, or throws what the first of them that threw
  // has thrown. Safe to call from many threads.
  void run(size_t n_tasks, size_t n_threads, const std::function<void(size_t)>& work);

 private:
  struct Job;

  ThreadPool() = default;
  void start(size_t n_threads);
  void serve();
  void join();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;  // one entry for each thread that is wanted for a job
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

// CPUs that this process may use.
size_t n_available_cpus();

}  // namespace fastbert
