#include "unicode.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "unicode_tables.h"

namespace fastbert {
namespace {

constexpr uint8_t kMatcherWhiteSpace = 1;
constexpr uint8_t kMatcherWord = 2;
constexpr TwoStage<uint8_t> kMatcher{matcher_pages, matcher};

constexpr char32_t kFirstSyllable = 0xAC00, kLastSyllable = 0xD7A3, kVowels = 21, kTails = 28;
constexpr size_t kCodePoints = 0x110000;

bool is_syllable(char32_t c) { return c >= kFirstSyllable && c <= kLastSyllable; }

std::u32string_view image(const char32_t* pool, uint16_t start) {
  return {pool + start + 1, pool[start]};
}

}  // namespace

UnicodeTables::UnicodeTables()
    : flags_{flags_pages, flags},
      combining_{combining_pages, combining},
      decomposition_index_{decomposition_index_pages, decomposition_index},
      lowercase_index_{lowercase_index_pages, lowercase_index},
      decomposition_pool_(decomposition_pool),
      lowercase_pool_(lowercase_pool) {}

UnicodeTables::UnicodeTables(std::string_view flags, std::string_view combining,
                             const std::vector<std::pair<char32_t, std::u32string>>& decompositions)
    : UnicodeTables() {
  if (flags.size() != kCodePoints || combining.size() != kCodePoints) {
    throw std::invalid_argument("tables must hold a byte for each code point");
  }
  own_flags_.assign(flags.begin(), flags.end());
  own_combining_.assign(combining.begin(), combining.end());
  for (size_t c = 0; c < kCodePoints; ++c) {
    if (own_combining_[c] != 0) own_flags_[c] |= kCombining;
  }
  own_index_.resize(kCodePoints);
  own_pool_.push_back(0);  // the size of no image
  for (const auto& [c, image] : decompositions) {
    own_flags_[c] |= kDecomposes;
    if (is_syllable(c)) continue;
    own_index_[c] = static_cast<uint16_t>(own_pool_.size());
    own_pool_.push_back(static_cast<char32_t>(image.size()));
    own_pool_ += image;
  }
  own_pages_.resize(kCodePoints >> 8);
  std::iota(own_pages_.begin(), own_pages_.end(), uint16_t{0});
  flags_ = {own_pages_.data(), own_flags_.data()};
  combining_ = {own_pages_.data(), own_combining_.data()};
  decomposition_index_ = {own_pages_.data(), own_index_.data()};
  decomposition_pool_ = own_pool_.data();
}

std::u32string_view UnicodeTables::decomposition(char32_t c, char32_t (&buffer)[3]) const {
  if (!is_syllable(c)) return image(decomposition_pool_, decomposition_index_[c]);
  const char32_t syllable = c - kFirstSyllable;
  const char32_t tail = syllable % kTails;
  buffer[0] = 0x1100 + syllable / (kVowels * kTails);
  buffer[1] = 0x1161 + syllable / kTails % kVowels;
  buffer[2] = 0x11A7 + tail;
  return {buffer, tail == 0 ? 2U : 3U};
}

std::u32string_view UnicodeTables::lowercase(char32_t c) const {
  return image(lowercase_pool_, lowercase_index_[c]);
}

bool is_white_space(char32_t c) { return (kMatcher[c] & kMatcherWhiteSpace) != 0; }

bool is_word_char(char32_t c) { return (kMatcher[c] & kMatcherWord) != 0; }

void append_utf8(char32_t c, std::string& out) {
  char bytes[4];
  out.append(bytes, static_cast<size_t>(put_utf8(c, bytes) - bytes));
}

size_t count_chars(std::string_view text) {
  return text.size() - static_cast<size_t>(std::count_if(text.begin(), text.end(), is_utf8_tail));
}

}  // namespace fastbert
