// AVX-512: 32 registers of 16 floats.
#define VECTOR 16
#define TILE 12
#define NAME "avx512"
#define TABLE avx512_kernels
#include "kernels.inl"
