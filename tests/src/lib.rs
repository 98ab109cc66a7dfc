//! The lab: namespaces, bridges, servers and clients that tests and `cargo xtask run` share.
