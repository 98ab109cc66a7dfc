//! `classify()`: from a frame to a [`Record`](crate::abi::Record).
