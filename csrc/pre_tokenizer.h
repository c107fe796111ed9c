// BertPreTokenizer: words are what spaces separate, and every punctuation character by itself.
#pragma once

#include <cstdint>
#include <string_view>

#include "unicode.h"

namespace fastbert {

enum class CharKind : uint8_t { kWord, kSpace, kPunctuation };

// The kinds of ASCII characters, which are the same in all tables, copied once.
class AsciiKinds {
 public:
  AsciiKinds();
  CharKind operator[](char c) const { return kinds_[static_cast<unsigned char>(c)]; }

 private:
  CharKind kinds_[128];
};
extern const AsciiKinds kAsciiKinds;

// Calls visit(begin, end), byte positions in `text`, for one word after the other until it
// returns false. `text` is normalised, by `tables`: its only white space is ' '.
//
//   "it's new" -> "it" "'" "s" "new"
template <class Visit>
void for_each_word(std::string_view text, const UnicodeTables& tables, Visit&& visit) {
  const char* const data = text.data();
  const size_t size = text.size();
  size_t begin = 0;  // of the word at hand
  size_t at = 0;
  while (at < size) {
    CharKind kind;
    uint32_t step = 1;
    if (is_ascii(data[at])) {
      kind = kAsciiKinds[data[at]];
    } else {
      const Decoded decoded = decode_utf8(data + at);
      step = decoded.size;
      kind = tables.char_flags(decoded.c) & kPunctuation ? CharKind::kPunctuation : CharKind::kWord;
    }
    if (kind != CharKind::kWord) {
      if (at != begin && !visit(begin, at)) return;
      begin = at + step;
      if (kind == CharKind::kPunctuation && !visit(at, begin)) return;
    }
    at += step;
  }
  if (at != begin) visit(begin, at);
}

}  // namespace fastbert
