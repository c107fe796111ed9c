#include "vocab_trainer.h"

#include <algorithm>
#include <queue>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "unicode.h"

namespace fastbert {
namespace {

constexpr std::string_view kInner = "##";

// Calls visit(character) for each character of `word`.
template <class Visit>
void for_each_char(std::string_view word, Visit&& visit) {
  for (size_t at = 0; at < word.size();) {
    const Decoded decoded = decode_utf8(word.data() + at);
    visit(decoded.c);
    at += decoded.size;
  }
}

// Byte pair encoding: words are sequences of tokens, single characters at first. The pair of tokens
// that is most frequent becomes a token, in all words; then the pair that is most frequent now.
//
//   hug 10, pug 5, pun 12:   h ##u ##g   p ##u ##g   p ##u ##n
//   p ##u, 17 times:         h ##u ##g   pu ##g      pu ##n
//   pu ##n, 12 times:        h ##u ##g   pu ##g      pun
//   ##u ##g, 10 times:       h ##ug      pu ##g      pun
//
// Of pairs as frequent as each other the one with the smaller ids comes first.
//
// A token is made of one pair only, in one step, so all places of a pair come up together, when the
// later of its tokens is made; after that they only become fewer. So the pair enters the queue
// once, with the words it is in; its count is brought up to date when it comes out.
class Trainer {
 public:
  Trainer(const WordCounts::Table& counts, const VocabOptions& options) : options_(options) {
    // The order of the words decides the ids of "##x", so it must not depend on the table.
    std::vector<std::pair<std::string_view, int64_t>> words(counts.begin(), counts.end());
    std::sort(words.begin(), words.end());
    for (const std::string& token : options.special_tokens) add_token(token);
    add_alphabet(words);
    for (const auto& [word, count] : words) add_word(word, count);
    enqueue();
  }

  std::vector<std::string> run(const std::function<void(size_t)>& progress) {
    for (size_t step = 0; tokens_.size() < options_.size && !queue_.empty();) {
      const Candidate top = queue_.top();
      queue_.pop();
      const int64_t count = pairs_[top.pair].count;
      if (count == 0) {
        pairs_.erase(top.pair);
      } else if (count != top.count) {
        queue_.push({count, top.pair});
      } else if (count < options_.min_frequency) {
        break;
      } else {
        merge(top.pair);
        if (++step % 16 == 0) progress(tokens_.size());
      }
    }
    return std::move(tokens_);
  }

 private:
  struct Word {
    size_t begin;  // in symbols_
    size_t size;
    int64_t count;
  };

  // Ids of a character at the start of words and inside: -1 where there is none.
  struct Letter {
    int32_t first = -1;
    int32_t inner = -1;
  };

  struct Pair {
    int64_t count = 0;
    std::vector<uint32_t> words;  // that it is in, or was
  };

  struct Candidate {
    int64_t count;
    uint64_t pair;

    bool operator<(const Candidate& other) const {
      return std::tie(count, other.pair) < std::tie(other.count, pair);
    }
  };

  int32_t add_token(const std::string& token) {
    const auto [at, is_new] = ids_.try_emplace(token, static_cast<int32_t>(tokens_.size()));
    if (is_new) tokens_.push_back(token);
    return at->second;
  }

  void add_alphabet(const std::vector<std::pair<std::string_view, int64_t>>& words) {
    std::unordered_map<char32_t, int64_t> counts;
    for (const auto& [word, count] : words) {
      for_each_char(word, [&counts, n = count](char32_t c) { counts[c] += n; });
    }
    for (const char32_t c : options_.initial_alphabet) counts[c] = INT64_MAX;
    std::vector<std::pair<int64_t, char32_t>> kept;  // the most frequent first
    for (const auto& [c, count] : counts) kept.emplace_back(-count, c);
    std::sort(kept.begin(), kept.end());
    kept.resize(std::min(kept.size(), options_.limit_alphabet));
    std::sort(kept.begin(), kept.end(),
              [](const auto& a, const auto& b) { return a.second < b.second; });
    for (const auto& [_, c] : kept) add_token(utf8(c));
  }

