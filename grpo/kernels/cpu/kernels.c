/* The C kernels of training, as one library. decode_step.c is a library of its own. */

#include "attention.c"
#include "fused_ops.c"
