#include "normalizer.h"

#include <algorithm>
#include <utility>

namespace fastbert {

Normalizer::Normalizer(std::shared_ptr<const UnicodeTables> tables, bool lowercase,
                       bool strip_accents, bool chinese_chars)
    : tables_(std::move(tables)), strip_(strip_accents), lower_(lowercase) {
  relevant_ = kRemoved | kSpace;
  if (chinese_chars) relevant_ |= kCjk;
  if (strip_accents) relevant_ |= kMark | kDecomposes | kCombining;
  if (lowercase) relevant_ |= kLowers;
  for (char32_t c = 0; c < 128; ++c) {
    const uint8_t flags = tables_->char_flags(c) & relevant_;
    char32_t image = c;
    if (flags & kRemoved) image = 0;
    if (flags & kSpace) image = ' ';
    char32_t buffer[3];
    if (flags & kDecomposes) image = tables_->decomposition(c, buffer)[0];
    if (flags & kLowers) image = tables_->lowercase(c)[0];
    ascii_[c] = static_cast<char>(image);
  }
}

// One text on its way through. NFD puts characters of a combining class other than 0 in order of
// class, so these wait in `pending_` until one of class 0 follows.
//
// Alignment is as HF tokenizers has it: the n-th character that is not new in the decomposed text
// stands for the n-th one of the cleaned text, also where the order changed, and a new one (the
// second and later characters of a decomposition) stands for the same as the one before it.
template <bool kAligned>
class Normalizer::Run {
 public:
  Run(const Normalizer& normalizer, std::string_view text, Normalized& out)
      : normalizer_(normalizer), tables_(normalizer.tables()), text_(text), out_(out) {}

  void run() {
    out_.text.clear();
    out_.source.clear();
    const char* p = text_.data();
    const char* const end = p + text_.size();
    while (p != end) {
      if (is_ascii(*p)) {
        if (!pending_.empty() && normalizer_.ascii_[static_cast<unsigned char>(*p)] == 0) {
          ++p;  // removed before marks are put in order: no end to those waiting
          ++index_;
          continue;
        }
        flush();
        const char* const stop = std::find_if_not(p, end, is_ascii);
        add_ascii(p, stop);
        p = stop;
      } else {
        const Decoded decoded = decode_utf8(p);
        add(decoded.c, {p, decoded.size});
        p += decoded.size;
        ++index_;
      }
    }
    flush();
  }

 private:
  struct Pending {
    char32_t c;
    uint8_t combining_class;
    bool is_new;
  };

  void add_ascii(const char* p, const char* stop) {
    const size_t old_size = out_.text.size();
    out_.text.resize(old_size + static_cast<size_t>(stop - p));
    char* to = out_.text.data() + old_size;
    for (; p != stop; ++p) {
      const char image = normalizer_.ascii_[static_cast<unsigned char>(*p)];
      *to = image;
      to += image != 0;
      if (kAligned) {
        if (image != 0) out_.source.push_back(index_);
        ++index_;
      }
    }
    out_.text.resize(static_cast<size_t>(to - out_.text.data()));
  }

  void add(char32_t c, std::string_view bytes) {
    const uint8_t flags = tables_.char_flags(c) & normalizer_.relevant_;
    if (flags == 0) {
      flush();
      out_.text.append(bytes);
      align(index_);
    } else if (flags & kRemoved) {
      return;
    } else if (flags & kSpace) {
      flush();
      put(' ', index_);
    } else if (flags & kCjk) {
      flush();
      put(' ', index_);
      decompose(c, flags);
      flush();
      put(' ', index_);
    } else {
      decompose(c, flags);
    }
  }

  void decompose(char32_t c, uint8_t flags) {
    if (!(flags & kDecomposes)) {
      add_part(c, flags, false);
      return;
    }
    char32_t buffer[3];
    bool is_new = false;
    for (const char32_t part : tables_.decomposition(c, buffer)) {
      add_part(part, tables_.char_flags(part) & normalizer_.relevant_, is_new);
      is_new = true;
    }
  }

  void add_part(char32_t c, uint8_t flags, bool is_new) {
    if (flags & kCombining) {
      pending_.push_back({c, tables_.combining_class(c), is_new});
      if (kAligned && !is_new) pending_sources_.push_back(index_);
    } else {
      flush();
      last_source_ = index_;
      put_lower(c, flags, index_);
    }
  }

  void flush() {
    if (pending_.empty()) return;
    std::stable_sort(pending_.begin(), pending_.end(), [](const Pending& a, const Pending& b) {
      return a.combining_class < b.combining_class;
    });
    size_t next_source = 0;
    for (const Pending& part : pending_) {
      if (kAligned && !part.is_new) last_source_ = pending_sources_[next_source++];
      put_lower(part.c, tables_.char_flags(part.c), last_source_);
    }
    pending_.clear();
    pending_sources_.clear();
  }

  void put_lower(char32_t c, uint8_t flags, uint32_t source) {
    if (normalizer_.strip_ && (flags & kMark)) return;
    if (normalizer_.lower_ && (flags & kLowers)) {
      for (const char32_t part : tables_.lowercase(c)) put(part, source);
    } else {
      put(c, source);
    }
  }

  void put(char32_t c, uint32_t source) {
    append_utf8(c, out_.text);
    align(source);
  }

  void align(uint32_t source) {
    if (kAligned) out_.source.resize(out_.text.size(), source);
  }

  const Normalizer& normalizer_;
  const UnicodeTables& tables_;
  const std::string_view text_;
  Normalized& out_;
  uint32_t index_ = 0;  // of the character at hand; not kept up in ASCII unless aligned
  std::vector<Pending> pending_;
  std::vector<uint32_t> pending_sources_;  // of those that are not new, in the order of the text
  uint32_t last_source_ = 0;
};

void Normalizer::normalize(std::string_view text, Normalized& out) const {
  Run<false>(*this, text, out).run();
}

void Normalizer::normalize_aligned(std::string_view text, Normalized& out) const {
  Run<true>(*this, text, out).run();
}

}  // namespace fastbert
