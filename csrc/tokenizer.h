// Texts to ids: added tokens, words, pieces, then [CLS] A [SEP] or [CLS] A [SEP] B [SEP].
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "normalizer.h"
#include "truncation.h"
#include "wordpiece.h"

namespace fastbert {

struct EncodeOptions {
  bool add_special_tokens = true;
  bool split_special_tokens = false;  // take special tokens in a text for plain text
  Truncation truncation = Truncation::kNone;
  size_t max_length = 0;
  size_t stride = 0;           // tokens that a window shares with the one before it
  bool truncate_left = false;  // keep the end of a text
  bool overflow = false;       // a row for each window of a text, not only for the first
  bool positions = false;      // fill Rows::position_ids
  bool details = false;        // fill the last four of Rows
};

// A text as it is, one word; or a text that was split into words elsewhere.
struct Text {
  std::vector<std::string_view> words;
  bool is_split = false;
};

struct Input {
  Text first;
  Text second;
  bool has_second = false;
};

// Rows of tokens, laid end to end.
struct Rows {
  std::vector<int64_t> ids;
  std::vector<int64_t> type_ids;
  std::vector<int64_t> position_ids;
  std::vector<int64_t> offsets{0};  // row i is tokens offsets[i] to offsets[i + 1]
  std::vector<int64_t> samples;     // the input that each row is from

  // For each token: the characters [begin, end) that it stands for, two numbers; the number of its
  // word; the text it is from, 0 or 1. The last two are -1 for the template's [CLS] and [SEP].
  std::vector<int64_t> spans;
  std::vector<int64_t> words;
  std::vector<int64_t> sequences;
  // What an added token matched, where that is not the token itself: (index of the token, text).
  std::vector<std::pair<size_t, std::string>> matched;

  void append(const Rows& other);
};

// All of it is safe to call from many threads.
class Tokenizer {
 public:
  // `added` are tokens that are found in the text before it is split into words.
  Tokenizer(std::shared_ptr<const WordPiece> pieces, const Normalizer& normalizer,
            std::vector<AddedToken> added, int64_t cls_id, int64_t sep_id);

  // The rows of all inputs, in order, whatever the number of threads.
  // Throws std::invalid_argument where a text cannot be truncated as asked for.
  Rows encode(const std::vector<Input>& inputs, const EncodeOptions& options,
              size_t n_threads) const;

  // What is split into words: `text` in the form that normalised added tokens are looked for.
  std::string normalize(std::string_view text) const;

 private:
  class Encoder;

  std::shared_ptr<const WordPiece> pieces_;
  Normalizer normalizer_;
  AddedTokens raw_added_;         // found in the text as it is
  AddedTokens normalized_added_;  // found in the normalised text
  int64_t cls_id_;
  int64_t sep_id_;
};

}  // namespace fastbert
