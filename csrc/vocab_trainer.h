// Word counts to a WordPiece vocabulary, as HF tokenizers trains it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "word_counts.h"

namespace fastbert {

struct VocabOptions {
  size_t size = 30000;
  int64_t min_frequency = 2;         // of a pair that is merged
  size_t limit_alphabet = SIZE_MAX;  // characters that are kept, the most frequent ones
  std::u32string initial_alphabet;   // these count as the most frequent ones
  std::vector<std::string> special_tokens;
};

// The tokens in the order of their ids: special tokens, characters, characters inside words with
// "##" in front, then pairs of tokens that follow each other, merged one after the other until
// there are `size` tokens; the first three kinds are all there even if they are more.
//
// Where HF's result depends on the order of its hash tables, this goes by the sorted words and by
// code points; and a pair may occur more than 2^31 times, where HF's counts overflow.
//
// Calls progress(number of tokens) now and then; what that throws ends the training.
std::vector<std::string> train_vocab(const WordCounts::Table& words, const VocabOptions& options,
                                     const std::function<void(size_t)>& progress);

}  // namespace fastbert
