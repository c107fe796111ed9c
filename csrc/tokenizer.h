// Texts to rows of tokens: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], cut to a length.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "encoder.h"
#include "rows.h"
#include "text.h"
#include "truncation.h"

namespace fastbert {

struct EncodeOptions {
  Reading reading;
  bool add_special_tokens = true;
  Truncation truncation = Truncation::kNone;
  size_t max_length = 0;
  size_t stride = 0;           // tokens that a window shares with the one before it
  bool truncate_left = false;  // keep the end of a text
  bool overflow = false;       // a row for each window of a text, not only for the first
};

// Some texts of a batch: one if they are not split into words.
struct Span {
  size_t begin = 0, end = 0;
};

struct Input {
  Span first;
  Span second;
  bool has_second = false;
};

struct Batch {
  std::vector<Text> texts;
  std::vector<Input> inputs;
  bool is_split = false;  // each text is a word of an input
};

// A text that cannot be read: std::invalid_argument or LoneSurrogate with the number of the input.
// All of it is safe to call from many threads, and after fork().
class Tokenizer {
 public:
  // `added` are tokens that are found in the text before it is split into words.
  Tokenizer(std::shared_ptr<const WordPiece> pieces, const Normalizer& normalizer,
            const std::vector<AddedToken>& added, int32_t cls_id, int32_t sep_id);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The rows of all inputs, in order, whatever the number of threads; 0 for as many as there are
  // CPUs. Throws std::invalid_argument where a text cannot be truncated as asked for, and what
  // to_utf8 throws.
  Rows encode(const Batch& batch, const EncodeOptions& options, size_t n_threads) const;

  // The same for one text, into `ids`, with nothing around it: for single queries.
  void encode_one(const Text& text, const EncodeOptions& options, Ints& ids) const;

  // What is split into words: `text` in the form that normalised added tokens are looked for.
  std::string normalize(std::string_view text) const;

 private:
  class Worker;

  std::unique_ptr<Worker> borrow() const;
  void give_back(std::unique_ptr<Worker> worker) const;

  Knowledge knowledge_;
  int32_t cls_id_;
  int32_t sep_id_;
  // Workers that nobody uses. Slots instead of a lock: a lock could be held when a process forks.
  mutable std::array<std::atomic<Worker*>, 16> idle_{};
};

}  // namespace fastbert
