#include "ascii_blocks.h"

#include <cstring>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastbert {
namespace {

// The low bits of eight bytes, gathered into one byte.
uint64_t gather(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 7; i >= 0; --i) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    uint64_t byte = 0;
    for (int j = 7; j >= 0; --j) byte = byte << 1 | flags[8 * i + j];
    bits = bits << 8 | byte;
#else
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * i, 8);
    bits = bits << 8 | (eight * 0x0102040810204080U) >> 56;
#endif
  }
  return bits;
}

// Loops over bytes that compilers turn into whatever vectors the target has.
struct Plain {
  static void block(const char* text, bool lower, char* copy, Block& block) {
    uint8_t boundary[kBlock], other[kBlock], space[kBlock];
    for (size_t i = 0; i < kBlock; ++i) {
      const auto c = static_cast<uint8_t>(text[i]);
      const bool upper = static_cast<uint8_t>(c - 'A') < 26;
      const bool word =
          (static_cast<uint8_t>((c | 0x20) - 'a') < 26) | (static_cast<uint8_t>(c - '0') < 10);
      space[i] = (c == ' ') | (c == '\t') | (c == '\n') | (c == '\r');
      other[i] = (c >= 0x7F) | ((c < 0x20) & !space[i]);
      boundary[i] = !(word | other[i]);
      copy[i] = static_cast<char>(c | (lower & upper) << 5);
    }
    block = {gather(boundary), gather(other), gather(space)};
  }
};

#if defined(__x86_64__)
struct Avx2 {
  [[gnu::target("avx2")]] static __m256i all(char c) { return _mm256_set1_epi8(c); }
  [[gnu::target("avx2")]] static __m256i at_most(__m256i v, char bound) {
    return _mm256_cmpeq_epi8(_mm256_min_epu8(v, all(bound)), v);
  }
  [[gnu::target("avx2")]] static __m256i either(__m256i a, __m256i b) {
    return _mm256_or_si256(a, b);
  }

  [[gnu::target("avx2")]] static void half(const char* text, __m256i case_bit, char* copy,
                                           uint32_t& boundary, uint32_t& other, uint32_t& white) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text));
    const __m256i letter = at_most(_mm256_sub_epi8(either(v, all(0x20)), all('a')), 25);
    const __m256i digit = at_most(_mm256_sub_epi8(v, all('0')), 9);
    const __m256i upper = at_most(_mm256_sub_epi8(v, all('A')), 25);
    const __m256i space =
        either(either(_mm256_cmpeq_epi8(v, all(' ')), _mm256_cmpeq_epi8(v, all('\r'))),
               at_most(_mm256_sub_epi8(v, all('\t')), 1));  // \t and \n
    const __m256i removed =
        either(_mm256_andnot_si256(space, at_most(v, 0x1F)), _mm256_cmpeq_epi8(v, all(0x7F)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(copy),
                        either(v, _mm256_and_si256(upper, case_bit)));
    // The highest bit of a byte that is not ASCII is set.
    other = static_cast<uint32_t>(_mm256_movemask_epi8(either(v, removed)));
    boundary = ~(other | static_cast<uint32_t>(_mm256_movemask_epi8(either(letter, digit))));
    white = static_cast<uint32_t>(_mm256_movemask_epi8(space));
  }

  [[gnu::target("avx2")]] static void block(const char* text, bool lower, char* copy,
                                            Block& block) {
    const __m256i case_bit = _mm256_set1_epi8(lower ? 0x20 : 0);
    uint32_t boundary[2], other[2], space[2];
    half(text, case_bit, copy, boundary[0], other[0], space[0]);
    half(text + 32, case_bit, copy + 32, boundary[1], other[1], space[1]);
    block = {boundary[0] | static_cast<uint64_t>(boundary[1]) << 32,
             other[0] | static_cast<uint64_t>(other[1]) << 32,
             space[0] | static_cast<uint64_t>(space[1]) << 32};
  }
};

struct Avx512 {
  [[gnu::target("avx512f,avx512bw")]] static __m512i all(char c) { return _mm512_set1_epi8(c); }
  // Bytes from `low` to `low` + `more`.
  [[gnu::target("avx512f,avx512bw")]] static __mmask64 within(__m512i v, char low, char more) {
    return _mm512_cmple_epu8_mask(_mm512_sub_epi8(v, all(low)), all(more));
  }

  [[gnu::target("avx512f,avx512bw")]] static void block(const char* text, bool lower, char* copy,
                                                        Block& block) {
    const __m512i v = _mm512_loadu_si512(text);
    const __mmask64 word = within(_mm512_or_si512(v, all(0x20)), 'a', 25) | within(v, '0', 9);
    const __mmask64 space = within(v, '\t', 1) | _mm512_cmpeq_epi8_mask(v, all('\r')) |
                            _mm512_cmpeq_epi8_mask(v, all(' '));
    const __mmask64 plain = within(v, ' ', 0x7E - ' ') | space;
    const __mmask64 upper = lower ? within(v, 'A', 25) : 0;
    _mm512_storeu_si512(copy, _mm512_mask_add_epi8(v, upper, v, all(0x20)));
    block = {plain & ~word, ~plain, space};
  }
};
#endif

// Kind::block does one block.
template <class Kind>
void classify(const char* text, size_t size, bool lower, char* copy, Block* blocks) {
  const size_t n_whole = size / kBlock;
  for (size_t i = 0; i < n_whole; ++i) {
    Kind::block(text + i * kBlock, lower, copy + i * kBlock, blocks[i]);
  }
  // Nothing behind the text is read.
  char rest[kBlock];
  std::memset(rest, ' ', kBlock);
  const size_t n_rest = size - n_whole * kBlock;
  std::memcpy(rest, text + n_whole * kBlock, n_rest);
  Kind::block(rest, lower, copy + n_whole * kBlock, blocks[n_whole]);
  blocks[n_whole].boundary &= (uint64_t{2} << n_rest) - 1;
}

}  // namespace

Classify find_classify(const char* name) {
  if (std::string_view(name) == "plain") return classify<Plain>;
#if defined(__x86_64__)
  if (std::string_view(name) == "avx2" && __builtin_cpu_supports("avx2")) return classify<Avx2>;
  if (std::string_view(name) == "avx512" && __builtin_cpu_supports("avx512bw")) {
    return classify<Avx512>;
  }
#endif
  return nullptr;
}

Classify best_classify() {
  for (const char* name : {"avx512", "avx2"}) {
    if (const Classify found = find_classify(name); found != nullptr) return found;
  }
  return find_classify("plain");
}

const char* best_instructions() {
  if (find_classify("avx512") != nullptr) return "AVX-512";
  return find_classify("avx2") != nullptr ? "AVX2" : "no special ones";
}

}  // namespace fastbert
