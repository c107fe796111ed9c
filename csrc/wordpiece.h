// Splits words into pieces of a vocabulary.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ints.h"
#include "trie.h"

namespace fastbert {

// Splits a word into pieces, longest match first, left to right. All pieces but the first are in
// the vocabulary with "##" in front. A word with no such split, or of more than `max_chars`
// characters, becomes the one unknown id.
//
//   "unaffable" -> "un" "##aff" "##able"
class WordPiece {
 public:
  // `vocab` holds distinct tokens and their ids, which are not negative.
  // Throws std::invalid_argument when it lacks `unknown`.
  WordPiece(const std::vector<std::pair<std::string, int32_t>>& vocab, const std::string& unknown,
            size_t max_chars);

  // Appends the ids of `word` (UTF-8, normalised, no white space, not empty) to `ids`.
  void encode(std::string_view word, Ints& ids) const;

  // The same, and appends the byte of `word` at which each piece ends to `ends`.
  void encode(std::string_view word, Ints& ids, Ints& ends) const;

 private:
  template <class OnPiece>
  bool split(std::string_view word, OnPiece&& on_piece) const;

  Trie trie_;
  uint32_t inner_;  // the node of "##"
  int32_t unknown_id_ = -1;
  size_t max_chars_;
};

}  // namespace fastbert
