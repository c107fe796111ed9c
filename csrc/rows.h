// Rows of tokens as they are made, and the arrays that are made of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "encoder.h"

namespace fastbert {

// [CLS] A [SEP] or [CLS] A [SEP] B [SEP], or these without the specials.
struct Row {
  size_t begin;    // the place of its first token in Tokens; it ends where the next row begins
  size_t second;   // of the first token of B; the end where there is no B
  int32_t sample;  // the input that it is from
};

// Rows that one thread made of neighbouring inputs.
struct Part {
  Tokens tokens;
  std::vector<Row> rows;
  size_t n_tokens = 0;  // once all rows are made

  size_t end_of(size_t row) const { return row + 1 < rows.size() ? rows[row + 1].begin : n_tokens; }
  size_t n_tokens_of(size_t row) const { return end_of(row) - rows[row].begin; }
  // Of all rows, each at least `length` long.
  size_t n_places(size_t length) const;
};

enum class Column {
  kIds,
  kTypeIds,    // 1 in B and the [SEP] after it
  kPositions,  // from 0 in each row
  kMask,       // 1 everywhere
  kSpecial,    // 1 for the template's [CLS] and [SEP]
  kSpans,      // two numbers a token: the characters that it stands for; 0, 0 for specials
  kWords,      // the number of its word in its text; -1 for specials
  kSequences,  // 0 in A, 1 in B, -1 for specials
};

// Where tokens go: rows end to end, each at least `length` long, with `fill` where no tokens are.
struct Layout {
  size_t length = 0;
  int64_t fill = 0;
  bool fill_left = false;
};

class Rows {
 public:
  // n_threads: on how many the columns are written.
  Rows(std::vector<Part> parts, bool has_specials, size_t n_threads);
  Rows(Rows&&) = default;
  Rows& operator=(Rows&&) = default;

  size_t n_rows() const { return n_rows_; }
  size_t n_tokens() const { return n_tokens_; }
  bool has_pairs() const;
  // Of the longest row. Without windows: only the first row of each input counts.
  size_t longest(bool windows) const;

  // (n_rows + 1,): row i is tokens offsets[i] to offsets[i + 1] in a layout.
  template <class T>
  void write_offsets(const Layout& layout, T* out) const;
  // (n_rows,): the input that each row is from.
  void write_samples(int64_t* out) const;
  // The last of the offsets.
  size_t n_places(const Layout& layout) const;
  // Fills `out`, which has room for n_places (twice that for kSpans).
  template <class T>
  void write(Column column, const Layout& layout, T* out) const;

  // Fills (3, n_tokens) with ids, type ids (if asked for) and positions, and frees a part's ids
  // before its positions come into memory: they cannot be written again.
  template <class T>
  void write_packed(bool type_ids, T* out);

  // What an added token matched, where that is not the token itself: (index of the token, text).
  std::vector<std::pair<size_t, std::string>> matched() const;

 private:
  template <class T>
  void write_part(Column column, const Layout& layout, const Part& part, T* out) const;

  // Calls visit(part, the number of places before it) for all parts, on the threads.
  void for_each_part(const Layout& layout, const std::function<void(size_t, size_t)>& visit) const;

  std::vector<Part> parts_;
  bool has_specials_;
  size_t n_threads_;
  size_t n_rows_ = 0;
  size_t n_tokens_ = 0;
};

}  // namespace fastbert
