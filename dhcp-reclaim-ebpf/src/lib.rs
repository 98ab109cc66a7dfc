//! What the two halves of dhcp-reclaim share: the layout of what crosses the kernel boundary, and
//! the classifier, which is the same function in the kernel, in tests, in fuzzers and in benches.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "vectors"))]
extern crate std;

pub mod abi;
pub mod wire;
