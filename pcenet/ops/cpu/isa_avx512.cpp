#define SET avx512
#include "kernels.inl"
