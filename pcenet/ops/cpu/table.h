// What a unit isa_<name>.cpp offers: its functions, in a table of its own namespace.
#pragma once

#include <cstdint>

namespace pcenet {

struct Table {
  void (*twice)(const float* in, float* out, int64_t count);
};

namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
namespace neon {
extern const Table table;
}

}  // namespace pcenet
