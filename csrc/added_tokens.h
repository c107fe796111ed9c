// Finds added tokens, special ones among them, in a text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "trie.h"

namespace fastbert {

struct AddedToken {
  std::string content;
  int32_t id;
  bool single_word;  // matches only where no word character is next to it
  bool lstrip;       // swallows the white space before it
  bool rstrip;       // and after it
  bool normalized;   // looked for in the normalised text, not in the text itself
  bool special;
};

// Leftmost match first, the longest of those that begin there; matches do not overlap.
class AddedTokens {
 public:
  struct Match {
    size_t begin, end;  // bytes
    int32_t id;
  };

  // Of tokens with equal content the first one counts.
  // Throws std::invalid_argument when a content is empty.
  explicit AddedTokens(std::vector<AddedToken> tokens);

  // Replaces `matches` by those in `text`; without special tokens unless `with_special`.
  void find(std::string_view text, bool with_special, std::vector<Match>& matches) const;

  bool empty() const { return tokens_.empty(); }

 private:
  // The first place from `at` on where a content can begin; the end of the text if there is none.
  size_t next_begin(std::string_view text, size_t at) const;

  std::vector<AddedToken> tokens_;
  Trie trie_;            // of contents, to their places in tokens_
  bool begins_[256];     // whether a content begins with this byte
  int only_begin_ = -1;  // the byte that all contents begin with, if it is one
};

}  // namespace fastbert
