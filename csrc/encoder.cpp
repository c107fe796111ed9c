#include "encoder.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "pre_tokenizer.h"
#include "unicode.h"

namespace fastbert {
namespace {

// Short words fill 2 MiB, long ones 0.5 MiB; a second-level cache holds the ones often met.
constexpr size_t kLog2Sets = 15, kLog2LongSets = 12;
constexpr size_t kKeepBytes = 1 << 20;  // of a buffer that one large text has made grow

size_t count_trailing_zeros(uint64_t bits) {
#if defined(__GNUC__)
  return static_cast<size_t>(__builtin_ctzll(bits));
#else
  size_t n = 0;
  for (; (bits & 1) == 0; bits >>= 1) ++n;
  return n;
#endif
}

size_t count_trailing_ones(uint64_t bits) { return ~bits == 0 ? 64 : count_trailing_zeros(~bits); }

}  // namespace

void Tokens::clear() {
  cut(0);
  matched.clear();
}

void Tokens::cut(size_t n) {
  ids.resize(n);
  if (!spans.empty()) spans.resize(2 * n);
  if (!words.empty()) words.resize(n);
  while (!matched.empty() && matched.back().first >= n) matched.pop_back();
}

Encoder::Encoder(const Knowledge& knowledge)
    : know_(knowledge),
      short_words_(kLog2Sets),
      long_words_(kLog2LongSets),
      taken_(kChunk),
      copy_(kChunk + kBlock + LongWord::kMaxSize),
      blocks_(kChunk / kBlock + 1),
      found_(kBlocksAtOnce * kBlock) {}

void Encoder::encode(const Text* texts, size_t n, bool is_split, size_t limit,
                     const Reading& reading, Tokens& out) {
  const size_t n_before = out.ids.size();
  out_ = &out;
  limit_ = limit > std::numeric_limits<size_t>::max() - n_before ? limit : n_before + limit;
  reading_ = reading;
  next_word_ = 0;
  word_step_ = is_split ? 0 : 1;
  for (size_t i = 0; i < n; ++i) {
    // Words of a text that is split already keep their numbers.
    if (is_split) next_word_ = static_cast<int32_t>(i);
    const std::string_view text = to_utf8(texts[i], reading.replace, utf8_);
    if (text.size() > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("must have less than 2**31 bytes, got " +
                                  std::to_string(text.size()));
    }
    if (out.ids.size() < limit_) add_text(text);  // what is cut off must be readable, too
    if (utf8_.size() > kKeepBytes) std::string().swap(utf8_);
  }
  if (out.ids.size() > limit_) out.cut(limit_);
}

bool Encoder::take(const Text& text, const Reading& reading) {
  if (!know_.normalized_added.empty()) return false;
  const std::string_view utf8 = to_utf8(text, reading.replace, utf8_);
  know_.raw_added.find(utf8, !reading.split_special_tokens, raw_matches_);
  if (!raw_matches_.empty()) return false;
  std::copy(utf8.begin(), utf8.end(), taken_.begin() + static_cast<ptrdiff_t>(n_taken_));
  n_taken_ += utf8.size();
  text_ends_.back() = static_cast<uint32_t>(n_taken_);
  text_ends_.push_back(kNoEnd);
  taken_[n_taken_++] = ' ';
  return true;
}

const std::vector<size_t>& Encoder::encode_taken(const Frame& frame, Tokens& out) {
  token_ends_.clear();
  if (n_taken_ == 0) return token_ends_;
  out_ = &out;
  limit_ = std::numeric_limits<size_t>::max();
  reading_ = {};
  frame_ = frame;
  readable_end_ = copy_.data() + copy_.size();
  if (frame.has_specials) out.ids.push_back(frame.cls_id);
  text_begin_ = out.ids.size();
  scan_chunk<false>(taken_.data(), n_taken_, true, 0);
  out.ids.resize(token_ends_.back());
  n_taken_ = 0;
  text_ends_.assign(1, kNoEnd);
  return token_ends_;
}

// Of the texts taken, the one at hand has had its tokens; gives the number with those around them.
size_t Encoder::end_text(size_t n_tokens) {
  if (n_tokens - text_begin_ > frame_.limit) n_tokens = text_begin_ + frame_.limit;
  out_->ids[n_tokens] = frame_.sep_id;
  n_tokens += frame_.has_specials;
  token_ends_.push_back(n_tokens);
  out_->ids[n_tokens] = frame_.cls_id;  // of the next text
  n_tokens += frame_.has_specials;
  text_begin_ = n_tokens;
  return n_tokens;
}

void Encoder::add_text(std::string_view text) {
  know_.raw_added.find(text, !reading_.split_special_tokens, raw_matches_);
  size_t begin = 0;
  first_char_ = 0;
  for (const AddedTokens::Match& match : raw_matches_) {
    add_plain(text.substr(begin, match.begin - begin));
    out_->ids.push_back(match.id);
    if (reading_.details) {
      const std::string_view matched = text.substr(match.begin, match.end - match.begin);
      const auto n_chars = static_cast<int32_t>(count_chars(matched));
      out_->matched.emplace_back(out_->ids.size() - 1, matched);
      add_span(first_char_, first_char_ + n_chars);
      next_word_ += word_step_;
      first_char_ += n_chars;
    }
    begin = match.end;
    if (out_->ids.size() >= limit_) return;
  }
  add_plain(text.substr(begin));
}

// Text between added tokens that are found as they are.
void Encoder::add_plain(std::string_view text) {
  if (text.empty()) return;
  if (!know_.normalized_added.empty()) {
    add_normalized(text);
  } else if (reading_.details) {
    scan<true>(text);
  } else {
    scan<false>(text);
  }
}

// The way of a text in which added tokens must be looked for once it is normalised.
void Encoder::add_normalized(std::string_view text) {
  normalize(text);
  know_.normalized_added.find(normalized_.text, !reading_.split_special_tokens,
                              normalized_matches_);
  size_t begin = 0;
  for (const AddedTokens::Match& match : normalized_matches_) {
    add_words(begin, match.begin, first_char_);
    out_->ids.push_back(match.id);
    if (reading_.details) {
      out_->matched.emplace_back(out_->ids.size() - 1,
                                 normalized_.text.substr(match.begin, match.end - match.begin));
      add_normalized_span(match.begin, match.end, first_char_);
      next_word_ += word_step_;
    }
    begin = match.end;
    if (out_->ids.size() >= limit_) return;
  }
  add_words(begin, normalized_.text.size(), first_char_);
  if (reading_.details) first_char_ += static_cast<int32_t>(count_chars(text));
}

// Fills normalized_; its sources only with details.
void Encoder::normalize(std::string_view text) {
  if (reading_.details) {
    know_.normalizer.normalize_aligned(text, normalized_);
  } else {
    know_.normalizer.normalize(text, normalized_);
  }
}

// The words in bytes [begin, end) of the normalised text, which is from character begin_char on.
void Encoder::add_words(size_t begin, size_t end, int32_t begin_char) {
  const std::string_view text = std::string_view(normalized_.text).substr(begin, end - begin);
  const WordPiece& pieces = *know_.pieces;
  for_each_word(text, know_.normalizer.tables(), [&](size_t from, size_t to) {
    const std::string_view word = text.substr(from, to - from);
    if (!reading_.details) {
      pieces.encode(word, out_->ids);
      return out_->ids.size() < limit_;
    }
    ends_.clear();
    pieces.encode(word, out_->ids, ends_);
    size_t piece_begin = begin + from;
    for (const int32_t piece_end : ends_) {
      add_normalized_span(piece_begin, begin + from + static_cast<size_t>(piece_end), begin_char);
      piece_begin = begin + from + static_cast<size_t>(piece_end);
    }
    next_word_ += word_step_;
    return true;
  });
}

// The token just added stands for bytes [begin, end) of the normalised text.
void Encoder::add_normalized_span(size_t begin, size_t end, int32_t begin_char) {
  add_span(begin_char + static_cast<int32_t>(normalized_.source[begin]),
           begin_char + static_cast<int32_t>(normalized_.source[end - 1]) + 1);
}

void Encoder::add_span(int32_t begin, int32_t end) {
  out_->spans.push_back(begin);
  out_->spans.push_back(end);
  out_->words.push_back(next_word_);
}

void Encoder::set_span(size_t token, int32_t begin, int32_t end) {
  out_->spans[2 * token] = begin;
  out_->spans[2 * token + 1] = end;
  out_->words[token] = next_word_;
}

void Encoder::make_room(size_t n_tokens, bool details) {
  out_->ids.resize(n_tokens);
  if (!details) return;
  out_->spans.resize(2 * n_tokens);
  out_->words.resize(n_tokens);
}

template <bool kDetails>
void Encoder::scan(std::string_view text) {
  n_tails_ = 0;
  for (size_t at = 0; at < text.size() && out_->ids.size() < limit_;) {
    const size_t size = std::min(kChunk, text.size() - at);
    const bool is_last = at + size == text.size();
    readable_end_ = copy_.data() + copy_.size();
    size_t done = scan_chunk<kDetails>(text.data() + at, size, is_last, static_cast<int32_t>(at));
    if (done == 0) {  // one run is longer than a chunk
      const auto ends_run = [this](char c) {
        return is_ascii(c) && !CharIds::is_in_run(know_.char_ids[static_cast<unsigned char>(c)]);
      };
      const char* const begin = text.data() + at;
      const char* const end = text.data() + text.size();
      done = static_cast<size_t>(std::find_if(begin, end, ends_run) - begin);
      readable_end_ = text.data() + text.size();
      add_run<kDetails>(text.data() + at, done, false,
                        first_char_ + static_cast<int32_t>(at) - n_tails_);
    }
    at += done;
  }
  first_char_ += static_cast<int32_t>(text.size()) - n_tails_;
}

// The words of `text`, from its first byte on; gives how many bytes are done: all if `is_last`,
// else all before a run that may go on in the next chunk.
template <bool kDetails>
size_t Encoder::scan_chunk(const char* text, size_t size, bool is_last, int32_t offset) {
  know_.classify(text, size, know_.normalizer.lowers_ascii(), copy_.data(), blocks_.data());
  const size_t n_blocks = size / kBlock + is_last;
  const auto char_of = [&](size_t byte) {
    return first_char_ + offset + static_cast<int32_t>(byte) - n_tails_;
  };
  size_t n_tokens = out_->ids.size();
  size_t begin = 0;             // of the run at hand
  uint64_t after_boundary = 1;  // bit 0: whether the block at hand is behind a boundary
  bool dirty = false;           // whether it has had other characters in the blocks before
  const size_t room = size + text_ends_.size() + kSlack;
  make_room(n_tokens + room, kDetails);
  const uint32_t* text_end = text_ends_.data();
  // Here, since the compiler cannot know that writing tokens leaves members as they are.
  const char* const copy = copy_.data();
  const int32_t* const ascii_ids = know_.ascii_ids;
  const uint8_t* const ascii_count = know_.ascii_count;
  int32_t* ids = out_->ids.data();
  for (size_t first = 0; first < n_blocks && n_tokens < limit_; first += kBlocksAtOnce) {
    // All words of some blocks are looked up before the first is used: the memory has time to come.
    Found* found = found_.data();
    for (size_t i = first; i < std::min(first + kBlocksAtOnce, n_blocks); ++i) {
      // White space behind a boundary ends no word, and there is nothing to be done about it.
      const uint64_t idle = blocks_[i].space & (blocks_[i].boundary << 1 | after_boundary);
      after_boundary = blocks_[i].boundary >> 63;
      begin += count_trailing_ones(idle);
      uint64_t boundary = blocks_[i].boundary & ~idle;
      uint64_t other = blocks_[i].other;
      for (; boundary != 0; boundary &= boundary - 1) {
        const size_t end = i * kBlock + count_trailing_zeros(boundary);
        const uint64_t before = (boundary & -boundary) - 1;  // the bits below the lowest one
        dirty |= (other & before) != 0;
        other &= ~before;
        found->begin = static_cast<uint32_t>(begin);
        found->length = static_cast<uint32_t>(end - begin);
        found->is_plain = !dirty;
        found->set = nullptr;
        if (end - begin <= ShortWord::kMaxSize) {
          found->key = {copy + begin, end - begin};
          found->set = short_words_.prefetch(found->key);
        } else if (end - begin <= LongWord::kMaxSize) {
          long_words_.prefetch({copy + begin, end - begin});
        }
        ++found;
        dirty = false;
        begin = i * kBlock + count_trailing_ones(idle | before | (before + 1));
      }
      dirty |= other != 0;
    }
    for (const Found* word = found_.data(); word != found; ++word) {
      for (; word->begin > *text_end; ++text_end) n_tokens = end_text(n_tokens);
      const size_t end = word->begin + word->length;
      if (word->length != 0) {
        // Of what is normalised no spans are known.
        const bool can_know = word->set != nullptr && (!kDetails || word->is_plain);
        const ShortWord* known =
            can_know ? WordCache<ShortWord>::find(word->set, word->key) : nullptr;
        if (known != nullptr && known->n_pieces != 0) {
          std::memcpy(ids + n_tokens, known->ids, sizeof known->ids);
          if (kDetails) {
            int32_t from = char_of(word->begin);
            for (size_t piece = 0; piece < known->n_pieces; ++piece) {
              const int32_t to = char_of(word->begin) + known->ends[piece];
              set_span(n_tokens + piece, from, to);
              from = to;
            }
            next_word_ += word_step_;
          }
          n_tokens += known->n_pieces;
        } else {
          make_room(n_tokens, kDetails);
          const bool is_new = can_know && known == nullptr;
          if (word->is_plain) {
            add_part<kDetails>(copy + word->begin, word->length, true, is_new,
                               char_of(word->begin));
          } else {
            add_run<kDetails>(copy + word->begin, word->length, is_new, char_of(word->begin));
          }
          n_tokens = out_->ids.size();
          make_room(n_tokens + room - end, kDetails);
          ids = out_->ids.data();
        }
      }
      const auto c = static_cast<unsigned char>(copy[end]);
      ids[n_tokens] = ascii_ids[c];
      if (kDetails && ascii_count[c] != 0) {
        set_span(n_tokens, char_of(end), char_of(end) + 1);
        next_word_ += word_step_;
      }
      n_tokens += ascii_count[c];
    }
  }
  for (; *text_end != kNoEnd; ++text_end) n_tokens = end_text(n_tokens);
  make_room(n_tokens, kDetails);
  return is_last ? size : begin;
}

// A run of text with more than ASCII letters and digits in it. is_new: no cache holds it.
template <bool kDetails>
void Encoder::add_run(const char* text, size_t size, bool is_new, int32_t begin_char) {
  if (!kDetails && !is_new && can_remember(text, size)) {
    if (add_known<kDetails>(text, size, begin_char)) return;
    is_new = true;
  }
  const CharIds& char_ids = know_.char_ids;
  const char* const end = text + size;
  const char* part = text;  // begins after the last character that stands alone
  bool is_plain = true;     // what is of the part so far
  int32_t part_char = begin_char;
  int32_t at_char = begin_char;
  size_t n_tokens = out_->ids.size();
  make_room(n_tokens + size, kDetails);
  int32_t* ids = out_->ids.data();
  const auto add_until = [&](const char* part_end) {
    make_room(n_tokens, kDetails);
    const auto part_size = static_cast<size_t>(part_end - part);
    add_part<kDetails>(part, part_size, is_plain, is_new && part_size == size, part_char);
    n_tokens = out_->ids.size();
    make_room(n_tokens + static_cast<size_t>(end - part_end), kDetails);
    ids = out_->ids.data();
  };
  for (const char* p = text; p != end && n_tokens < limit_;) {
    const Decoded decoded = decode_utf8(p);
    const int32_t id = char_ids[decoded.c];
    if (CharIds::is_in_run(id)) {
      // Spans of plain text are counted in bytes.
      is_plain &= id == CharIds::kAsIs && (!kDetails || decoded.size == 1);
    } else {
      if (p != part) add_until(p);
      part = p + decoded.size;
      part_char = at_char + 1;
      is_plain = true;
      if (id != CharIds::kSeparator) {
        ids[n_tokens] = id;
        if (kDetails) {
          set_span(n_tokens, at_char, at_char + 1);
          next_word_ += word_step_;
        }
        ++n_tokens;
      }
    }
    p += decoded.size;
    ++at_char;
  }
  if (part != end && n_tokens < limit_) add_until(end);
  make_room(n_tokens, kDetails);
  if (kDetails) n_tails_ += static_cast<int32_t>(size - count_chars({text, size}));
}

// What is left of a run between characters that stand alone. is_plain: it is a word as it is.
template <bool kDetails>
void Encoder::add_part(const char* text, size_t size, bool is_plain, bool is_new,
                       int32_t begin_char) {
  // Spans of what is normalised follow no simple rule, so that they are not kept.
  const bool remembers = (is_plain || !kDetails) && can_remember(text, size);
  if (remembers && !is_new && add_known<kDetails>(text, size, begin_char)) return;
  const size_t n_before = out_->ids.size();
  ends_.clear();
  if (is_plain) {
    know_.pieces->encode({text, size}, out_->ids, ends_);
    if (kDetails) add_spans(ends_.data(), ends_.size(), begin_char);
  } else {
    normalize({text, size});
    add_words(0, normalized_.text.size(), begin_char);
  }
  if (remembers) remember(text, size, n_before, is_plain);
}

// Whether the caches take these bytes. All of a key can be read, and zeros behind it tell nothing.
bool Encoder::can_remember(const char* text, size_t size) const {
  return size <= LongWord::kMaxSize && text[size - 1] != 0 &&
         readable_end_ - text >= ptrdiff_t{LongWord::kMaxSize};
}

// Appends what the caches hold for these bytes; false if they do not hold it.
template <bool kDetails>
bool Encoder::add_known(const char* text, size_t size, int32_t begin_char) {
  const auto add = [&](const auto& word) {
    out_->ids.append(word.ids, word.n_pieces);
    if (kDetails) add_spans(word.ends, word.n_pieces, begin_char);
    return true;
  };
  if (size <= ShortWord::kMaxSize) {
    const ShortWord* word = short_words_.find({text, size});
    if (word == nullptr) return false;
    if (word->n_pieces != 0) return add(*word);
  }
  const LongWord* word = long_words_.find({text, size});
  return word != nullptr && add(*word);
}

// Keeps the tokens from n_before on for these bytes. A short word that has no piece, or more than
// fit, has an empty entry, and another among the long ones.
void Encoder::remember(const char* text, size_t size, size_t n_before, bool is_plain) {
  const size_t n_pieces = out_->ids.size() - n_before;
  const auto insert = [&](auto& cache, auto&& entry, size_t n) {
    entry.key = {text, size};
    entry.n_pieces = static_cast<uint8_t>(n);
    for (size_t i = 0; i < n; ++i) {
      entry.ids[i] = out_->ids[n_before + i];
      if (is_plain) entry.ends[i] = static_cast<uint8_t>(ends_[i]);
    }
    cache.insert(entry);
  };
  if (size <= ShortWord::kMaxSize) {
    const bool fits = n_pieces != 0 && n_pieces <= ShortWord::kMaxPieces;
    insert(short_words_, ShortWord(), fits ? n_pieces : 0);
    if (fits) return;
  }
  if (n_pieces <= LongWord::kMaxPieces) insert(long_words_, LongWord(), n_pieces);
}

// The spans of the pieces of one plain word.
template <class End>
void Encoder::add_spans(const End* ends, size_t n, int32_t begin_char) {
  int32_t begin = 0;
  for (size_t i = 0; i < n; ++i) {
    add_span(begin_char + begin, begin_char + ends[i]);
    begin = ends[i];
  }
  next_word_ += word_step_;
}

}  // namespace fastbert
