// AVX2 and FMA: 16 registers of 8 floats.
#define VECTOR 8
#define TILE 6
#define NAME "avx2"
#define TABLE avx2_kernels
#include "kernels.inl"
