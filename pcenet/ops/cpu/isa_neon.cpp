#define SET neon
#include "kernels.inl"
