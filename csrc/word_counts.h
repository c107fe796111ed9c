// How often each word occurs in texts, for the training of a vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "normalizer.h"

namespace fastbert {

// Takes memory for the distinct words, not for the texts.
//
//   "Who's who" -> "who" 2, "'" 1, "s" 1
class WordCounts {
 public:
  using Table = std::unordered_map<std::string, int64_t>;

  explicit WordCounts(const Normalizer& normalizer) : normalizer_(normalizer) {}

  // Counts the words of `texts` (valid UTF-8), normalised. Threads share out the texts.
  void add(const std::vector<std::string_view>& texts, size_t n_threads);

  const Table& table() const { return table_; }

 private:
  Normalizer normalizer_;
  Table table_;
};

}  // namespace fastbert
