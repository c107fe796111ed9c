#include "rows.h"

#include <algorithm>
#include <numeric>

#include "thread_pool.h"

namespace fastbert {

size_t Part::n_places(size_t length) const {
  size_t n = 0;
  for (size_t i = 0; i < rows.size(); ++i) n += std::max(length, n_tokens_of(i));
  return n;
}

Rows::Rows(std::vector<Part> parts, bool has_specials, size_t n_threads)
    : parts_(std::move(parts)), has_specials_(has_specials), n_threads_(n_threads) {
  for (Part& part : parts_) {
    part.n_tokens = part.tokens.ids.size();
    n_rows_ += part.rows.size();
    n_tokens_ += part.n_tokens;
  }
}

bool Rows::has_pairs() const {
  return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) {
    for (size_t i = 0; i < part.rows.size(); ++i) {
      if (part.rows[i].second != part.end_of(i)) return true;
    }
    return false;
  });
}

size_t Rows::longest(bool windows) const {
  size_t most = 0;
  for (const Part& part : parts_) {
    for (size_t i = 0; i < part.rows.size(); ++i) {
      const bool is_first = i == 0 || part.rows[i].sample != part.rows[i - 1].sample;
      if (windows || is_first) most = std::max(most, part.n_tokens_of(i));
    }
  }
  return most;
}

template <class T>
void Rows::write_offsets(const Layout& layout, T* out) const {
  size_t at = 0;
  *out++ = 0;
  for (const Part& part : parts_) {
    for (size_t i = 0; i < part.rows.size(); ++i) {
      at += std::max(layout.length, part.n_tokens_of(i));
      *out++ = static_cast<T>(at);
    }
  }
}

void Rows::write_samples(int64_t* out) const {
  for (const Part& part : parts_) {
    for (const Row& row : part.rows) *out++ = row.sample;
  }
}

template <class T>
void Rows::write_part(Column column, const Layout& layout, const Part& part, T* out) const {
  const size_t width = column == Column::kSpans ? 2 : 1;
  for (size_t i = 0; i < part.rows.size(); ++i) {
    const Row& row = part.rows[i];
    const size_t n = part.n_tokens_of(i);
    const size_t n_fill = width * (layout.length - std::min(layout.length, n));
    if (layout.fill_left) out = std::fill_n(out, n_fill, static_cast<T>(layout.fill));
    const size_t second = row.second - row.begin;
    switch (column) {
      case Column::kIds:
        std::copy_n(part.tokens.ids.data() + row.begin, n, out);
        break;
      case Column::kTypeIds:
        std::fill(std::fill_n(out, second, T{0}), out + n, T{1});
        break;
      case Column::kPositions:
        std::iota(out, out + n, T{0});
        break;
      case Column::kMask:
        std::fill_n(out, n, T{1});
        break;
      case Column::kSpans:
        std::copy_n(part.tokens.spans.data() + 2 * row.begin, 2 * n, out);
        break;
      case Column::kWords:
        std::copy_n(part.tokens.words.data() + row.begin, n, out);
        break;
      case Column::kSpecial:
      case Column::kSequences: {
        const bool special = column == Column::kSpecial;
        std::fill(std::fill_n(out, second, T{0}), out + n, special ? T{0} : T{1});
        if (has_specials_) {
          out[0] = out[second - 1] = out[n - 1] = special ? T{1} : T{-1};
        }
        break;
      }
    }
    out += width * n;
    if (!layout.fill_left) out = std::fill_n(out, n_fill, static_cast<T>(layout.fill));
  }
}

size_t Rows::n_places(const Layout& layout) const {
  size_t n = 0;
  for (const Part& part : parts_) n += part.n_places(layout.length);
  return n;
}

template <class T>
void Rows::write(Column column, const Layout& layout, T* out) const {
  const size_t width = column == Column::kSpans ? 2 : 1;
  for_each_part(layout, [&](size_t i, size_t begin) {
    write_part(column, layout, parts_[i], out + width * begin);
  });
}

template <class T>
void Rows::write_packed(bool type_ids, T* out) {
  for_each_part({}, [&](size_t i, size_t begin) {
    write_part(Column::kIds, {}, parts_[i], out + begin);
    parts_[i].tokens.ids = Ints();
    if (type_ids) write_part(Column::kTypeIds, {}, parts_[i], out + n_tokens_ + begin);
    write_part(Column::kPositions, {}, parts_[i], out + 2 * n_tokens_ + begin);
  });
}

void Rows::for_each_part(const Layout& layout,
                         const std::function<void(size_t, size_t)>& visit) const {
  std::vector<size_t> begins;
  size_t begin = 0;
  for (const Part& part : parts_) {
    begins.push_back(begin);
    begin += part.n_places(layout.length);
  }
  ThreadPool::instance().run(parts_.size(), n_threads_, [&](size_t i) { visit(i, begins[i]); });
}

std::vector<std::pair<size_t, std::string>> Rows::matched() const {
  std::vector<std::pair<size_t, std::string>> result;
  size_t n_before = 0;
  for (const Part& part : parts_) {
    for (const auto& [index, text] : part.tokens.matched) {
      result.emplace_back(n_before + index, text);
    }
    n_before += part.n_tokens;
  }
  return result;
}

template void Rows::write_offsets(const Layout&, int32_t*) const;
template void Rows::write_offsets(const Layout&, int64_t*) const;
template void Rows::write(Column, const Layout&, int32_t*) const;
template void Rows::write(Column, const Layout&, int64_t*) const;
template void Rows::write_packed(bool, int32_t*);
template void Rows::write_packed(bool, int64_t*);

}  // namespace fastbert
