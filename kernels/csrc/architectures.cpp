// Which GPU code the library holds.
#include "scaphoid_ops.h"

const char* scaphoid_cuda_architectures(void) { return SCAPHOID_CUDA_CODE; }
