// SCAPHOID_VECTORISED marks a hot function that is compiled for AVX2 too, with all that it calls; the loader picks by
// processor. The results are the same bits: nothing is contracted or reordered. Not under Thread- and AddressSanitizer,
// whose runtimes are not up yet when the loader picks.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define SCAPHOID_VECTORISED __attribute__((flatten, target_clones("avx2", "default")))
#else
#define SCAPHOID_VECTORISED
#endif
