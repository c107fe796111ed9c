// Characters that are words by themselves, whatever is beside them.
#pragma once

#include <cstdint>
#include <vector>

#include "normalizer.h"
#include "wordpiece.h"

namespace fastbert {

// For each character: the id of the word that it is (punctuation, and CJK where it is spaced), or
// whether it only separates words, or is a part of a longer run of text. Runs can be normalised one
// by one, since nothing that stands alone combines with a neighbour.
class CharIds {
 public:
  static constexpr int32_t kSeparator = -1;
  static constexpr int32_t kInRun = -2;
  static constexpr int32_t kAsIs = -3;  // in a run, and left as it is where that is normalised

  static bool is_in_run(int32_t id) { return id <= kInRun; }

  CharIds(const Normalizer& normalizer, const WordPiece& pieces);

  int32_t operator[](char32_t c) const { return c < ids_.size() ? ids_[c] : find(c); }

 private:
  int32_t find(char32_t c) const;

  const Normalizer& normalizer_;
  const WordPiece& pieces_;
  std::vector<int32_t> ids_;  // of the Basic Multilingual Plane
};

}  // namespace fastbert
