// The tables that generate_unicode_tables.py writes; unicode.cpp alone reads them.
#pragma once

#include <cstdint>

namespace fastbert {

extern const uint16_t flags_pages[];
extern const uint8_t flags[];
extern const uint16_t combining_pages[];
extern const uint8_t combining[];
extern const uint16_t matcher_pages[];
extern const uint8_t matcher[];
extern const uint16_t decomposition_index_pages[];
extern const uint16_t decomposition_index[];
extern const char32_t decomposition_pool[];
extern const uint16_t lowercase_index_pages[];
extern const uint16_t lowercase_index[];
extern const char32_t lowercase_pool[];

}  // namespace fastbert
