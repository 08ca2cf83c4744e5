// What the programs share: random numbers that are the same on every run, and failures that are counted and told.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

inline std::mt19937 random_numbers(0);
inline int failures = 0;

inline int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }

inline void expect(bool holds, const std::string& what) {
  if (!holds && ++failures <= 20) std::printf("%s\n", what.c_str());
}

// What an op may find in its workspace: anything, here bits of ones (as a number: NaN).
inline std::vector<double> used_workspace(size_t bytes) {
  return std::vector<double>((bytes + 7) / 8, std::bit_cast<double>(~uint64_t{0}));
}

// The same bits.
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class... Numbers>
std::string text(const Numbers&... numbers) {
  return ((" " + std::to_string(numbers)) + ...);
}
