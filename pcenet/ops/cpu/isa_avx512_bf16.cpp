// AVX-512 with products of bfloat16: 32 registers of 16 floats.
#define VECTOR 16
#define TILE 12
#define NAME "avx512_bf16"
#define TABLE avx512_bf16_kernels
#include "kernels.inl"
