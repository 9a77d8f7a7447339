//go:build !race

package soak

// memoryFactor is how many times the memory a process of tests takes that the program itself would.
const memoryFactor = 1
