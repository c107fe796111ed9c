// BertNormalizer: clean_text, handle_chinese_chars, strip_accents, lowercase, in that order.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "unicode.h"

namespace fastbert {

struct Normalized {
  std::string text;
  // For each byte of `text` the character of the source that it stands for; empty if not asked for.
  std::vector<uint32_t> source;
};

// Cleans text: removes control characters, makes white space a space, and, as the options say,
// puts spaces around CJK characters, decomposes (NFD) and drops accents, lowercases.
//
//   "Ça\t日本" -> "ca  日  本 ", source 0 1 2 3 3 3 3 3 4 4 4 4 4
class Normalizer {
 public:
  Normalizer(std::shared_ptr<const UnicodeTables> tables, bool lowercase, bool strip_accents,
             bool chinese_chars);

  const UnicodeTables& tables() const { return *tables_; }

  // Replaces `out` by the normal form of `text` (valid UTF-8).
  void normalize(std::string_view text, Normalized& out) const;

  // The same, with `out.source`.
  void normalize_aligned(std::string_view text, Normalized& out) const;

  // Whether capitals of ASCII become small letters.
  bool lowers_ascii() const { return ascii_[static_cast<int>('A')] == 'a'; }

  // The CharFlags that these options act on: a character without them is copied.
  uint8_t relevant() const { return relevant_; }

 private:
  template <bool kAligned>
  class Run;

  std::shared_ptr<const UnicodeTables> tables_;
  char ascii_[128];  // what becomes of an ASCII character: 0 if removed
  bool strip_;
  bool lower_;
  uint8_t relevant_;
};

}  // namespace fastbert
