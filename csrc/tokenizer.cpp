#include "tokenizer.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <numeric>
#include <system_error>
#include <thread>

#include "pre_tokenizer.h"
#include "unicode.h"

namespace fastbert {
namespace {

// The tokens of one text. All but `ids` only with details, as in Rows.
struct Tokens {
  std::vector<int64_t> ids;
  std::vector<int64_t> spans;
  std::vector<int64_t> words;
  std::vector<std::pair<size_t, std::string>> matched;

  void clear() {
    ids.clear();
    spans.clear();
    words.clear();
    matched.clear();
  }
};

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

size_t n_bytes(const Input& input) {
  size_t sum = 0;
  for (const std::string_view word : input.first.words) sum += word.size();
  for (const std::string_view word : input.second.words) sum += word.size();
  return sum;
}

}  // namespace

void Rows::append(const Rows& other) {
  const auto n_tokens = static_cast<int64_t>(ids.size());
  const auto add = [](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  add(ids, other.ids);
  add(type_ids, other.type_ids);
  add(position_ids, other.position_ids);
  add(samples, other.samples);
  add(spans, other.spans);
  add(words, other.words);
  add(sequences, other.sequences);
  for (size_t i = 1; i < other.offsets.size(); ++i) offsets.push_back(n_tokens + other.offsets[i]);
  for (const auto& [index, text] : other.matched) {
    matched.emplace_back(static_cast<size_t>(n_tokens) + index, text);
  }
}

// One thread's work: its own buffers, and rows for a part of the inputs.
class Tokenizer::Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, const EncodeOptions& options)
      : tokenizer_(tokenizer), options_(options) {}

  void encode(const Input& input, int64_t sample) {
    const size_t n_special =
        options_.add_special_tokens ? (input.has_second ? kPairSpecials : kSingleSpecials) : 0;
    // HF tokenizers subtracts in unsigned numbers: below the specials there is no limit.
    const bool truncates =
        options_.truncation != Truncation::kNone && options_.max_length >= n_special;
    const size_t room = truncates ? options_.max_length - n_special : kNoLimit;

    // Of a single text, tokens past the room are not looked at.
    const bool can_stop = truncates && !input.has_second && !options_.overflow &&
                          !options_.truncate_left && options_.stride == 0 &&
                          options_.truncation != Truncation::kOnlySecond;
    tokenize(input.first, can_stop ? room : kNoLimit, first_);
    second_.clear();
    if (input.has_second) tokenize(input.second, kNoLimit, second_);

    const Lengths full{first_.ids.size(), second_.ids.size()};
    const Lengths kept =
        truncates ? truncated(full, input.has_second, room, options_.truncation) : full;
    if (kept.first == full.first && kept.second == full.second) {
      add_row({0, full.first}, {0, full.second}, input.has_second, sample);
      return;
    }
    const auto firsts = windows(full.first, kept.first, options_.stride, options_.truncate_left);
    const auto seconds = windows(full.second, kept.second, options_.stride, options_.truncate_left);
    add_row(firsts[0], seconds[0], input.has_second, sample);
    if (!options_.overflow) return;
    // The order of HF tokenizers: the first window of the first text comes back at the end.
    for (size_t i = 1; i < firsts.size(); ++i) {
      for (const Window& second : seconds) add_row(firsts[i], second, input.has_second, sample);
    }
    for (size_t i = 1; i < seconds.size(); ++i) {
      add_row(firsts[0], seconds[i], input.has_second, sample);
    }
  }

  Rows rows;
  std::exception_ptr error;

 private:
  static constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();
  static constexpr size_t kSingleSpecials = 2, kPairSpecials = 3;

  // Fills `tokens`; stops where there are `limit`.
  void tokenize(const Text& text, size_t limit, Tokens& tokens) {
    tokens.clear();
    next_word_ = 0;
    for (size_t i = 0; i < text.words.size() && tokens.ids.size() < limit; ++i) {
      // Words of a text that is split already keep their numbers.
      if (text.is_split) next_word_ = static_cast<int64_t>(i);
      word_step_ = text.is_split ? 0 : 1;
      add_text(text.words[i], limit, tokens);
    }
    if (tokens.ids.size() > limit) tokens.ids.resize(limit);
  }

