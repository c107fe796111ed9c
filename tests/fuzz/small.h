// A small vocabulary, in which every kind of character and of split comes up, and its tokenizers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer.h"

namespace fastbert {

constexpr int32_t kUnk = 1, kCls = 2, kSep = 3;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

inline std::shared_ptr<const WordPiece> small_pieces() {
  std::vector<std::pair<std::string, int32_t>> vocab;
  const auto add = [&](const std::string& token) {
    vocab.emplace_back(token, static_cast<int32_t>(vocab.size()));
  };
  for (const char* token : {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}) add(token);
  for (char c = '!'; c <= '~'; ++c) {
    if (c != 'q' && c != '%') add(std::string(1, c));
  }
  for (const char* piece :
       {"a",      "b",      "e",      "s",          "t",         "x",      "0",      "the",
        "ing",    "ss",     "\u00e9", "e\u0301",    "\u0301",    "\u0323", "\u00df", "i\u0307",
        "\u03c3", "\u03c2", "\u0430", "\u0431",     "\u0439",    "\u0438", "\u0306", "\u1100",
        "\u1161", "\u11a8", "\uac01", "\uac00",     "\u65e5",    "\u672c", "\u8c48", "\u0915",
        "\u093f", "\u0e33", "\ufffd", "\U0001f600", "\U00020000"}) {
    if (piece[1] != 0 && piece != std::string("ss")) add(piece);
    add(std::string("##") + piece);
  }
  for (const char* token : {"\u3002", "\u2014", "un", "aaaaaaaaaaaaaaaaaaaa"}) add(token);
  return std::make_shared<WordPiece>(vocab, "[UNK]", 24);  // few, so that they are reached
}

// 0: none. 1: found in the text as it is. 2: also in the normalised text.
inline std::vector<AddedToken> added_tokens(int which) {
  if (which == 0) return {};
  std::vector<AddedToken> tokens{{"[MASK]", 4, false, true, false, false, true},
                                 {"[SEP]", kSep, false, false, false, false, true},
                                 {"<l>", 500, false, true, false, false, false},
                                 {"<r>", 501, false, false, true, false, false},
                                 {"sw", 502, true, false, false, false, false},
                                 {"\u65e5", 503, true, true, true, false, true},
                                 {"[MASK][SEP]", 504, false, false, false, false, false}};
  if (which == 2) {
    tokens.push_back({"Ab\u00c9", 505, false, false, false, true, false});
    tokens.push_back({"ss", 506, true, true, true, true, true});
  }
  return tokens;
}

inline Normalizer normalizer(int options) {
  static const auto tables = std::make_shared<const UnicodeTables>();
  return {tables, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0};
}

}  // namespace fastbert
