#include "word_counts.h"

#include <algorithm>
#include <atomic>

#include "pre_tokenizer.h"
#include "thread_pool.h"

namespace fastbert {

void WordCounts::add(const std::vector<std::string_view>& texts, size_t n_threads) {
  n_threads = std::clamp<size_t>(n_threads, 1, std::max<size_t>(texts.size(), 1));
  std::vector<Table> others(n_threads - 1);  // the first task counts into `table_`
  std::atomic<size_t> next{0};
  ThreadPool::instance().run(n_threads, n_threads, [&](size_t task) {
    Table& table = task == 0 ? table_ : others[task - 1];
    Normalized normalized;
    std::string word;
    for (size_t i = next++; i < texts.size(); i = next++) {
      normalizer_.normalize(texts[i], normalized);
      for_each_word(normalized.text, normalizer_.tables(), [&](size_t begin, size_t end) {
        word.assign(normalized.text, begin, end - begin);
        ++table[word];
        return true;
      });
    }
  });
  for (const Table& table : others) {
    for (const auto& [word, n] : table) table_[word] += n;
  }
}

}  // namespace fastbert
