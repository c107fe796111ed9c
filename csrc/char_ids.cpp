#include "char_ids.h"

#include "unicode.h"

namespace fastbert {

CharIds::CharIds(const Normalizer& normalizer, const WordPiece& pieces)
    : normalizer_(normalizer), pieces_(pieces) {
  constexpr char32_t kPlane = 0x10000;
  ids_.reserve(kPlane);
  for (char32_t c = 0; c < kPlane; ++c) ids_.push_back(find(c));
}

int32_t CharIds::find(char32_t c) const {
  const uint8_t flags = normalizer_.tables().char_flags(c);
  const uint8_t relevant = flags & normalizer_.relevant();
  if (relevant & kRemoved) return kInRun;
  if (relevant & kSpace) return kSeparator;
  const bool alone = (relevant & kCjk) || (flags & kPunctuation);
  if (!alone) return relevant == 0 ? kAsIs : kInRun;
  if (relevant & ~(kCjk | kPunctuation)) return kInRun;
  std::string word;
  append_utf8(c, word);
  Ints ids;
  pieces_.encode(word, ids);
  return ids[0];
}

}  // namespace fastbert
