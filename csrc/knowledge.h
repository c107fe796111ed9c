// What a tokenizer knows, ready to be used.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "added_tokens.h"
#include "ascii_blocks.h"
#include "char_ids.h"
#include "normalizer.h"
#include "wordpiece.h"

namespace fastbert {

// It never changes.
struct Knowledge {
  Knowledge(std::shared_ptr<const WordPiece> pieces, const Normalizer& normalizer,
            const std::vector<AddedToken>& added);

  std::shared_ptr<const WordPiece> pieces;
  Normalizer normalizer;
  AddedTokens raw_added;         // found in the text as it is
  AddedTokens normalized_added;  // found in the normalised text
  CharIds char_ids;
  int32_t ascii_ids[128];    // of punctuation, 0 for the others
  uint8_t ascii_count[128];  // 1 for punctuation, 0 for the others
  Classify classify = best_classify();
};

}  // namespace fastbert