  // Characters outside the alphabet are left out, as if they were not in the word.
  void add_word(std::string_view text, int64_t count) {
    const size_t begin = symbols_.size();
    bool is_first = true;
    for_each_char(text, [&](char32_t c) {
      const int32_t id = letter_id(c, is_first);
      if (id >= 0) symbols_.push_back(id);
      is_first = false;
    });
    words_.push_back({begin, symbols_.size() - begin, count});
    for (size_t i = begin + 1; i < symbols_.size(); ++i) {
      change(symbols_[i - 1], symbols_[i], count, words_.size() - 1);
    }
  }

  int32_t letter_id(char32_t c, bool is_first) {
    const auto [at, is_new] = letters_.try_emplace(c);
    Letter& letter = at->second;
    if (is_new) {
      const auto found = ids_.find(utf8(c));
      if (found != ids_.end()) letter.first = found->second;
    }
    if (is_first || letter.first < 0) return letter.first;
    if (letter.inner < 0) letter.inner = add_token(std::string(kInner) + utf8(c));
    return letter.inner;
  }

  static std::string utf8(char32_t c) {
    std::string text;
    append_utf8(c, text);
    return text;
  }

  void merge(uint64_t pair) {
    const auto a = static_cast<int32_t>(pair >> 32);
    const auto b = static_cast<int32_t>(pair & UINT32_MAX);
    std::string_view tail = tokens_[b];
    if (tail.substr(0, kInner.size()) == kInner) tail.remove_prefix(kInner.size());
    const int32_t merged = add_token(tokens_[a] + std::string(tail));
    for (const uint32_t word : pairs_[pair].words) merge_in(word, a, b, merged);
    pairs_.erase(pair);
    enqueue();
  }

  void merge_in(uint32_t index, int32_t a, int32_t b, int32_t merged) {
    Word& word = words_[index];
    int32_t* const s = symbols_.data() + word.begin;
    size_t to = 0;
    for (size_t i = 0; i < word.size;) {
      if (s[i] != a || i + 1 == word.size || s[i + 1] != b) {
        s[to++] = s[i++];
        continue;
      }
      i += 2;
      if (to > 0) {
        change(s[to - 1], a, -word.count, index);
        change(s[to - 1], merged, word.count, index);
      }
      if (i < word.size) {
        change(b, s[i], -word.count, index);
        change(merged, s[i], word.count, index);
      }
      s[to++] = merged;
    }
    word.size = to;
  }

  void change(int32_t a, int32_t b, int64_t count, size_t word) {
    const uint64_t key = static_cast<uint64_t>(a) << 32 | static_cast<uint32_t>(b);
    Pair& pair = pairs_[key];
    pair.count += count;
    if (count < 0) return;
    if (pair.words.empty()) new_pairs_.push_back(key);
    if (pair.words.empty() || pair.words.back() != word) {
      pair.words.push_back(static_cast<uint32_t>(word));
    }
  }

  void enqueue() {
    for (const uint64_t key : new_pairs_) queue_.push({pairs_[key].count, key});
    new_pairs_.clear();
  }

  const VocabOptions& options_;
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  std::unordered_map<char32_t, Letter> letters_;
  std::vector<int32_t> symbols_;
  std::vector<Word> words_;
  std::unordered_map<uint64_t, Pair> pairs_;
  std::vector<uint64_t> new_pairs_;  // not yet in the queue
  std::priority_queue<Candidate> queue_;
};

}  // namespace

std::vector<std::string> train_vocab(const WordCounts::Table& words, const VocabOptions& options,
                                     const std::function<void(size_t)>& progress) {
  return Trainer(words, options).run(progress);
}

}  // namespace fastbert
