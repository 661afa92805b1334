// Compiled once per instruction set: SET is the namespace, the unit's flags decide what the compiler may use.
#include "table.h"

namespace pcenet::SET {
namespace {

void twice(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 2 * in[i];
}

}  // namespace

const Table table = {twice};

}  // namespace pcenet::SET
