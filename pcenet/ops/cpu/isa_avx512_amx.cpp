// AVX-512 with products of bfloat16 in tile registers.
#define VECTOR 16
#define TILE 12
#define NAME "avx512_amx"
#define TABLE avx512_amx_kernels
#include "kernels.inl"
