//! Builds the kernel half.
fn main() {}