  void add_text(std::string_view text, size_t limit, Tokens& tokens) {
    tokenizer_.raw_added_.find(text, !options_.split_special_tokens, raw_matches_);
    size_t begin = 0;
    first_char_ = 0;
    for (const AddedTokens::Match& match : raw_matches_) {
      add_plain(text.substr(begin, match.begin - begin), limit, tokens);
      tokens.ids.push_back(match.id);
      if (options_.details) {
        const std::string_view matched = text.substr(match.begin, match.end - match.begin);
        const auto n_chars = static_cast<int64_t>(count_chars(matched));
        tokens.matched.emplace_back(tokens.ids.size() - 1, matched);
        add_detail(first_char_, first_char_ + n_chars, tokens);
        next_word_ += word_step_;
        first_char_ += n_chars;
      }
      begin = match.end;
      if (tokens.ids.size() >= limit) return;
    }
    add_plain(text.substr(begin), limit, tokens);
  }

  // Text between added tokens that are found as they are.
  void add_plain(std::string_view text, size_t limit, Tokens& tokens) {
    if (text.empty()) return;
    if (options_.details) {
      tokenizer_.normalizer_.normalize_aligned(text, normalized_);
    } else {
      tokenizer_.normalizer_.normalize(text, normalized_);
    }
    tokenizer_.normalized_added_.find(normalized_.text, !options_.split_special_tokens,
                                      normalized_matches_);
    size_t begin = 0;
    for (const AddedTokens::Match& match : normalized_matches_) {
      add_words(begin, match.begin, limit, tokens);
      tokens.ids.push_back(match.id);
      if (options_.details) {
        tokens.matched.emplace_back(tokens.ids.size() - 1,
                                    normalized_.text.substr(match.begin, match.end - match.begin));
        add_normalized_detail(match.begin, match.end, tokens);
        next_word_ += word_step_;
      }
      begin = match.end;
      if (tokens.ids.size() >= limit) return;
    }
    add_words(begin, normalized_.text.size(), limit, tokens);
    if (options_.details) first_char_ += static_cast<int64_t>(count_chars(text));
  }

  // The words in bytes [begin, end) of the normalised text.
  void add_words(size_t begin, size_t end, size_t limit, Tokens& tokens) {
    const std::string_view text = std::string_view(normalized_.text).substr(begin, end - begin);
    const WordPiece& pieces = *tokenizer_.pieces_;
    const UnicodeTables& tables = tokenizer_.normalizer_.tables();
    if (!options_.details) {
      for_each_word(text, tables, [&](size_t from, size_t to) {
        pieces.encode(text.substr(from, to - from), tokens.ids);
        return tokens.ids.size() < limit;
      });
      return;
    }
    for_each_word(text, tables, [&](size_t from, size_t to) {
      ends_.clear();
      pieces.encode(text.substr(from, to - from), tokens.ids, ends_);
      size_t piece_begin = begin + from;
      for (const size_t piece_end : ends_) {
        add_normalized_detail(piece_begin, begin + from + piece_end, tokens);
        piece_begin = begin + from + piece_end;
      }
      next_word_ += word_step_;
      return true;
    });
  }

  // The token just added stands for bytes [begin, end) of the normalised text.
  void add_normalized_detail(size_t begin, size_t end, Tokens& tokens) {
    add_detail(first_char_ + normalized_.source[begin],
               first_char_ + normalized_.source[end - 1] + 1, tokens);
  }

  void add_detail(int64_t begin, int64_t end, Tokens& tokens) {
    tokens.spans.push_back(begin);
    tokens.spans.push_back(end);
    tokens.words.push_back(next_word_);
  }

  void add_row(Window first, Window second, bool has_second, int64_t sample) {
    const size_t row_begin = rows.ids.size();
    const bool special = options_.add_special_tokens;
    if (special) add_special(tokenizer_.cls_id_);
    add_window(first_, first, 0);
    if (special) add_special(tokenizer_.sep_id_);
    rows.type_ids.resize(rows.ids.size(), 0);
    if (has_second) {
      add_window(second_, second, 1);
      if (special) add_special(tokenizer_.sep_id_);
      rows.type_ids.resize(rows.ids.size(), 1);
    }
    if (options_.positions) {
      rows.position_ids.resize(rows.ids.size());
      const auto begin = rows.position_ids.begin() + static_cast<std::ptrdiff_t>(row_begin);
      std::iota(begin, rows.position_ids.end(), 0);
    }
    rows.offsets.push_back(static_cast<int64_t>(rows.ids.size()));
    rows.samples.push_back(sample);
  }

