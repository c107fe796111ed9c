#include "pre_tokenizer.h"

namespace fastbert {

AsciiKinds::AsciiKinds() {
  const UnicodeTables tables;
  for (char32_t c = 0; c < 128; ++c) {
    kinds_[c] = tables.char_flags(c) & kPunctuation ? CharKind::kPunctuation : CharKind::kWord;
  }
  kinds_[' '] = CharKind::kSpace;
}

const AsciiKinds kAsciiKinds;

}  // namespace fastbert
