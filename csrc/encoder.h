// One text to the ids of its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ascii_blocks.h"
#include "ints.h"
#include "knowledge.h"
#include "text.h"
#include "word_cache.h"

namespace fastbert {

// Tokens of texts, laid end to end. All but `ids` only with details.
struct Tokens {
  Ints ids;
  Ints spans;  // two numbers a token: the characters [begin, end) that it stands for
  Ints words;  // the number of its word; -1 for what is not of the text
  // What an added token matched, where that is not the token itself: (index of the token, text).
  std::vector<std::pair<size_t, std::string>> matched;

  void clear();
  // Leaves the first n tokens.
  void cut(size_t n);
};

// How texts are read.
struct Reading {
  bool split_special_tokens = false;  // take special tokens in a text for plain text
  bool details = false;
  bool replace = false;  // bytes that are not UTF-8, by U+FFFD; else they are refused
};

// The tokens around each of many texts, and how many of its own it may have.
struct Frame {
  bool has_specials;
  int32_t cls_id, sep_id;
  size_t limit;
};

// One thread's buffers, and the words that it has met.
//
// ASCII text is split without looking at single characters: SIMD gives bit masks of where words can
// end, and a word of at most 16 bytes is found in a cache by its lower-case bytes. A run that holds
// anything else, up to the next ASCII white space or punctuation, is found in a second cache, or is
// split at the characters that stand alone (CharIds), and what is left between them is normalised.
// In both caches all bytes of a word are compared, so that they change no result.
class Encoder {
 public:
  explicit Encoder(const Knowledge& knowledge);

  // Appends the tokens of `texts[0, n)`, one text that is split into words if `is_split`, or a
  // single one; stops where there are `limit`.
  void encode(const Text* texts, size_t n, bool is_split, size_t limit, const Reading& reading,
              Tokens& out);

  // Short texts are encoded many at once, so that what is done for each chunk, and the time until
  // memory comes, is shared. Takes a text of at most kShort bytes for encode_taken(), where one
  // has_room() for it; false if it must be encoded alone, since added tokens may be in it.
  static constexpr size_t kShort = 512;  // where they are; in UTF-8 at most three times as many
  bool has_room() const { return n_taken_ + 3 * kShort < kChunk; }
  bool take(const Text& text, const Reading& reading);

  // Appends the tokens of the texts taken, without details, and forgets the texts. Gives where the
  // tokens of each end in `out`, specials included.
  const std::vector<size_t>& encode_taken(const Frame& frame, Tokens& out);

 private:
  static constexpr size_t kChunk = 8192;  // bytes that are classified at once
  static constexpr size_t kBlocksAtOnce = 4;
  static constexpr size_t kSlack = 8;  // tokens that may be written behind the last one

  // A run of the chunk, of any length, and the boundary after it.
  struct Found {
    WordKey<2> key;
    const ShortWord* set;  // nullptr if it is longer than the key
    uint32_t begin, length;
    bool is_plain;  // ASCII letters and digits only
  };

  void add_text(std::string_view text);
  void add_plain(std::string_view text);
  void add_normalized(std::string_view text);
  void normalize(std::string_view text);
  void add_words(size_t begin, size_t end, int32_t begin_char);
  template <bool kDetails>
  void scan(std::string_view text);
  template <bool kDetails>
  size_t scan_chunk(const char* text, size_t size, bool is_last, int32_t offset);
  size_t end_text(size_t n_tokens);
  template <bool kDetails>
  void add_run(const char* text, size_t size, bool is_new, int32_t begin_char);
  template <bool kDetails>
  void add_part(const char* text, size_t size, bool is_plain, bool is_new, int32_t begin_char);
  bool can_remember(const char* text, size_t size) const;
  template <bool kDetails>
  bool add_known(const char* text, size_t size, int32_t begin_char);
  void remember(const char* text, size_t size, size_t n_before, bool is_plain);
  void add_span(int32_t begin, int32_t end);
  void set_span(size_t token, int32_t begin, int32_t end);
  template <class End>
  void add_spans(const End* ends, size_t n, int32_t begin_char);
  void add_normalized_span(size_t begin, size_t end, int32_t begin_char);
  void make_room(size_t n_tokens, bool details);

  const Knowledge& know_;
  WordCache<ShortWord> short_words_;
  WordCache<LongWord> long_words_;

  // Of the text at hand.
  Tokens* out_ = nullptr;
  size_t limit_ = 0;  // of tokens in *out_
  Reading reading_;
  int32_t next_word_ = 0;
  int32_t word_step_ = 1;
  int32_t first_char_ = 0;  // of the part of the text at hand; kept up with details only
  int32_t n_tails_ = 0;     // bytes of that part, so far, that are no character's first

  // Of the texts taken, a space behind each.
  static constexpr uint32_t kNoEnd = UINT32_MAX;
  std::vector<char> taken_;
  size_t n_taken_ = 0;                       // bytes
  std::vector<uint32_t> text_ends_{kNoEnd};  // where they end in taken_; kNoEnd is the last
  std::vector<size_t> token_ends_;
  Frame frame_{};
  size_t text_begin_ = 0;  // the first token of the text at hand

  std::string utf8_;
  std::vector<AddedTokens::Match> raw_matches_, normalized_matches_;
  Normalized normalized_;
  Ints ends_;
  std::vector<char> copy_;  // the chunk in lower case
  std::vector<Block> blocks_;
  std::vector<Found> found_;
  const char* readable_end_ = nullptr;  // of the memory that the run at hand is in
};

}  // namespace fastbert