  void add_special(int64_t id) {
    rows.ids.push_back(id);
    if (!options_.details) return;
    rows.spans.insert(rows.spans.end(), {0, 0});
    rows.words.push_back(-1);
    rows.sequences.push_back(-1);
  }

  void add_window(const Tokens& tokens, Window window, int64_t sequence) {
    const auto add = [window](std::vector<int64_t>& to, const std::vector<int64_t>& from,
                              size_t width) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(width * window.begin);
      const auto end = from.begin() + static_cast<std::ptrdiff_t>(width * window.end);
      to.insert(to.end(), begin, end);
    };
    const size_t n_before = rows.ids.size();
    add(rows.ids, tokens.ids, 1);
    if (!options_.details) return;
    add(rows.spans, tokens.spans, 2);
    add(rows.words, tokens.words, 1);
    rows.sequences.resize(rows.ids.size(), sequence);
    for (const auto& [index, text] : tokens.matched) {
      if (index >= window.begin && index < window.end) {
        rows.matched.emplace_back(n_before + index - window.begin, text);
      }
    }
  }

  const Tokenizer& tokenizer_;
  const EncodeOptions& options_;

  Tokens first_, second_;
  std::vector<AddedTokens::Match> raw_matches_, normalized_matches_;
  Normalized normalized_;
  std::vector<size_t> ends_;
  int64_t first_char_ = 0;  // of the text that normalized_ is from; kept up with details only
  int64_t next_word_ = 0;
  int64_t word_step_ = 1;
};

Tokenizer::Tokenizer(std::shared_ptr<const WordPiece> pieces, const Normalizer& normalizer,
                     std::vector<AddedToken> added, int64_t cls_id, int64_t sep_id)
    : pieces_(std::move(pieces)),
      normalizer_(normalizer),
      raw_added_(raw_ones(added)),
      normalized_added_(normalized_ones(added, normalizer)),
      cls_id_(cls_id),
      sep_id_(sep_id) {}

std::string Tokenizer::normalize(std::string_view text) const {
  Normalized normalized;
  normalizer_.normalize(text, normalized);
  return normalized.text;
}

Rows Tokenizer::encode(const std::vector<Input>& inputs, const EncodeOptions& options,
                       size_t n_threads) const {
  // Inputs bounds[i] to bounds[i + 1] are one thread's, of about as many bytes as any other's.
  size_t total = 0;
  for (const Input& input : inputs) total += n_bytes(input);
  constexpr size_t kWorthAThread = 1 << 15;  // bytes: starting a thread takes as long as these
  n_threads = std::min(n_threads, 1 + total / kWorthAThread);
  std::vector<size_t> bounds{0};
  size_t bytes = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    bytes += n_bytes(inputs[i]);
    if (bytes * n_threads >= total * bounds.size() && bounds.size() < n_threads) {
      bounds.push_back(i + 1);
    }
  }
  if (bounds.back() != inputs.size()) bounds.push_back(inputs.size());

  std::vector<Encoder> encoders(bounds.size() - 1, Encoder(*this, options));
  const auto work = [&](size_t part) {
    try {
      for (size_t i = bounds[part]; i < bounds[part + 1]; ++i) {
        encoders[part].encode(inputs[i], static_cast<int64_t>(i));
      }
    } catch (...) {
      encoders[part].error = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (size_t part = 1; part < encoders.size(); ++part) {
    try {
      threads.emplace_back(work, part);
    } catch (const std::system_error&) {  // no more threads to be had
      work(part);
    }
  }
  if (!encoders.empty()) work(0);
  for (std::thread& thread : threads) thread.join();

  Rows rows;
  for (Encoder& encoder : encoders) {
    if (encoder.error) std::rethrow_exception(encoder.error);
    if (encoders.size() == 1) return std::move(encoder.rows);
    rows.append(encoder.rows);
  }
  return rows;
}

}  // namespace fastbert
