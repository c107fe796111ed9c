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

std::vector<AddedToken> raw_ones(std::vector<AddedToken> tokens) {
  const auto normalized = [](const AddedToken& token) { return token.normalized; };
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), normalized), tokens.end());
  return tokens;
}

std::vector<AddedToken> normalized_ones(const std::vector<AddedToken>& tokens,
                                        const Normalizer& normalizer) {
  std::vector<AddedToken> result;
  Normalized content;
  for (const AddedToken& token : tokens) {
    if (!token.normalized) continue;
    result.push_back(token);
    normalizer.normalize(token.content, content);
    result.back().content = content.text;
  }
  return result;
}

int count_trailing_zeros(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int n = 0;
  for (; (bits & 1) == 0; bits >>= 1) ++n;
  return n;
#endif
}

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

Knowledge::Knowledge(std::shared_ptr<const WordPiece> pieces_, const Normalizer& normalizer_,
                     const std::vector<AddedToken>& added)
    : pieces(std::move(pieces_)),
      normalizer(normalizer_),
      raw_added(raw_ones(added)),
      normalized_added(normalized_ones(added, normalizer)),
      char_ids(normalizer, *pieces) {
  for (char32_t c = 0; c < 128; ++c) {
    const int32_t id = char_ids[c];
    ascii_ids[c] = std::max(id, 0);
    ascii_count[c] = id >= 0;
  }
}

Encoder::Encoder(const Knowledge& knowledge)
    : know_(knowledge),
      short_words_(kLog2Sets),
      long_words_(kLog2LongSets),
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
        return is_ascii(c) && know_.char_ids[static_cast<unsigned char>(c)] != CharIds::kInRun;
      };
      const char* const begin = text.data() + at;
      const char* const end = text.data() + text.size();
      done = static_cast<size_t>(std::find_if(begin, end, ends_run) - begin);
      readable_end_ = text.data() + text.size();
      add_run<kDetails>(text.data() + at, done, first_char_ + static_cast<int32_t>(at) - n_tails_);
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
  size_t begin = 0;    // of the run at hand
  bool dirty = false;  // whether it has had other characters in the blocks before
  make_room(n_tokens + size + kSlack, kDetails);
  // Here, since the compiler cannot know that writing tokens leaves members as they are.
  const char* const copy = copy_.data();
  const int32_t* const ascii_ids = know_.ascii_ids;
  const uint8_t* const ascii_count = know_.ascii_count;
  int32_t* ids = out_->ids.data();
  for (size_t first = 0; first < n_blocks && n_tokens < limit_; first += kBlocksAtOnce) {
    // All words of some blocks are looked up before the first is used: the memory has time to come.
    Found* found = found_.data();
    for (size_t i = first; i < std::min(first + kBlocksAtOnce, n_blocks); ++i) {
      uint64_t boundary = blocks_[i].boundary;
      uint64_t other = blocks_[i].other;
      for (; boundary != 0; boundary &= boundary - 1) {
        const size_t end = i * kBlock + static_cast<size_t>(count_trailing_zeros(boundary));
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
        begin = end + 1;
      }
      dirty |= other != 0;
    }
    for (const Found* word = found_.data(); word != found; ++word) {
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
              out_->spans[2 * (n_tokens + piece)] = from;
              out_->spans[2 * (n_tokens + piece) + 1] = to;
              out_->words[n_tokens + piece] = next_word_;
              from = to;
            }
            next_word_ += word_step_;
          }
          n_tokens += known->n_pieces;
        } else {
          make_room(n_tokens, kDetails);
          if (word->is_plain) {
            add_part<kDetails>(copy + word->begin, word->length, true, char_of(word->begin));
          } else {
            add_run<kDetails>(copy + word->begin, word->length, char_of(word->begin));
          }
          n_tokens = out_->ids.size();
          make_room(n_tokens + (size - end) + kSlack, kDetails);
          ids = out_->ids.data();
        }
      }
      const auto c = static_cast<unsigned char>(copy[end]);
      ids[n_tokens] = ascii_ids[c];
      if (kDetails && ascii_count[c] != 0) {
        out_->spans[2 * n_tokens] = char_of(end);
        out_->spans[2 * n_tokens + 1] = char_of(end) + 1;
        out_->words[n_tokens] = next_word_;
        next_word_ += word_step_;
      }
      n_tokens += ascii_count[c];
    }
  }
  make_room(n_tokens, kDetails);
  return is_last ? size : begin;
}

// A run of text with more than ASCII letters and digits in it.
template <bool kDetails>
void Encoder::add_run(const char* text, size_t size, int32_t begin_char) {
  if (!kDetails && can_remember(text, size) && add_known<kDetails>(text, size, begin_char)) return;
  const CharIds& char_ids = know_.char_ids;
  const char* const end = text + size;
  const char* part = text;  // begins after the last character that stands alone
  bool is_plain = true;     // what is of the part so far
  // Only a run that is longer than a chunk still has capitals then: it was not copied.
  const bool lowers = know_.normalizer.lowers_ascii();
  int32_t part_char = begin_char;
  int32_t at_char = begin_char;
  for (const char* p = text; p != end && out_->ids.size() < limit_;) {
    const Decoded decoded = decode_utf8(p);
    const int32_t id = char_ids[decoded.c];
    if (id == CharIds::kInRun) {
      const bool is_capital = decoded.c >= 'A' && decoded.c <= 'Z';
      is_plain &= decoded.c < 0x7F && decoded.c >= ' ' && !(lowers && is_capital);
    } else {
      if (p != part) {
        add_part<kDetails>(part, static_cast<size_t>(p - part), is_plain, part_char);
      }
      part = p + decoded.size;
      part_char = at_char + 1;
      is_plain = true;
      if (id != CharIds::kSeparator) {
        out_->ids.push_back(id);
        if (kDetails) {
          add_span(at_char, at_char + 1);
          next_word_ += word_step_;
        }
      }
    }
    p += decoded.size;
    ++at_char;
  }
  if (part != end && out_->ids.size() < limit_) {
    add_part<kDetails>(part, static_cast<size_t>(end - part), is_plain, part_char);
  }
  if (kDetails) n_tails_ += static_cast<int32_t>(size - count_chars({text, size}));
}

// What is left of a run between characters that stand alone. is_plain: ASCII letters and digits.
template <bool kDetails>
void Encoder::add_part(const char* text, size_t size, bool is_plain, int32_t begin_char) {
  // Spans of what is normalised follow no simple rule, so that they are not kept.
  const bool remembers = (is_plain || !kDetails) && can_remember(text, size);
  if (remembers && add_known<kDetails>(text, size, begin_char)) return;
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
