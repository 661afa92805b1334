// arm64: 32 registers of 4 floats.
#define VECTOR 4
#define TILE 8
#define NAME "neon"
#define TABLE neon_kernels
#include "kernels.inl"
